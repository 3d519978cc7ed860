"""What PEFT's words in a configuration mean on the experts of a model.

    target_parameters             parameters of experts: their modules, and target_projections
    "all-linear"                  every linear layer but the head, and every experts module
    "experts", a string           the modules of this name, if no path matches it as an expression
    rank_pattern, alpha_pattern   the name of a parameter: its module

`resolve` writes the meaning into the configuration, as PEFT does with target_modules. From then on,
the configuration names modules and projections, so its saved form needs none of these words.
"""

import logging
from collections.abc import Collection, Mapping
from copy import copy
from typing import Any, NamedTuple

from peft import LoraModel
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.other import get_pattern_key
from torch import nn

from ..config import MoELoraConfig
from ..experts.families import READ_NOT_CALLED, STACKS, STACKS_OF
from ..experts.layout import PROJECTIONS, ExpertsLayout, is_experts
from ..files.patterns import Value, last_name, one_or_by_path, value_of, without_order
from ..files.peft_words import ALL_LINEAR, OF_TRANSFORMERS_4, names_all_linear
from ..files.text import nearest, quoted
from ..parallel import divided
from .loading import current_load
from .targets import (
    base_modules,
    base_of,
    every_experts_module,
    holds_experts,
    is_target,
    layout_of,
    names_of,
    targets_of,
)

logger = logging.getLogger(__name__)

# names of one expert's layers in transformers 4, and of the experts' parameters in transformers 5
_OF_EXPERTS_ELSEWHERE = frozenset((*OF_TRANSFORMERS_4, *STACKS))


class _Parameter(NamedTuple):
    """A parameter of an experts module: the module's path, and the parameter's name in it."""

    module: str
    name: str

    @property
    def path(self) -> str:
        return f"{self.module}.{self.name}"


def resolve(tuner: LoraModel, config: MoELoraConfig) -> None:
    """Replace PEFT's words in a configuration by the modules and projections that they mean.

    Args:
        tuner: the tuner of the model, which is left unchanged.
        config: configuration of the new adapter; changed in place.
    Raises:
        ValueError: if a word names nothing, names a parameter that is not of experts, or means
            something that the adapter cannot hold. The message names the word.
    """
    model = tuner.model
    if names_all_linear(config.target_modules) and divided.is_divided(model):
        # a divided model refuses it when the targets are checked
        return
    is_pefts = bool(config.target_parameters)
    if isinstance(config.target_modules, str) and _is_plain_name(tuner, config):
        _set_targets(config, {config.target_modules})
    if config.target_parameters:
        _resolve_parameters(tuner, config)
    elif config.target_modules is None:
        _set_targets(config, every_experts_module(model))
    elif names_all_linear(config.target_modules):
        experts = [key for key, module in base_modules(model) if is_experts(module)]
        _set_targets(config, _named(tuner, config) | names_of(model, experts))
    config.target_parameters = None
    if _is_new(config):
        _say_that_experts_are_left_out(tuner, config)
    if (is_pefts or _is_new(config)) and (config.rank_pattern or config.alpha_pattern):
        _resolve_patterns(tuner, config, both=is_pefts)


def _is_new(config: MoELoraConfig) -> bool:
    """Whether an adapter is made, not loaded; the patterns of a saved one name modules alone."""
    return config._file is None and current_load() is None


def _set_targets(config: MoELoraConfig, names: Collection[str]) -> None:
    # PEFT annotates a list, but stores a set
    targets: Any = set(names)
    config.target_modules = targets


# ---- target_modules ------------------------------------------------------------------------------


def _is_plain_name(tuner: LoraModel, config: MoELoraConfig) -> bool:
    """Whether target_modules, a string, is a name as in a list, and matches no path by itself.

    PEFT reads a string as a regular expression. TRL's command line makes a string of a list with
    one name.
    """
    given = config.target_modules
    if not isinstance(given, str) or names_all_linear(given):
        return False
    named = any(_ends_with(key, given) for key, _ in base_modules(tuner.model) if key)
    return named and not targets_of(tuner, config)


def _say_that_experts_are_left_out(tuner: LoraModel, config: MoELoraConfig) -> None:
    """Warn if names that mean experts elsewhere have matched only dense layers."""
    given = config.target_modules or ()
    if isinstance(given, str) or names_all_linear(given):
        return
    elsewhere = sorted(name for name in given if last_name(name) in _OF_EXPERTS_ELSEWHERE)
    experts = [key for key, module in base_modules(tuner.model) if is_experts(module)]
    if not elsewhere or not experts:
        return
    if any(is_target(config, key) for key in experts):
        return
    logger.warning(
        "target_modules: %s name dense layers of this model, and no expert gets an adapter. Its "
        "experts are stored as one module for each layer; to adapt them too, add %s.",
        elsewhere,
        sorted({last_name(key) for key in experts}),
    )


