"""What each of four processes of test_expert_parallel.py runs: copies of experts, tp and fsdp."""

from parallel.expert_parallel import ADAPTERS, merges, trains

MODES_OF_FOUR = {
    "two copies of each expert": {"fsdp_size": 4, "ep_size": 2},
    "one group": {"fsdp_size": 4, "ep_size": 4},
    "tp and fsdp": {"tp_size": 2, "fsdp_size": 2, "ep_size": 4},
    "replicas": {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2},
}
SCENARIOS = {
    f"qwen3_moe {name}, {adapter}": trains("qwen3_moe", mode, **changes)
    for name, mode in MODES_OF_FOUR.items()
    for adapter, changes in ADAPTERS.items()
    if adapter != "recompute"
}
for name, mode in MODES_OF_FOUR.items():
    SCENARIOS[f"merges {name}"] = merges(mode)
