"""What each field of a configuration may hold: one rule a field, in one table.

The table has every field of PEFT's LoraConfig and of MoELoraConfig. The same rules hold for values
given in Python and for those in an adapter_config.json, which anybody may have edited by hand. A
value is checked here before it is used. The ranges of numbers that depend on the adapter's kind
are checked where they are used.
"""

from collections.abc import Callable, Collection, Mapping, Sequence, Set
from dataclasses import is_dataclass
from typing import Any, NamedTuple, TypeGuard

from peft import LoftQConfig, LoraRuntimeConfig, TaskType

from .adapter_file import FORMAT_VERSION, LAYOUT
from .config_fields import check_pattern, is_count, is_finite, is_rank
from .expressions import check_expression
from .text import quoted, shown


class Rule(NamedTuple):
    """What a field may hold.

    Attributes:
        is_right: whether a value has the right type.
        needed: the right type in words.
        may_be_none: whether the field may also be None, which leaves it out.
        feature: what the field turns on, if experts do not support it; else "".
    """

    is_right: Callable[[object], bool]
    needed: str
    may_be_none: bool = True
    feature: str = ""


def check_fields(config: Mapping[str, Any]) -> None:
    """Check the types of a configuration's fields; a field that is missing is left out.

    Raises:
        ValueError: if a value has a wrong type, or if a pattern is not a regular expression. The
            message names the field.
    """
    for name, rule in RULES.items():
        value = config.get(name)
        is_left_out = value is None and (rule.may_be_none or name not in config)
        if not is_left_out and not rule.is_right(value):
            raise ValueError(f"{name} must be {rule.needed}, got {quoted(value)}; correct {name}.")
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


def check_off(config: Mapping[str, Any]) -> None:
    """Check that a configuration turns on no feature that experts do not support.

    Raises:
        ValueError: if it does. The message names the field.
    """
    for name, rule in RULES.items():
        value = config.get(name)
        if rule.feature and not is_off(value):
            raise ValueError(
                f"{name}={quoted(value)}: experts do not support {rule.feature}; leave {name} "
                "unset."
            )


def check_format(config: Mapping[str, Any]) -> None:
    """Check that this version reads the layout and the format version of an adapter.

    Raises:
        ValueError: if it does not.
    """
    layout = config.get("layout", LAYOUT)
    if layout != LAYOUT:
        raise ValueError(
            f"layout={quoted(layout)} is not known; this version reads {LAYOUT!r}. If a newer "
            "peft_moe_lora wrote the adapter, upgrade; if another program wrote it, convert it."
        )
    version = config.get("format_version", FORMAT_VERSION)
    if not is_rank(version) or version > FORMAT_VERSION:
        raise ValueError(
            f"format_version={quoted(version)} is not known; this version reads 1 to "
            f"{FORMAT_VERSION}. Upgrade peft_moe_lora to read the adapter."
        )


def check_known(config: Mapping[str, Any]) -> None:
    """Check that every field of an adapter_config.json that is set is known.

    Raises:
        ValueError: if one is not: a newer release may have written it, and A and B may mean
            something else with it. The message names the fields.
    """
    known = RULES.keys() | OF_OTHERS
    unknown = sorted(name for name, value in config.items() if value and name not in known)
    if config.get("peft_type") != "MOE_LORA" or not unknown:
        return
    raise ValueError(
        f"this version knows no fields {quoted(unknown)}. Upgrade peft_moe_lora and peft (the "
        f"adapter was saved with peft {shown(config.get('peft_version') or 'of no version')}), or "
        "remove the fields if the adapter does not depend on them."
    )


def stored(name: str, value: object, default: object) -> object:
    """The value of a field as a configuration keeps it and as JSON can hold it.

    Args:
        name: name of the field.
        value: what was given, and passed `check_fields`.
        default: what the field is without a value.
    """
    if value is None and RULES[name].may_be_none:
        return default
    return _plain(value)


def _plain(value: object) -> object:
    """A value with lists and dicts in the place of what only behaves like them."""
    if isinstance(value, Mapping):
        return {key: _plain(held) for key, held in value.items()}
    if _is_list(value) and not isinstance(value, set):
        return list(value)
    return value


def is_off(value: object) -> bool:
    """Whether the value of a field turns its feature off; PEFT takes an empty object as on."""
    return value is None or value is False


def _as_list(value: str | Collection[str] | None) -> Collection[str]:
    if isinstance(value, str):
        return [value]
    return value or ()


def _is_anything(value: object) -> bool:
    return True


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_string(value: object) -> bool:
    return isinstance(value, str)


def _is_object(value: object) -> TypeGuard[Mapping[object, object]]:
    return isinstance(value, Mapping)


def _is_flat(value: object) -> bool:
    """Whether a value is an object of plain values; PEFT writes names of a class and a module."""
    if not _is_object(value) or not all(isinstance(key, str) for key in value):
        return False
    return all(held is None or isinstance(held, str | int | float) for held in value.values())


def _is_list(value: object) -> TypeGuard[Collection[object]]:
    """Whether a value is a list, or what becomes one: a tuple, a set, a range."""
    return isinstance(value, Sequence | Set) and not isinstance(value, str | bytes)


def _are_strings(value: object) -> bool:
    return _is_list(value) and all(isinstance(item, str) and item != "" for item in value)


def _is_string_or_strings(value: object) -> bool:
    return _is_string(value) or _are_strings(value)


