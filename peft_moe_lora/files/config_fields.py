"""Checks of ranks, scalings, patterns and expert ids, in a configuration or in an adapter file.

The rule of each field of a configuration is in `field_rules`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import index
from typing import Any, TypeGuard

from .expressions import check_expression
from .text import nearest, quoted

# the largest rank; it also keeps lora_alpha / r within the range of a float
HIGHEST_RANK = 2**31 - 1
# lora_alpha may be zero, or of a size at which scaling * B A is neither infinite nor zero in fp32
LOWEST_ALPHA = 2.0**-31
HIGHEST_ALPHA = 2.0**31


def check_pattern(name: str, pattern: str) -> None:
    """Check that a key of a field such as rank_pattern or expert_indices can be matched.

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


def checked_projections(given: Any, known: Sequence[str]) -> list[str] | dict[str, list[str]]:
    """target_projections as a list, or as a dict from patterns to lists.

    Args:
        given: a name, a list of names, or a dict of them; None for every name.
        known: the names that there are.
    Raises:
        ValueError: if a list has no name, or one that is not known or repeated, or if a dict is
            empty.
    """
    if given is None:
        return list(known)
    if not isinstance(given, Mapping):
        return _checked_names("target_projections", given, known)
    if not given:
        raise ValueError(
            "target_projections={} names no experts module; leave it unset for every projection."
        )
    checked = {}
    for pattern, names in given.items():
        check_pattern("target_projections", pattern)
        field = f"target_projections[{quoted(pattern)}]"
        checked[pattern] = _checked_names(field, names, known)
    return checked


def _checked_names(field: str, given: str | Iterable[str], known: Sequence[str]) -> list[str]:
    names = [given] if isinstance(given, str) else list(given)
    unknown = [name for name in names if name not in known]
    if names and not unknown and len(set(names)) == len(names):
        return names
    hint = nearest(unknown[0], known) if unknown else ""
    raise ValueError(
        f"{field} must name one or more of {tuple(known)}, each at most once; got "
        f"{quoted(names)}.{hint}"
    )


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
