"""Checks of ranks, scalings, patterns and expert ids, in a configuration or in an adapter file.

The rule of each field of a configuration is in `field_rules`.
"""

import math
from collections.abc import Iterable, Mapping
from operator import index
from typing import TypeGuard

from .expressions import check_expression
from .text import quoted

# the largest rank; it also keeps lora_alpha / r within the range of a float
HIGHEST_RANK = 2**31 - 1
# lora_alpha may be zero, or of a size at which scaling * B A is neither infinite nor zero in fp32
LOWEST_ALPHA = 2.0**-31
HIGHEST_ALPHA = 2.0**31


def check_pattern(name: str, pattern: str) -> None:
    """Check that a key of rank_pattern, alpha_pattern or expert_indices can be matched.

    Args:
        name: name of the field, for the message.
        pattern: the end of a module's path, or a regular expression.
    Raises:
        ValueError: if it is not a regular expression.
    """
    if not isinstance(pattern, str):
        raise ValueError(
            f"{name}: its keys must be paths or regular expressions, got {quoted(pattern)}."
        )
    check_expression(name, pattern)
    # PEFT matches a key behind any prefix, where flags such as (?i) are not allowed
    check_expression(name, pattern, r"(.*\.)?({})$")


def checked_indices(indices: Mapping[str, Iterable[int]]) -> dict[str, list[int]]:
    """expert_indices with ascending lists of plain integers.

    Raises:
        ValueError: if it is not a dict from patterns to lists of ids, if a list repeats an id, or
            if no expert is chosen at all.
    """
    if not isinstance(indices, Mapping):
        raise ValueError(
            "expert_indices must be a dict from layer patterns to lists of expert ids, got "
            f"{quoted(indices)}."
        )
    checked = {}
    for pattern, experts in indices.items():
        check_pattern("expert_indices", pattern)
        checked[pattern] = _checked_ids(pattern, experts)
    if not any(checked.values()):
        raise ValueError(
            f"expert_indices={quoted(indices)} chooses no expert; leave it unset for every expert."
        )
    return checked


def _checked_ids(pattern: str, experts: Iterable[int]) -> list[int]:
    given: list[int] = []
    is_list = isinstance(experts, Iterable) and not isinstance(experts, str)
    if is_list:
        given = list(experts)
    if not is_list or not all(_is_index(expert) for expert in given):
        raise ValueError(
            f"expert_indices[{quoted(pattern)}] must be a list of expert ids, got "
            f"{quoted(experts)}."
        )
    ids = sorted(index(expert) for expert in given)
    repeated = len(set(ids)) < len(ids)
    if repeated or any(expert < 0 for expert in ids):
        raise ValueError(
            f"expert_indices[{quoted(pattern)}] must name experts from 0 up, each once, got "
            f"{quoted(experts)}."
        )
    return ids


def _is_index(value: object) -> bool:
    """Whether the value is an integer of Python or numpy, or a tensor that holds one integer."""
    return hasattr(value, "__index__") and not isinstance(value, bool)


def is_rank(value: object) -> TypeGuard[int]:
    """Whether a value is an integer that can be a rank."""
    return _is_integer(value) and 1 <= value <= HIGHEST_RANK


def is_finite(value: object) -> bool:
    """Whether a value is a number, and finite as a float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def is_alpha(value: object) -> bool:
    """Whether a value is a number that can be a lora_alpha: its scaling is exact enough in fp32."""
    if not is_finite(value):
        return False
    assert isinstance(value, int | float)
    return value == 0 or LOWEST_ALPHA <= abs(value) <= HIGHEST_ALPHA


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value is an integer of at least 0 that can be a number of things, or an index."""
    return _is_integer(value) and 0 <= value <= HIGHEST_RANK


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
