"""The fields of peft's LoraConfig, taken from one or written for PEFT's own route to experts.

PEFT names the parameters of experts in target_parameters, and the same names in rank_pattern and
alpha_pattern. This package names their modules in target_modules.
"""

import re
from collections.abc import Collection, Mapping
from copy import deepcopy
from dataclasses import fields
from typing import Any

from peft import LoraConfig, PeftType

from .field_rules import RULES
from .patterns import Value, last_name
from .text import quoted

# PEFT's word in target_modules: every linear layer but the head; here every experts module too
ALL_LINEAR = "all-linear"
# the name of experts modules in transformers
EXPERTS = "experts"

# names that PEFT 0.21 replaces by the experts' parameters in models that transformers 5 has changed
OF_TRANSFORMERS_4 = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")

# fields of no meaning here: the tuner's kind, and settings of features that are refused
_LEFT = ("megatron_core", "peft_type", "peft_version", "qalora_group_size", "runtime_config")


def names_all_linear(target_modules: str | Collection[str] | None) -> bool:
    """Whether target_modules is "all-linear" or a list with it, in PEFT's spelling: any case."""
    names = target_modules or ()
    if isinstance(names, str):
        names = [names]
    return any(name.lower() == ALL_LINEAR for name in names)


def taken_from(config: LoraConfig) -> dict[str, Any]:
    """The fields of a LoraConfig that a configuration of per-expert LoRA takes, as copies.

    Raises:
        TypeError: if it is no configuration of PEFT's LoRA.
        ValueError: if a field has a meaning that is not known here, or if the meaning of the
            targets depends on PEFT's tables. The message names the field.
    """
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        raise TypeError(f"a peft.LoraConfig is needed, got {type(config).__name__}.")
    if config.target_modules is None and not config.target_parameters:
        raise ValueError(
            "target_modules=None: in a LoraConfig, PEFT chooses the layers by the type of the "
            'model; name them in target_modules, for example "all-linear" or ["experts"].'
        )
    if getattr(config, "_custom_modules", None):
        raise ValueError(
            f"_custom_modules={quoted(config._custom_modules)}: layers of other classes than "
            "PEFT's own are not supported; leave them unregistered."
        )
    taken = {}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in _LEFT:
            continue
        if field.name in RULES:
            taken[field.name] = deepcopy(value)
        elif value != getattr(LoraConfig(), field.name):
            raise ValueError(
                f"{field.name}={quoted(value)}: this version knows no such field of LoraConfig; "
                f"leave {field.name} unset."
            )
    return taken


def said_in_peft(config: LoraConfig, parameters: Collection[str]) -> dict[str, Any]:
    """The fields of the LoraConfig by which PEFT adapts what per-expert LoRA adapts.

    Args:
        config: a configuration of per-expert LoRA.
        parameters: names of the experts' parameters to adapt.
    Raises:
        ValueError: if a LoraConfig cannot say what a field says. The message names the field.
    """
    if names_all_linear(config.target_modules):
        raise ValueError(
            f"target_modules={quoted(config.target_modules)}: in some models PEFT gives the "
            "experts another rank then; add the adapter to its model first, which names the "
            "layers."
        )
    said = {
        field.name: deepcopy(getattr(config, field.name))
        for field in fields(LoraConfig)
        if field.name != "peft_type"
    }
    if config.target_parameters:
        said["target_modules"] = config.target_modules or []
    else:
        said |= _targets_in_peft(config.target_modules, parameters)
    if said["target_parameters"]:
        _check_experts(config)
    _check_layers(said["target_modules"])
    for name in ("rank_pattern", "alpha_pattern"):
        said[name] = _pattern_in_peft(name, said[name], parameters)
    return said


def _check_experts(config: LoraConfig) -> None:
    """Check that PEFT's route does with experts what the fields say."""
    excluded = config.exclude_modules or ()
    if not isinstance(excluded, str):
        excluded = [name for name in excluded if last_name(name) == EXPERTS]
    not_applied = "PEFT does not apply it to the experts' parameters"
    faults = {
        "expert_indices": (
            getattr(config, "expert_indices", None),
            "a LoraConfig adapts every expert",
        ),
        "target_projections": (
            isinstance(getattr(config, "target_projections", None), dict),
            "a LoraConfig names parameters by the ends of their paths",
        ),
        "lora_dropout": (config.lora_dropout, "PEFT has no dropout on experts"),
        "layers_to_transform": (config.layers_to_transform not in (None, []), not_applied),
        "exclude_modules": (excluded, not_applied),
    }
    for name, (is_set, reason) in faults.items():
        if is_set:
            raise ValueError(
                f"{name}={quoted(getattr(config, name))}: {reason}; leave {name} unset, or name "
                "the experts modules in target_modules by their paths."
            )


def _targets_in_peft(
    target_modules: str | Collection[str] | None, parameters: Collection[str]
) -> dict[str, Any]:
    """target_modules and target_parameters of a LoraConfig.

    Args:
        target_modules: those of per-expert LoRA: experts modules by name, and other layers.
        parameters: names of the experts' parameters to adapt.
    Raises:
        ValueError: if the names do not show which modules hold experts.
    """
    if target_modules is None:
        target_modules = [EXPERTS]
    if isinstance(target_modules, str):
        raise ValueError(
            f"target_modules={quoted(target_modules)}: a regular expression does not show which "
            "modules hold experts, whose parameters a LoraConfig has to name; name the modules in "
            "a list."
        )
    given = sorted(target_modules)
    experts = [name for name in given if last_name(name) == EXPERTS]
    targets = [f"{name}.{parameter}" for name in experts for parameter in parameters]
    others = [name for name in given if name not in experts]
    return {"target_modules": others, "target_parameters": targets or None}


def _check_layers(target_modules: str | Collection[str]) -> None:
    """Check that PEFT adapts the layers that the names of a LoraConfig say.

    Raises:
        ValueError: if PEFT reads a name as the experts of a model as transformers 4 had it.
    """
    if isinstance(target_modules, str):
        return
    for name in sorted(target_modules):
        if last_name(name) in OF_TRANSFORMERS_4:
            raise ValueError(
                f"target_modules: {quoted(name)} is a linear layer here, but in many models PEFT "
                "reads this name as the experts of transformers 4; leave it out."
            )


def _pattern_in_peft(
    field: str, pattern: Mapping[str, Value] | None, parameters: Collection[str]
) -> dict[str, Value]:
    """A rank_pattern or alpha_pattern of a LoraConfig, where names of experts become parameters.

    Args:
        field: the pattern's name, for the message.
        pattern: module -> value, as per-expert LoRA reads it.
        parameters: names of the experts' parameters.
    Raises:
        ValueError: if an entry may match experts, but does not end with their name.
    """
    found = {}
    for entry, value in (pattern or {}).items():
        end = re.split(r"\W", entry)[-1]
        # "experts" may be matched by an expression that ends with a part of it, or with anything
        may_be = EXPERTS.endswith(end) and not re.fullmatch(r"[\w.]+", entry)
        if end == EXPERTS and "|" not in entry:
            found[f"{entry}.({'|'.join(parameters)})"] = value
        elif may_be or "|" in entry:
            raise ValueError(
                f"{field}: {quoted(entry)} does not show whether it matches experts, whose "
                f"parameters a LoraConfig has to name; name the modules in {field}."
            )
        else:
            found[entry] = value
    return found
