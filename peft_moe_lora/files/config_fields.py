"""Checks the types in an adapter_config.json, which anybody may have edited by hand.

A wrong type is found here, before a field is used. The ranges of numbers that depend on the
adapter's kind are checked where they are used.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from operator import index
from typing import Any, TypeGuard

from .expressions import check_expression
from .text import quoted

# the largest rank; it also keeps lora_alpha / r within the range of a float
HIGHEST_RANK = 2**31 - 1
# lora_alpha may be zero, or of a size at which scaling * B A is neither infinite nor zero in fp32
LOWEST_ALPHA = 2.0**-31
HIGHEST_ALPHA = 2.0**31


def check_fields(config: Mapping[str, Any]) -> None:
    """Check the types of a configuration's fields; a field that is missing or None is left out.

    Raises:
        ValueError: if a value has a wrong type, or if a pattern is not a regular expression. The
            message names the field.
    """
    for name, (is_right, needed) in _FIELDS.items():
        value = config.get(name)
        if value is not None and not is_right(value):
            raise ValueError(f"{name} must be {needed}, got {quoted(value)}; correct {name}.")
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(name) or ():
            check_pattern(name, pattern)
    for name in ("target_modules", "exclude_modules"):
        expression = config.get(name)
        if isinstance(expression, str):
            check_expression(name, expression)
    for name in ("modules_to_save", "layers_pattern"):
        for expression in _as_list(config.get(name)):
            # PEFT matches these with more around them
            check_expression(name, expression, r"(^|.*\.){}($|\..*)")


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


def _as_list(value: str | Collection[str] | None) -> Collection[str]:
    if isinstance(value, str):
        return [value]
    return value or ()


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping)


def _are_strings(value: object) -> bool:
    if not isinstance(value, Collection) or isinstance(value, str | bytes | Mapping):
        return False
    return all(isinstance(item, str) for item in value)


def _is_string_or_strings(value: object) -> bool:
    return _is_string(value) or _are_strings(value)


def _are_integers(value: object) -> bool:
    if isinstance(value, list | tuple | set | range):
        return all(is_count(item) for item in value)
    return is_count(value)


def _are_tokens(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) for key in value) and all(map(_are_ids, value.values()))
    return _are_ids(value)


def _are_ids(value: object) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and _are_integers(value)


def _is_settings(value: object) -> bool:
    """Whether a value is the settings of one method: a dict, or PEFT's class of them."""
    return not isinstance(value, list | tuple | str | int | float)


def _is_bias(value: object) -> bool:
    return isinstance(value, str) and value in ("none", "all", "lora_only")


_BOOL = (_is_bool, "true or false")
_STRING = (_is_string, "a string")
_STRINGS = (_are_strings, "a list of strings")
_OBJECT = (_is_object, "an object")
_SETTINGS = (_is_settings, "an object of settings, or left out")
_NUMBERS = (_is_object, "an object that maps names to numbers")
_NAMES = (_is_string_or_strings, "a string or a list of strings")

# field -> (whether a value has the right type, the right type in words)
_FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "base_model_name_or_path": _STRING,
    "revision": _STRING,
    "task_type": _STRING,
    "auto_mapping": _OBJECT,
    "rank_pattern": _NUMBERS,
    "alpha_pattern": _NUMBERS,
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "target_parameters": _STRINGS,
    "target_projections": _NAMES,
    "modules_to_save": _STRINGS,
    "layers_to_transform": (_are_integers, "an integer or a list of integers, each at least 0"),
    "layers_pattern": _NAMES,
    "trainable_token_indices": (_are_tokens, "a list of at least one id, or an object of lists"),
    "bias": (_is_bias, '"none", "all" or "lora_only"'),
    "use_rslora": _BOOL,
    "use_dora": _BOOL,
    "lora_bias": _BOOL,
    "use_qalora": _BOOL,
    "fan_in_fan_out": _BOOL,
    "inference_mode": _BOOL,
    "ensure_weight_tying": _BOOL,
    "recompute": _BOOL,
    "keep_implementation": _BOOL,
    "fast_linear": _BOOL,
    "lora_dropout": (is_finite, "a finite number"),
    "loftq_config": _SETTINGS,
    "eva_config": _SETTINGS,
    "corda_config": _SETTINGS,
    "lora_ga_config": _SETTINGS,
    "arrow_config": _SETTINGS,
    "kasa_config": _SETTINGS,
    "velora_config": _SETTINGS,
    "monteclora_config": _SETTINGS,
    "use_bdlora": _SETTINGS,
}
