"""What each of four processes of test_fsdp_options.py runs."""

from parallel.fsdp_afterwards import TRAINED as TRAINED_AFTERWARDS
from parallel.fsdp_afterwards import trains as trains_afterwards
from parallel.fsdp_options import checkpoint_of_two_processes, compiles, hsdp, trains

SCENARIOS = {
    "from two processes": checkpoint_of_two_processes,
    "accumulation": TRAINED_AFTERWARDS["accumulation"],
    **{family: trains_afterwards(family) for family in ("mixtral", "deepseek_v3", "nemotron_h")},
}
for when in ("first", "afterwards"):
    SCENARIOS[f"{when}, HSDP"] = trains(when, shards=hsdp(2, 2))
    SCENARIOS[f"{when}, compiled"] = compiles(when)
