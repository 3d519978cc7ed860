"""What each process of test_trainer.py runs in its long set: more families, every setting."""

from parallel.trained import SETTINGS, lives_of

FAMILIES_BESIDE = ("gpt_oss", "mixtral", "deepseek_v3", "nemotron_h")
SETTINGS_BESIDE = {
    "SHARDED_STATE_DICT": {},
    "FULL_STATE_DICT, checkpointing": {"activation_checkpointing": True},
    "FULL_STATE_DICT, cpu_ram_efficient_loading": {"cpu_ram_efficient_loading": True},
}
SCENARIOS = lives_of("qwen3_moe", SETTINGS_BESIDE)
for family in FAMILIES_BESIDE:
    SCENARIOS |= lives_of(family, SETTINGS | SETTINGS_BESIDE)
