"""What each process of the long tests of test_zero.py runs: all families."""

from parallel.fully_sharded import FAMILIES
from parallel.zero import trains

SCENARIOS = {f"{family} ZeRO-2": trains(family, 2) for family in FAMILIES[1:]}