def _named(tuner: LoraModel, config: MoELoraConfig) -> set[str]:
    """The names in target_modules, without "all-linear" and with the layers that it means.

    The layers that a regular expression matches are named by their paths.
    """
    given = config.target_modules or ()
    if isinstance(given, str) and not names_all_linear(given):
        return set(targets_of(tuner, config))
    if isinstance(given, str):
        given = [given]
    names = {name for name in given if name.lower() != ALL_LINEAR}
    if names_all_linear(config.target_modules):
        names |= _every_linear_layer(tuner.model, config)
    return names


def _every_linear_layer(model: nn.Module, config: MoELoraConfig) -> set[str]:
    """Paths of the layers that PEFT's "all-linear" means, if a LoRA on them has an effect."""
    asked = copy(config)
    asked.target_modules = ALL_LINEAR
    _maybe_include_all_linear_layers(asked, model)
    found = set()
    for path in asked.target_modules or ():
        parent, _, name = path.rpartition(".")
        if READ_NOT_CALLED.get(type(model.get_submodule(parent)).__name__) != name:
            found.add(path)
    return found


# ---- target_parameters ---------------------------------------------------------------------------


def _resolve_parameters(tuner: LoraModel, config: MoELoraConfig) -> None:
    model = tuner.model
    layouts = {key: layout_of(module) for key, module in base_modules(model) if is_experts(module)}
    found = _projections_by_parameter(model, config.target_parameters or (), layouts)
    asked = copy(config)
    asked.target_parameters = None
    _set_targets(asked, _named(tuner, asked))
    projections = {}
    for key in targets_of(tuner, asked):
        if key in layouts:
            projections[key] = config.projections_of(key, layouts[key])
    for key in found:
        if key in projections:
            raise ValueError(
                f"target_parameters names parameters of {key}, which target_modules names too; "
                "leave the experts out of target_modules, or leave target_parameters unset."
            )
    projections |= found
    _set_targets(asked, {*(asked.target_modules or ()), *names_of(model, found)})
    for key in found:
        if not is_target(asked, key):
            raise ValueError(
                f"target_parameters names parameters of {key}, but exclude_modules or "
                "modules_to_save names that module; take it out of one of them."
            )
    # a module that is a single projection ignores target_projections
    stacks = {key: names for key, names in projections.items() if len(layouts[key].projections) > 1}
    config.target_projections = one_or_by_path(stacks, list(PROJECTIONS))
    config.target_modules = asked.target_modules


def _projections_by_parameter(
    model: nn.Module, entries: Collection[str], layouts: Mapping[str, ExpertsLayout]
) -> dict[str, list[str]]:
    """Path of an experts module -> the projections whose parameters are named."""
    known = [
        _Parameter(key, weight)
        for key, layout in layouts.items()
        for weight in layout.projection_of
    ]
    named: dict[str, set[str]] = {}
    for entry in sorted(entries):
        matched = [parameter for parameter in known if _ends_with(parameter.path, entry)]
        if not matched and _is_found_otherwise(entry, entries, known):
            continue
        _check_experts_alone(model, entry, known, matched)
        for parameter in matched:
            named.setdefault(parameter.module, set()).add(parameter.name)
    found: dict[str, list[str]] = {}
    for key, names in named.items():
        layout = layouts[key]
        found[key] = []
        for projection, stored in layout.projections.items():
            missing = [weight for weight in stored.weights if weight not in names]
            if not missing:
                found[key].append(projection)
            elif len(missing) < len(stored.weights):
                raise ValueError(
                    f"target_parameters: the {projection} projection of {key} consists of "
                    f"{list(stored.weights)}, and one adapter adapts all of it; name {missing} too."
                )
    return found


def _is_found_otherwise(
    entry: str, entries: Collection[str], known: Collection[_Parameter]
) -> bool:
    """Whether another entry names what this one would name in experts with, or without, a gate.

    `to_lora_config` writes both entries, because it does not know the model.
    """
    start, dot, name = entry.rpartition(".")
    for names in STACKS_OF.values():
        if name in names:
            others = {f"{start}{dot}{other}" for other in names}
            return any(_ends_with(p.path, other) for other in others & set(entries) for p in known)
    return False


