"""Names of tensors that other programs use before they export, and what to do about each.

Their exports have names that a format knows. These are the names of their own checkpoints.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple


class _Program(NamedTuple):
    """A program, a pattern of the names in its own checkpoints, and its way to export."""

    name: str
    pattern: re.Pattern[str]
    export: str


_PROGRAMS = (
    _Program(
        "Megatron-Bridge",
        re.compile(r"\.adapter\.linear_(?:in|out)\.weight$"),
        "export it with AutoBridge.export_adapter_ckpt",
    ),
    _Program(
        "NeMo Automodel",
        re.compile(r"\.lora_(?:gate_and_up|down)_[AB]$"),
        "let its checkpointer write the adapter, which then has tensors of each expert",
    ),
    _Program(
        "prime-rl",
        re.compile(r"\.w[123]_lora_[AB](?:\.\d+)?$"),
        "save it with save_adapter_separately, which writes tensors of each expert",
    ),
)


def looks_like(names: Iterable[str]) -> str:
    """A sentence on whose checkpoint has these names, with a space before it; else nothing.

    Args:
        names: the names of the tensors in a file.
    """
    for name in names:
        for program in _PROGRAMS:
            if program.pattern.search(name):
                return f" It looks like a checkpoint of {program.name} itself: {program.export}."
    return ""
