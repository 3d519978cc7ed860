"""What each of four processes of test_on_gpus.py runs: the engines of two, and HSDP."""

from parallel.on_gpus import ENGINES, OF_FOUR, scenarios

SCENARIOS = scenarios(ENGINES | OF_FOUR)
