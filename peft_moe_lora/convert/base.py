"""The facts of a base model that a conversion needs, read from its config.

The model is built on the meta device and its modules are read. No weight is loaded.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ..experts.families import (
    HUB_NAMES,
    OTHER_BLOCKS,
    OTHER_NAMES,
    TEXT_PREFIX,
    HubNames,
)
from ..experts.layout import ExpertsLayout, is_experts, read_layout
from ..experts.routers import is_router, linear_features
from ..experts.stored import UnsupportedExperts
from ..files.tensor_file import AdapterError, FilePath, RefusedError, check_file
from ..files.text import is_plain, quoted, shown

# errors that a model class may raise if the config belongs to another class
_BUILDING_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class BaseModel:
    """The facts of a base model.

    Attributes:
        name: name or folder of the model, for messages.
        model_type: model_type of the config.
        architecture: name of the model's class, as its config says it.
        experts: path -> layout of every routed experts module.
        interleaved: path of an experts module -> whether the rows of gate_up alternate (gate, up,
            gate, ...); None if this is not known.
        linears: path -> (in_features, out_features) of every linear layer, embedding and router.
        routers: the paths in `linears` that are routers, which PEFT does not count as linear
            layers.
        modules: the paths of all modules.
        tensors: name -> shape of every parameter and buffer that is saved.
        embeddings: the path of the input embedding, and then that of the head, if there is one.
        tied: the names in `tensors` that are one and the same parameter as the input embedding's
            weight, that one included; empty if nothing is tied to it.
        heads: numbers of the query heads and of the key heads; 0 if the config has none.
        renamings: transformers' renamings of published tensor names to module paths.
    """

    name: str
    model_type: str
    architecture: str
    experts: Mapping[str, ExpertsLayout]
    interleaved: Mapping[str, bool | None]
    linears: Mapping[str, tuple[int, int]]
    routers: frozenset[str]
    modules: frozenset[str] = field(repr=False)
    tensors: Mapping[str, tuple[int, ...]] = field(repr=False)
    embeddings: tuple[str, ...] = ()
    tied: frozenset[str] = frozenset()
    heads: tuple[int, int] = (0, 0)
    renamings: tuple[WeightRenaming, ...] = field(default=(), repr=False)

    @property
    def hub_names(self) -> HubNames:
        return HUB_NAMES.get(self.model_type, HubNames())

    def resolve(self, path: str) -> str:
        """The base model's own path for a path in an adapter or a checkpoint.

        Published names are replaced by transformers' names. "model.layers" also finds
        "model.language_model.layers", and the other way round. A path that is not found is
        returned unchanged.
        """
        path = self.hub_names.from_hub(path)
        path = OTHER_NAMES.get(path, path)
        if path in self.modules:
            return path
        # some renamings match the end of a tensor's name, so the path gets such an end
        renamed = self.renamed(f"{path}.weight").removesuffix(".weight")
        if renamed in self.modules:
            return renamed
        found = self._paths_of_stem.get(TEXT_PREFIX.sub("", path), [])
        if len(found) == 1:
            return found[0]
        for other, block in OTHER_BLOCKS.items():
            if path.replace(other, block) in self.modules:
                return path.replace(other, block)
        return path

    def renamed(self, name: str) -> str:
        """A checkpoint tensor's name after transformers' renamings."""
        return rename_source_key(name, list(self.renamings), [])[0]

    @cached_property
    def _paths_of_stem(self) -> dict[str, list[str]]:
        """Path without the text model's prefix -> the full paths that end in it."""
        stems: dict[str, list[str]] = {}
        for path in self.modules:
            stems.setdefault(TEXT_PREFIX.sub("", path), []).append(path)
        return stems

    def gate_and_up(self, path: str) -> tuple[slice, slice]:
        """The rows of gate and the rows of up in a gate_up projection of N = 2I rows.

        Raises:
            RefusedError: if the order of the rows is not known.
        """
        interleaved = self.interleaved[path]
        if interleaved is None:
            raise RefusedError(
                f"{path} of {self.name} does not say whether its gate_up rows are [gate; up] or "
                "alternate, so they cannot be split. Convert to a format that keeps gate_up in one "
                "piece (peft, vllm_3d)."
            )
        if interleaved:
            return slice(0, None, 2), slice(1, None, 2)
        width = self.experts[path].down.in_features
        return slice(width), slice(width, None)


# a base model: its facts, its folder, config file or name on the hub, or its config
BaseConfig = BaseModel | PreTrainedConfig | dict[str, Any] | FilePath


def need_base(base: BaseModel | None, why: str) -> BaseModel:
    """The base model's facts.

    Raises:
        RefusedError: if the base model is not known. The message begins with `why` it is needed.
    """
    if base is None:
        raise RefusedError(f"{why}; name the base model (base_config, --base-config).")
    return base


def read_base(base_config: BaseConfig) -> BaseModel:
    """The facts of a base model.

    Args:
        base_config: a folder with a config.json, the path of such a file, a name on the hub, a
            config, or a config as a dict.
    Raises:
        AdapterError: if there is no such config, or no model can be built from it.
        RefusedError: if the model has no routed experts that an adapter can be added to.
    """
    if isinstance(base_config, BaseModel):
        return base_config
    name, config = _read_config(base_config)
    try:
        with torch.device("meta"):
            model = _model_builder(config)(config)
    except _BUILDING_ERRORS as error:
        raise AdapterError(
            f"{name}: no model can be built from its config ({shown(error)})."
        ) from error
    return describe_base(model, name, config)


