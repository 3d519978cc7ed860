"""The modules of a model that a configuration targets, checked before the model is changed."""

from collections.abc import Collection, Iterator, Mapping

from peft import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _ExcludedModule, check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from ..config import MoELoraConfig
from ..experts.families import STACKS
from ..experts.layout import ExpertsLayout, is_experts, read_layout
from ..files.adapter_file import AdapterFile
from ..files.patterns import last_name
from ..files.peft_words import OF_TRANSFORMERS_4, names_all_linear
from ..files.text import nearest, quoted
from ..layers.layer import MoELoraLayer
from ..parallel import divided, fsdp, sharding, zero
from . import checkpoint
from .beside import Beside
from .copies import check_copies
from .loading import Load, current_load, read_with
from .moved import moved_file, renamed_file


def check(tuner: LoraModel, config: MoELoraConfig) -> None:
    """Check all targets of a new adapter, and the file that it is loaded from.

    Args:
        tuner: the tuner of the model, which is left unchanged.
        config: configuration of the new adapter.
    Raises:
        ValueError: if a target matches nothing or cannot be adapted, or if the file does not fit
            the model.
    """
    model = tuner.model
    zero.check_may_be_adapted(model)
    is_divided = divided.is_divided(model)
    if not is_divided:
        sharding.check_may_be_adapted(model)
    targeted = targets_of(tuner, config)
    _check_not_inside(targeted)
    experts = {}
    others = {}
    for key, module in targeted.items():
        r = config.rank_of(key)
        if holds_experts(module):
            layout = layout_of(module)
            if is_divided:
                divided.check_experts(model, key, base_of(module), layout)
            chosen = config.experts_of(key, layout.num_experts)
            experts[key] = checkpoint.ExpertsTarget(layout, r, chosen)
        else:
            others[key] = (base_of(module), r)
    config.check_every_entry_matches(experts)
    if is_divided:
        bases = {key: base for key, (base, _) in others.items()}
        divided.check_settings(model, config, bases)
    beside = Beside(model, config)
    fsdp.check_beside(model, beside.saved, beside.tokens)
    load = current_load()
    file = read_with(config, load)
    beside.check({key: target.layout for key, target in experts.items()}, others)
    if file is not None:
        # a module without chosen experts gets no adapter
        adapted = {key: target for key, target in experts.items() if target.chosen != ()}
        dtype = checkpoint.narrowest_dtype(model)
        targets = checkpoint.Targets(adapted, others, beside.tensors(others), dtype)
        if load is not None:
            load.check_wrappers(beside)
            load.check_is_written(model)
        checkpoint.check_file(_renamed(file, model, config, load), targets, config)
        present = [name for name, known in tuner.peft_config.items() if known is not config]
        check_copies(file, beside, targets.beside.needed, present)
    for name, other in tuner.peft_config.items():
        if isinstance(other, MoELoraConfig) and other is not config:
            beside.check_tokens_of(name, Beside(model, other))


def _renamed(
    file: AdapterFile, model: PreTrainedModel, config: MoELoraConfig, load: Load | None
) -> AdapterFile:
    """The file with the keys that its tensors have when they are loaded into this model."""
    if load is None:
        return file
    if load.by_transformers:
        return renamed_file(file, model)
    return moved_file(file, config, load.key_mapping)


def every_experts_module(model: nn.Module) -> set[str]:
    """Names that match all experts modules of the model and nothing else."""
    experts = [key for key, module in base_modules(model) if is_experts(module)]
    if not experts:
        raise ValueError(
            "target_modules=None targets every experts module, but the model has none; name "
            "the modules to adapt in target_modules."
        )
    return names_of(model, experts)


