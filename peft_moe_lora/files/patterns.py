"""Patterns of modules, as the keys of rank_pattern, expert_indices and target_projections.

A key is the end of a module's path or a regular expression for it. The first key that matches a
path decides, so the order of the keys is part of their meaning. PEFT sorts the keys when it saves a
configuration. Patterns are therefore saved in a form whose order does not count.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from peft.utils.other import get_pattern_key

from .text import quoted

Value = TypeVar("Value")


def value_of(pattern: Mapping[str, Value] | None, path: str, default: Value) -> Value:
    """The value of the first key that matches a path; the default if none matches."""
    if not pattern:
        return default
    return pattern.get(get_pattern_key(list(pattern), path), default)


def check_every_key_matches(field: str, pattern: Mapping[str, Any], paths: Sequence[str]) -> None:
    """Check that every key of a pattern decides some module.

    Args:
        field: name of the pattern, for the message.
        pattern: the pattern.
        paths: the paths of all targeted experts modules.
    Raises:
        ValueError: if a key matches none of these modules, or if an earlier key matches all modules
            that it matches. The message names the key.
    """
    used = {get_pattern_key(list(pattern), path) for path in paths}
    unused = sorted(set(pattern) - used)
    if not unused:
        return
    listed = str(list(paths[:4]) or "none")
    if len(paths) > 4:
        listed += f" and {len(paths) - 4} more"
    raise ValueError(
        f"{field}: {quoted(unused[0])} matches no targeted experts module, or an earlier entry "
        f"matches all of its modules. The targeted experts modules are {listed}. Correct the "
        "entry, or remove it."
    )


def one_or_by_path(values: Mapping[str, Value], default: Value) -> Value | dict[str, Value]:
    """The value that all paths have, or a pattern that gives each path its own.

    Args:
        values: path -> value; the default is returned if there is none.
        default: the value of a path that no key matches.
    """
    found = list(values.values())
    if not found:
        return default
    if all(value == found[0] for value in found):
        return found[0]
    return without_order(None, values, default)


def without_order(
    pattern: Mapping[str, Value] | None, values: Mapping[str, Value], default: Value
) -> dict[str, Value]:
    """A pattern that gives each path its value, in whatever order its keys are read.

    Args:
        pattern: the pattern of a configuration; it is kept if it gives these values in any order.
        values: path -> value, of every module that a pattern is asked for.
        default: the value of a path that no key matches.
    """
    given = dict(pattern or {})
    for candidate in (given, by_layer(values, default)):
        if _decides(candidate, values, default):
            return candidate
    return {f"^{re.escape(path)}": value for path, value in values.items() if value != default}


def last_name(path: str) -> str:
    return path.rpartition(".")[2]


def by_layer(
    values: Mapping[str, Value], default: Value, name_of: Callable[[str], str] = last_name
) -> dict[str, Value]:
    """A pattern for the layers whose value is not the default.

    A key also matches longer paths that end with it. So it is a layer's name only if no layer that
    this name matches has another value. Otherwise it is the whole path.

    Args:
        values: path of a layer -> its value.
        default: the value of a path that no key matches.
        name_of: the end of a path by which layers are gathered.
    """
    found: dict[str, Value] = {}
    for path, value in values.items():
        if value == default:
            continue
        name = name_of(path)
        if any(other != value for key, other in values.items() if f".{key}".endswith(f".{name}")):
            name = path
        found[name] = value
    return found


def _decides(pattern: dict[str, Value], values: Mapping[str, Any], default: Any) -> bool:
    """Whether a pattern gives every path its value, also when its keys are sorted."""
    keys = list(pattern)
    ordered = sorted(pattern)
    for path, value in values.items():
        key = get_pattern_key(keys, path)
        if key != get_pattern_key(ordered, path) or pattern.get(key, default) != value:
            return False
    return True
