"""What a base model's config says of its experts: an empty model is built from it, and its modules are read.

No weight is loaded. What the config's model class is called on the hub, and what its per-expert tensors were called
there before transformers 5 stacked them, stands in the table below.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ..experts.layout import ExpertsLayout, is_experts, read_layout
from ..experts.routers import is_router, linear_features
from ..experts.stored import UnsupportedExperts
from ..files.tensor_file import AdapterError, RefusedError


@dataclass(frozen=True)
class HubNames:
    """Names of experts in a family's published checkpoints.

    Attributes:
        gate, up, down: the projections of one expert.
        block: what holds experts and router, "mlp" in transformers 5.
        router: what transformers 5 calls the block's "gate".
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    block: str = "mlp"
    router: str = "gate"

    def to_hub(self, key: str) -> str:
        """A key with transformers' names in the hub's; dense layers' "mlp" stays."""
        return self._rename(key, ("mlp", self.router), (self.block, "gate"))

    def from_hub(self, key: str) -> str:
        return self._rename(key, (self.block, "gate"), ("mlp", self.router))

    @staticmethod
    def _rename(key: str, old: tuple[str, str], new: tuple[str, str]) -> str:
        if old == new:
            return key
        return re.sub(
            rf"\.{old[0]}\.(experts|shared_experts|{old[1]})\b",
            lambda match: f".{new[0]}.{new[1] if match[1] == old[1] else match[1]}",
            key,
        )


_PLAIN = HubNames()
_NUMBERED = HubNames("w1", "w3", "w2")
_BLOCK_SPARSE = HubNames("w1", "w3", "w2", "block_sparse_moe")

# model types whose published checkpoints have names of their own
HUB_NAMES = {
    "deepseek_v4": _NUMBERED,
    "kimi_linear": _BLOCK_SPARSE,
    "lfm2_moe": _NUMBERED,
    "minimax": _BLOCK_SPARSE,
    "minimax_m2": _BLOCK_SPARSE,
    "minimax_m3_vl": _BLOCK_SPARSE,
    "mistral_large4_text": _NUMBERED,
    "mixtral": _BLOCK_SPARSE,
    "phimoe": HubNames("w1", "w3", "w2", "block_sparse_moe", "router"),
}

# what stands before "layers.0" where a text model is, or is not, part of a larger one
_TEXT_PREFIX = re.compile(
    r"^(?:model\.language_model\.|language_model\.model\.|model\.text_model\.|model\.)"
)


@dataclass(frozen=True)
class BaseModel:
    """What conversions need of a base model.

    Attributes:
        name: what was asked for, for messages.
        model_type: of the config.
        experts: path -> layout of every routed experts module.
        interleaved: path -> whether the rows of its gate_up projection alternate (gate, up); None: not known.
        linears: path -> (in_features, out_features) of every linear layer and embedding.
        bare: those of them that are routers, and so no linear layers to PEFT.
        modules: every path.
        renamings: transformers' own, from names on the hub to module paths.
    """

    name: str
    model_type: str
    experts: Mapping[str, ExpertsLayout]
    interleaved: Mapping[str, bool | None]
    linears: Mapping[str, tuple[int, int]]
    bare: frozenset[str]
    modules: frozenset[str] = field(repr=False)
    renamings: tuple = field(default=(), repr=False)

    @property
    def hub_names(self) -> HubNames:
        return HUB_NAMES.get(self.model_type, _PLAIN)

    def resolve(self, path: str) -> str:
        """The base's own path for a path as an adapter or checkpoint has it; unchanged where there is none.

        Old names on the hub are replaced, and "model.layers" meets "model.language_model.layers", either way.
        """
        path = self.hub_names.from_hub(path)
        if path in self.modules:
            return path
        # a renaming may ask for the end of a tensor's name
        renamed = self.renamed(f"{path}.weight").removesuffix(".weight")
        if renamed in self.modules:
            return renamed
        found = self._by_stem().get(_TEXT_PREFIX.sub("", path), ())
        return found[0] if len(found) == 1 else path

    def renamed(self, name: str) -> str:
        """A checkpoint tensor's name after transformers' renamings."""
        return rename_source_key(name, list(self.renamings), [])[0]

    def _by_stem(self) -> dict[str, list[str]]:
        if "_stems" not in self.__dict__:
            stems: dict[str, list[str]] = {}
            for path in self.modules:
                stems.setdefault(_TEXT_PREFIX.sub("", path), []).append(path)
            object.__setattr__(self, "_stems", stems)
        return self.__dict__["_stems"]

    def gate_and_up(self, path: str) -> tuple[slice, slice]:
        """The rows of gate and of up in a gate_up projection of N = 2I rows.

        Raises:
            RefusedError: if the module does not say how they lie.
        """
        width = self.experts[path].down.in_features
        if self.interleaved[path] is None:
            raise RefusedError(
                f"{path} of {self.name} does not say whether its gate_up rows are [gate; up] or alternate, so they "
                "cannot be split; keep the projection whole (peft, vllm_3d)."
            )
        return (
            (slice(0, None, 2), slice(1, None, 2))
            if self.interleaved[path]
            else (slice(width), slice(width, None))
        )