def names_of(model: nn.Module, paths: Collection[str]) -> set[str]:
    """Names that match the modules at these paths and no others: their last names, or the paths."""
    # if no other module has these last names ("experts"), they are enough, and they stay short
    # for any number of layers
    short = {last_name(path) for path in paths}
    matched = [key for key, _ in model.named_modules() if last_name(key) in short]
    if sorted(matched) == sorted(paths):
        return short
    return set(paths)


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (path, module) for the modules of the model without adapters.

    Modules inside an adapted layer are left out; an adapted experts module is replaced by its
    base module.
    """
    inside: list[str] = []
    for key, module in model.named_modules():
        if key.startswith(tuple(inside)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside.append(f"{key}.")
        if isinstance(module, MoELoraLayer):
            yield key, module.get_base_layer()
        else:
            yield key, module


def targets_of(tuner: LoraModel, config: MoELoraConfig) -> dict[str, nn.Module]:
    """Path -> module of every target of the configuration, which may be adapted already.

    Empty for "all-linear" in a divided model, which refuses it.

    Raises:
        ValueError: if an entry of target_modules matches no module. The message names the
            entry.
    """
    if names_all_linear(config.target_modules):
        return {}
    modules = {key: module for key, module in base_modules(tuner.model) if key}
    current = dict(tuner.model.named_modules())
    targets = {
        key: current[key]
        for key in modules
        if is_target(config, key) or tuner._check_tied_module_exists(config, key)
    }
    if isinstance(config.target_modules, str):
        return targets
    for entry in sorted(config.target_modules or ()):
        if not any(key == entry or key.endswith(f".{entry}") for key in modules):
            names = {last_name(key) for key, module in modules.items() if is_experts(module)}
            available = "the model has no experts modules"
            if names:
                available = f"its experts modules are called {sorted(names)}"
            hint = _hint(entry, modules)
            raise ValueError(
                f"target_modules: {quoted(entry)} matches no module of the model; {available}."
                f"{hint} Correct the entry, or remove it."
            )
    return targets


def _check_not_inside(targets: Mapping[str, nn.Module]) -> None:
    """Check that no target is a part of an experts module that is a target itself.

    Raises:
        ValueError: if one is. The message names both.
    """
    experts = [key for key, module in targets.items() if holds_experts(module)]
    for key in experts:
        parts = [other for other in targets if other.startswith(f"{key}.")]
        if parts:
            raise ValueError(
                f"target_modules matches {key} and {parts[0]} in it, but experts are adapted as "
                "one module; let target_modules match the experts module alone, or exclude its "
                "parts by exclude_modules."
            )


def _hint(entry: str, modules: Mapping[str, nn.Module]) -> str:
    """What an entry of target_modules that matches no module may mean."""
    names = sorted({last_name(key) for key, module in modules.items() if is_experts(module)})
    if not names:
        return nearest(entry, modules)
    if last_name(entry) in names:
        return f" Write {quoted(last_name(entry))}."
    if _names_parameter(entry, modules):
        return (
            " It names a parameter of experts: name it in target_parameters, or write "
            f"{quoted(names[0])} in target_modules for every projection of the experts."
        )
    if last_name(entry) in OF_TRANSFORMERS_4:
        return (
            " If it was a layer of one expert in transformers 4: transformers 5 holds all experts "
            f"in one module. Write {quoted(names[0])} in target_modules for that module, and "
            "target_projections for a part of it."
        )
    return nearest(entry, modules)


def _names_parameter(entry: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether an entry of target_modules is the name of a parameter of experts."""
    return any(
        f".{key}.{name}".endswith(f".{entry}")
        for key, module in modules.items()
        if is_experts(module)
        for name in STACKS
        if hasattr(module, name)
    )


def holds_experts(module: nn.Module) -> bool:
    """Whether a module holds experts, adapted or not."""
    return isinstance(module, MoELoraLayer) or is_experts(module)


def layout_of(module: nn.Module) -> ExpertsLayout:
    """The layout of an experts module, adapted or not."""
    if isinstance(module, MoELoraLayer):
        return module.layout
    return read_layout(module)


def base_of(module: nn.Module) -> nn.Module:
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return module


def is_target(config: MoELoraConfig, key: str) -> bool:
    """Whether the configuration targets the module at this path and does not exclude it."""
    # PEFT returns a bool, a match, None, or an object for a module that is excluded
    answer = check_target_module_exists(config, key)
    return bool(answer) and not isinstance(answer, _ExcludedModule)
