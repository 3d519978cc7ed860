"""What each process of the long tests of test_zero.py runs: all families, and more settings."""

from parallel.fully_sharded import FAMILIES
from parallel.zero import merges, trains, trains_in_bf16
from parallel.zero_trainer import lives

SETTINGS = {
    "some experts": {"expert_indices": {"experts": [1, 4]}},
    "recompute": {"recompute": True},
    "materialize": {"backend": "materialize"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}
SCENARIOS = {"bf16, stage 2": trains_in_bf16(2)}
for stage in (2, 3):
    SCENARIOS[f"quantized, stage {stage}"] = trains("qwen3_moe", stage, quantized=True)
for name, changes in SETTINGS.items():
    SCENARIOS[f"{name}, loaded in parts"] = trains("qwen3_moe", 3, True, **changes)
for family in FAMILIES:
    SCENARIOS |= {
        f"{family} ZeRO-2": trains(family, 2),
        f"{family} ZeRO-3": trains(family, 3),
        f"{family} ZeRO-3, loaded in parts": trains(family, 3, loaded_in_parts=True),
        f"{family} merges": merges(family, 3),
        f"{family} Trainer, stage 2": lives(family, 2),
        f"{family} Trainer, stage 3": lives(family, 3),
    }