def _are_projections(value: object) -> bool:
    if _is_object(value):
        return all(_is_string_or_strings(names) for names in value.values())
    return _is_string_or_strings(value)


def _are_integers(value: object) -> bool:
    if _is_list(value):
        return all(is_count(item) for item in value)
    return is_count(value)


def _are_tokens(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) for key in value) and all(map(_are_ids, value.values()))
    return _are_ids(value)


def _are_ids(value: object) -> TypeGuard[Collection[int]]:
    return isinstance(value, list | tuple) and len(value) > 0 and _are_integers(value)


def _is_task(value: object) -> bool:
    return isinstance(value, str) and value in list(TaskType)


def _is_kind(value: object) -> bool:
    return isinstance(value, str) and value in ("MOE_LORA", "LORA")


def _is_loftq(value: object) -> bool:
    return isinstance(value, Mapping | LoftQConfig)


def _is_settings(value: object) -> bool:
    """Whether a value is the settings of one method: a dict, or PEFT's class of them."""
    return isinstance(value, Mapping) or (is_dataclass(value) and not isinstance(value, type))


def _are_ranges(value: object) -> bool:
    """Whether a value is a list of pairs of indices."""
    if not isinstance(value, list | tuple):
        return False
    return all(_are_ids(pair) and len(pair) == 2 for pair in value)


def _is_runtime(value: object) -> bool:
    return isinstance(value, LoraRuntimeConfig) and _is_bool(value.ephemeral_gpu_offload)


def _is_bias(value: object) -> bool:
    return isinstance(value, str) and value in ("none", "all", "lora_only")


_BOOL = Rule(_is_bool, "true or false")
_OUR_BOOL = Rule(_is_bool, "true or false", may_be_none=False)
_STRING = Rule(_is_string, "a string")
_OUR_STRING = Rule(_is_string, "a string", may_be_none=False)
_STRINGS = Rule(_are_strings, "a list of names")
_NUMBERS = Rule(_is_object, "an object that maps names to numbers")
_NAMES = Rule(_is_string_or_strings, "a name or a list of names")
_INDICES = Rule(_are_integers, "an integer or a list of integers, each at least 0")
_TOKENS = Rule(_are_tokens, "a list of at least one id, or an object of lists")
_TASK = Rule(_is_task, f"one of {', '.join(TaskType)}")
_SETTINGS = Rule(_is_settings, "an object of settings, or left out")
_IDS = Rule(_are_ids, "a list of at least one id, or left out")
_RANGES = Rule(_are_ranges, "a list of pairs of indices, or left out")
# checked where they are used, with what is beside them
_LATER = Rule(_is_anything, "", may_be_none=False)


# fields that other programs write and that a conversion reads
OF_OTHERS = ("lora_B_layout", "unsloth_fused_expert_lora")


def _never(feature: str, rule: Rule = _SETTINGS) -> Rule:
    """The rule of a field that must be off."""
    return rule._replace(feature=feature)


RULES = {
    "alora_invocation_tokens": _never("aLoRA", _IDS),
    "alpha_pattern": _NUMBERS,
    "arrow_config": _never("Arrow routing"),
    "auto_mapping": Rule(_is_flat, "an object of names"),
    "backend": _OUR_STRING,
    "base_model_name_or_path": _STRING,
    "bias": Rule(_is_bias, '"none", "all" or "lora_only"'),
    "corda_config": _never("CorDA initialisation"),
    "ensure_weight_tying": _BOOL,
    "eva_config": _never("EVA initialisation"),
    "exclude_modules": _NAMES,
    "expert_indices": _LATER,
    "fan_in_fan_out": _BOOL,
    "fast_linear": _OUR_BOOL,
    "format_version": _LATER,
    "inference_mode": _BOOL,
    "init_lora_weights": _LATER,
    "kasa_config": _never("KaSA"),
    "keep_implementation": _OUR_BOOL,
    "layer_replication": _never("layer replication", _RANGES),
    "layers_pattern": _NAMES,
    "layers_to_transform": _INDICES,
    "layout": _LATER,
    "loftq_config": Rule(_is_loftq, "an object of settings"),
    "lora_alpha": _LATER,
    "lora_bias": _never("a bias on B", _BOOL),
    "lora_dropout": Rule(is_finite, "a finite number", may_be_none=False),
    "lora_ga_config": _never("LoRA-GA initialisation"),
    "megatron_config": _never("Megatron layers"),
    "megatron_core": _STRING,
    "modules_to_save": _STRINGS,
    "monteclora_config": _never("MonteCLoRA"),
    "peft_type": Rule(_is_kind, '"MOE_LORA" or "LORA"'),
    "peft_type_from": _STRING,
    "peft_version": _STRING,
    "qalora_group_size": Rule(is_rank, "an integer of at least 1"),
    "r": _LATER,
    "rank_pattern": _NUMBERS,
    "recompute": _OUR_BOOL,
    "revision": _STRING,
    "runtime_config": Rule(_is_runtime, "a LoraRuntimeConfig", may_be_none=False),
    "target_modules": _NAMES,
    "target_parameters": _STRINGS,
    "target_projections": Rule(
        _are_projections, "a name, a list of names, or an object of them by layer"
    ),
    "task_type": _TASK,
    "trainable_token_indices": _TOKENS,
    "use_bdlora": _never("BD-LoRA"),
    "use_dora": _never("DoRA", _BOOL),
    "use_qalora": _never("QALoRA", _BOOL),
    "use_rslora": _BOOL,
    "velora_config": _never("VeLoRA"),
}
