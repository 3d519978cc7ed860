"""What each process of the long tests of test_zero.py runs: all families."""

from parallel.fully_sharded import FAMILIES
from parallel.zero import merges, trains

SCENARIOS = {}
for family in FAMILIES:
    SCENARIOS[f"{family} ZeRO-2"] = trains(family, 2)
    SCENARIOS[f"{family} ZeRO-3"] = trains(family, 3)
    SCENARIOS[f"{family} ZeRO-3, loaded in parts"] = trains(family, 3, loaded_in_parts=True)
    SCENARIOS[f"{family} merges"] = merges(family, 3)
