"""What each process of test_trainer.py runs."""

from parallel import own_loop, supervised
from parallel.trainer import lives, trains_under_the_first_fsdp

SETTINGS = {
    "FULL_STATE_DICT": {},
    "SHARDED_STATE_DICT, checkpointing": {"activation_checkpointing": True},
    "SHARDED_STATE_DICT, cpu_ram_efficient_loading": {"cpu_ram_efficient_loading": True},
}
LOOPS = {
    "FULL_STATE_DICT": {"activation_checkpointing": True},
    "SHARDED_STATE_DICT": {},
}


def lives_of(family, settings):
    """Name of a scenario -> the Trainer's life of a family with these settings of accelerate."""
    return {
        f"{family} {name}": lives(family, name, **changes) for name, changes in settings.items()
    }


SCENARIOS = {
    **lives_of("qwen3_moe", SETTINGS),
    **{f"loop {name}": own_loop.under_fsdp(name, **changes) for name, changes in LOOPS.items()},
    "SFTTrainer": supervised.under_fsdp,
    "FSDP1": trains_under_the_first_fsdp,
}