def read_base(base_config) -> BaseModel:
    """The facts of a base model.

    Args:
        base_config: a folder with a config.json, such a file, a name on the hub, a config, or the dict of one.
    Raises:
        AdapterError: if there is no such config, or no model class for it.
        RefusedError: if it has no routed experts that an adapter can ride on.
    """
    if isinstance(base_config, BaseModel):
        return base_config
    name, config = _config(base_config)
    try:
        with torch.device("meta"):
            model = _model_class(config)(config)
    except Exception as error:  # whatever a model class makes of a config that is not its own
        raise AdapterError(f"{name}: no model can be built from its config ({error}).") from error
    return describe_base(model, name, config.model_type)


def describe_base(model: nn.Module, name: str, model_type: str) -> BaseModel:
    """The facts of a model at hand; its weights are not read.

    Raises:
        RefusedError: if it has no routed experts that an adapter can ride on.
    """
    experts = {path: module for path, module in model.named_modules() if is_experts(module)}
    if not experts:
        raise RefusedError(
            f"{name} ({model_type}) has no routed experts; is this the right base model?"
        )
    try:
        layouts = {path: read_layout(module) for path, module in experts.items()}
    except UnsupportedExperts as error:
        raise RefusedError(f"{name}: {error}") from error
    return BaseModel(
        name=name,
        model_type=model_type,
        experts=layouts,
        interleaved={path: _interleaved(experts[path], layout) for path, layout in layouts.items()},
        linears={
            path: k_n
            for path, module in model.named_modules()
            if (k_n := linear_features(module)) is not None
        },
        bare=frozenset(
            path
            for path, module in model.named_modules()
            if path and is_router(module, model.get_submodule(path.rpartition(".")[0]))
        ),
        modules=frozenset(path for path, _ in model.named_modules()),
        renamings=_renamings(model),
    )


def _renamings(model: nn.Module) -> tuple:
    if not isinstance(model, PreTrainedModel):
        return ()
    return tuple(c for c in get_model_conversion_mapping(model) if isinstance(c, WeightRenaming))


def _config(base_config) -> tuple[str, PreTrainedConfig]:
    if isinstance(base_config, PreTrainedConfig):
        return base_config.name_or_path or base_config.model_type, base_config
    try:
        if isinstance(base_config, dict):
            return str(base_config.get("model_type")), AutoConfig.for_model(**base_config)
        path = Path(base_config)
        name = path.parent if path.name == "config.json" else base_config
        return str(name), AutoConfig.from_pretrained(str(name))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(
            f"{base_config!r} gives no model config ({error}); name a folder with a config.json, or a hub model."
        ) from error


def _model_class(config: PreTrainedConfig):
    """The class whose module paths a saved adapter has: the one the config names, else a causal language model."""
    named = getattr(transformers, (getattr(config, "architectures", None) or ["-"])[0], None)
    return named or (lambda c: AutoModelForCausalLM.from_config(c))


def _interleaved(module: nn.Module, layout: ExpertsLayout) -> bool | None:
    if hasattr(module, "is_concatenated"):
        return not module.is_concatenated
    return None if layout.activation is None else layout.activation.interleaved