def _check_experts_alone(
    model: nn.Module, entry: str, known: Collection[_Parameter], matched: Collection[_Parameter]
) -> None:
    """Check that an entry of target_parameters names parameters of experts and no others."""
    experts = {parameter.path for parameter in known}
    for path in _paths_of_parameters(model):
        if path in experts or not _ends_with(path, entry):
            continue
        module, _, name = path.rpartition(".")
        remedy = "take it out of target_parameters"
        if name == "weight":
            remedy = f"name the layer in target_modules instead: {quoted(module)} or its last name"
        raise ValueError(
            f"target_parameters: {quoted(entry)} names {path}, which holds no projection of "
            f"experts; {remedy}."
        )
    if matched:
        return
    names = sorted({parameter.name for parameter in known})
    available = "the model has no experts modules"
    if names:
        available = f"the parameters of its experts are called {names}"
    raise ValueError(
        f"target_parameters: {quoted(entry)} matches no parameter of the model; {available}."
        f"{nearest(entry, experts)} Correct the entry, or remove it."
    )


def _paths_of_parameters(model: nn.Module) -> list[str]:
    """Paths of all parameters, as they were before adapters were added."""
    return [
        f"{key}.{name}"
        for key, module in base_modules(model)
        for name, _ in base_of(module).named_parameters(recurse=False)
    ]


def _ends_with(path: str, entry: str) -> bool:
    # as PEFT matches target_parameters: no regular expressions
    return path == entry or path.endswith(f".{entry}")


# ---- rank_pattern and alpha_pattern --------------------------------------------------------------


class _Adapted(NamedTuple):
    """What the entries of a pattern can name.

    Attributes:
        targets: paths of all targets.
        parameters: path of an experts module -> its adapted parameters.
        both: whether an entry that names a target may name a parameter as well, as in PEFT.
    """

    targets: Collection[str]
    parameters: Mapping[str, list[_Parameter]]
    both: bool

    def named_by(self, entry: str) -> bool:
        """Whether an entry names parameters of experts."""
        names_module = any(_matches(entry, path) for path in self.targets)
        if names_module and not self.both:
            return False
        return any(
            _matches(entry, parameter.path)
            for of_module in self.parameters.values()
            for parameter in of_module
        )


def _resolve_patterns(tuner: LoraModel, config: MoELoraConfig, both: bool) -> None:
    """Replace entries of rank_pattern and alpha_pattern that name parameters of experts."""
    targets = targets_of(tuner, config)
    parameters = {}
    for key, module in targets.items():
        if holds_experts(module):
            layout = layout_of(module)
            adapted = config.projections_of(key, layout)
            names = [weight for weight, of in layout.projection_of.items() if of in adapted]
            parameters[key] = [_Parameter(key, name) for name in names]
    adapted_by = _Adapted(targets, parameters, both)
    ranks = _by_module("rank_pattern", config.rank_pattern, config.r, adapted_by)
    alphas = _by_module("alpha_pattern", config.alpha_pattern, config.lora_alpha, adapted_by)
    config.rank_pattern = ranks
    config.alpha_pattern = alphas


def _by_module(
    field: str, pattern: Mapping[str, Value] | None, default: Value, adapted: _Adapted
) -> dict[str, Value]:
    """A pattern whose entries name modules alone; the given one if no entry names a parameter.

    Args:
        field: "rank_pattern" or "alpha_pattern", for the message.
        pattern: the pattern of a configuration.
        default: the value of a module that no entry matches.
        adapted: what the entries can name.
    Raises:
        ValueError: if the parameters of one module have different values.
    """
    given = dict(pattern or {})
    by_parameter = {entry for entry in given if adapted.named_by(entry)}
    if not by_parameter:
        return given
    values = {path: value_of(given, path, default) for path in adapted.targets}
    for path, parameters in adapted.parameters.items():
        found = {p.name: _value_of(given, by_parameter, p, default) for p in parameters}
        first = parameters[0].name
        if any(value != found[first] for value in found.values()):
            raise ValueError(
                f"{field} gives the parameters of {path} different values, {found}, but a module "
                "has one rank and one lora_alpha in an adapter; give all its parameters the same "
                "value, or name the module."
            )
        values[path] = found[first]
    # PEFT warns about entries that name nothing
    unmatched = {
        entry: value
        for entry, value in given.items()
        if entry not in by_parameter and not any(_matches(entry, path) for path in values)
    }
    return {**without_order(None, values, default), **unmatched}


def _value_of(
    given: Mapping[str, Value], by_parameter: Collection[str], parameter: _Parameter, default: Value
) -> Value:
    """The value of the first entry that names a parameter or its module."""
    for entry, value in given.items():
        named = entry in by_parameter and _matches(entry, parameter.path)
        if named or _matches(entry, parameter.module):
            return value
    return default


def _matches(entry: str, path: str) -> bool:
    return get_pattern_key([entry], path) == entry