def describe_base(model: nn.Module, name: str, config: PreTrainedConfig | None = None) -> BaseModel:
    """The facts of a model that is built already; its weights are not read.

    Args:
        model: the model.
        name: its name, for messages.
        config: its config, if it has one.
    Raises:
        RefusedError: if the model has no routed experts that an adapter can be added to.
    """
    modules = dict(model.named_modules())
    experts = {path: module for path, module in modules.items() if is_experts(module)}
    model_type = getattr(config, "model_type", "")
    if not experts:
        raise RefusedError(
            f"{name} ({model_type}) has no routed experts; name the base model that the adapter "
            "was trained on."
        )
    try:
        layouts = {path: read_layout(module) for path, module in experts.items()}
    except UnsupportedExperts as error:
        raise RefusedError(f"{name}: {error}") from error
    linears = {}
    for path, module in modules.items():
        features = linear_features(module)
        if features is not None:
            linears[path] = features
    routers = frozenset(
        path
        for path, module in modules.items()
        if path and is_router(module, modules[path.rpartition(".")[0]])
    )
    return BaseModel(
        name=name,
        model_type=model_type,
        architecture=_architecture(model, config),
        experts=layouts,
        interleaved={path: _interleaved(experts[path], layout) for path, layout in layouts.items()},
        linears=linears,
        routers=routers,
        modules=frozenset(modules),
        tensors={key: tuple(tensor.shape) for key, tensor in _tensors(model)},
        embeddings=_embeddings(model),
        tied=_tied(model),
        heads=_heads(config),
        renamings=_renamings(model),
    )


def _architecture(model: nn.Module, config: PreTrainedConfig | None) -> str:
    """The class that the config names, if it names one; else the class of the model."""
    named = getattr(config, "architectures", None)
    if isinstance(named, list | tuple) and named:
        first = named[0]
        # the name is printed, and a config may hold any text
        if isinstance(first, str) and first.isidentifier() and is_plain(first):
            return first
    return type(model).__name__


def _heads(config: PreTrainedConfig | None) -> tuple[int, int]:
    """The numbers of the query heads and of the key heads."""
    heads = getattr(config, "num_attention_heads", 0)
    return heads, getattr(config, "num_key_value_heads", heads)


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) of all tensors that are saved; a shared one under each of its names."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor):
            yield name, tensor


def _embeddings(model: nn.Module) -> tuple[str, ...]:
    """The path of the input embedding, and then that of the head."""
    if not isinstance(model, PreTrainedModel):
        return ()
    found = []
    for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
        found += [path for path, module in model.named_modules() if module is embedding]
    return tuple(found)


def _tied(model: nn.Module) -> frozenset[str]:
    """The names of the parameter that the input embedding shares with other modules."""
    if not isinstance(model, PreTrainedModel):
        return frozenset()
    weight = getattr(model.get_input_embeddings(), "weight", None)
    named = model.named_parameters(remove_duplicate=False)
    names = frozenset(name for name, parameter in named if parameter is weight)
    if len(names) < 2:
        return frozenset()
    return names


def _renamings(model: nn.Module) -> tuple[WeightRenaming, ...]:
    if not isinstance(model, PreTrainedModel):
        return ()
    mapping = get_model_conversion_mapping(model)
    return tuple(step for step in mapping if isinstance(step, WeightRenaming))


def _read_config(
    base_config: PreTrainedConfig | dict[str, Any] | FilePath,
) -> tuple[str, PreTrainedConfig]:
    """The base model's name for messages, and its config."""
    if isinstance(base_config, PreTrainedConfig):
        return base_config.name_or_path or base_config.model_type, base_config
    try:
        if isinstance(base_config, dict):
            return str(base_config.get("model_type")), AutoConfig.for_model(**base_config)
        name = str(base_config)
        path = Path(base_config)
        if path.name == "config.json":
            name = str(path.parent)
        check_file(Path(name, "config.json"))
        return name, AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"no model config can be read from {quoted(base_config)} ({shown(error)}). Name a "
            "folder with a config.json, or a model on the hub."
        ) from error


def _model_builder(config: PreTrainedConfig) -> Callable[[PreTrainedConfig], nn.Module]:
    """The function that builds the base model from its config.

    A saved adapter uses the module paths of the class that the config names. If the config names no
    class, it is the causal language model of its type.
    """
    architectures = getattr(config, "architectures", None)
    if architectures:
        named = getattr(transformers, architectures[0], None)
        if named is not None:
            return named
    return AutoModelForCausalLM.from_config


def _interleaved(module: nn.Module, layout: ExpertsLayout) -> bool | None:
    """Whether the rows of gate_up alternate, from `is_concatenated` or else from the activation."""
    if hasattr(module, "is_concatenated"):
        return not module.is_concatenated
    if layout.activation is None:
        return None
    return layout.activation.interleaved
