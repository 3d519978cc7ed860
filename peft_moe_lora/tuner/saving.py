"""What is saved with an adapter: a description for its file, and patterns that mean what it does.

The layers of the model decide, not the configuration: a file describes the adapter that was
trained, whatever was written into the configuration since.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ..config import MoELoraConfig
from ..experts.layout import PROJECTIONS, is_experts
from ..files.adapter_file import PEFT_PREFIX, Trained, described, described_module
from ..files.patterns import value_of, without_order
from ..files.scaling import alpha_of, is_same, scaling_of
from ..layers.layer import MoELoraLayer
from ..layers.router import MoELoraRouter
from ..parallel import zero
from ..parallel.sharding import CHECKPOINT_WRAPPER, is_sharded, path_without_wrappers, whole
from . import restoring
from .ties import called

logger = logging.getLogger(__name__)


def adapted(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    """Yield (path, layer) of every layer that an adapter adapts: experts, routers and others.

    The path does not contain the prefixes that PEFT and wrappers add.
    """
    for key, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.scaling:
            yield base_path(key), module


def base_path(key: str) -> str:
    """A module's path in the base model."""
    return path_without_wrappers(key).removeprefix(PEFT_PREFIX)


def describe(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """The metadata of an adapter file.

    They hold the format version and the layout; E of every adapted experts module, r, K and N of
    each of its adapted projections; the paths of adapted routers; rank and scaling of every adapted
    projection and of every other adapted layer.
    """
    modules = {}
    routers = []
    trained = {}
    for path, layer in adapted(model, adapter_name):
        # PEFT's prepare_model_for_compiled_hotswap makes tensors of the scalings
        numbers = Trained(layer.r[adapter_name], float(layer.scaling[adapter_name]))
        if not isinstance(layer, MoELoraLayer):
            trained[path] = numbers
            if isinstance(layer, MoELoraRouter):
                routers.append(path)
            continue
        modules[path] = _describe_experts(layer, adapter_name)
        for name in layer.adapted_projections(adapter_name):
            trained[f"{path}.{name}"] = numbers
    return described(modules, routers, trained)


def _describe_experts(layer: MoELoraLayer, adapter_name: str) -> dict[str, Any]:
    description = described_module(layer.layout.num_experts, layer.experts[adapter_name])
    for name in layer.adapted_projections(adapter_name):
        projection = layer.layout.projection(name)
        description[name] = {
            "r": layer.r[adapter_name],
            "in_features": projection.in_features,
            "out_features": projection.out_features,
        }
    return description


def patterns(config: MoELoraConfig, model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """Fields of an adapter's configuration that give the same adapter when it is loaded.

    If the order of the keys of a pattern counts, or if a layer has another rank, lora_alpha or
    scaling than the configuration gives it, the field has one entry for each layer. A scaling
    that `set_scale` or `scale_layer` changed becomes lora_alpha.
    """
    ranks = {}
    alphas = {}
    chosen = {}
    projections = {}
    rescaled = []
    for path, layer in adapted(model, adapter_name):
        r = layer.r[adapter_name]
        alpha = layer.lora_alpha[adapter_name]
        scaling = float(layer.scaling[adapter_name])
        if not is_same(scaling, scaling_of(alpha, r, config.use_rslora)):
            rescaled.append(path)
            alpha = alpha_of(scaling, r, config.use_rslora)
        ranks[path] = r
        alphas[path] = alpha
        if isinstance(layer, MoELoraLayer):
            chosen[path] = list(layer.experts_of(adapter_name))
            if len(layer.layout.projections) > 1:
                projections[path] = layer.adapted_projections(adapter_name)
    if rescaled:
        logger.warning(
            "adapter %r is saved with its current scaling, which is not lora_alpha / r of its "
            "configuration in %d layers; the first is %s. lora_alpha of the saved configuration "
            "gives this scaling.",
            adapter_name,
            len(rescaled),
            rescaled[0],
        )
    fields: dict[str, Any] = {
        "rank_pattern": without_order(config.rank_pattern, ranks, config.r),
        "alpha_pattern": without_order(config.alpha_pattern, alphas, config.lora_alpha),
    }
    if config.expert_indices is not None:
        for path in _experts_without(config, model):
            chosen[path] = []
        fields["expert_indices"] = without_order(config.expert_indices, chosen, [])
    if isinstance(config.target_projections, dict):
        fields["target_projections"] = without_order(
            config.target_projections, projections, list(PROJECTIONS)
        ) or list(PROJECTIONS)
    return fields


def _experts_without(config: MoELoraConfig, model: nn.Module) -> list[str]:
    """Paths of the experts modules of which expert_indices chooses no expert."""
    paths = []
    for key, module in model.named_modules():
        if not isinstance(module, MoELoraLayer):
            parent, _, _ = key.rpartition(".")
            is_wrapped = isinstance(model.get_submodule(parent), MoELoraLayer)
            if is_wrapped or not is_experts(module):
                continue
        path = base_path(key)
        if not value_of(config.expert_indices, path, []):
            paths.append(path)
    return paths


def keyed_by_path(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A model's state dict with the paths of its modules in the keys, checkpoint wrappers included.

    PEFT looks for the tensors of a layer under the layer's path, but a checkpoint wrapper removes
    its own name from the keys of a state dict.
    """
    wrapped = {
        path.replace(CHECKPOINT_WRAPPER, ""): path
        for path, _ in model.named_modules()
        if CHECKPOINT_WRAPPER in path
    }
    keyed = {}
    for key, tensor in state_dict.items():
        path, _, name = key.rpartition(".")
        if path in wrapped:
            key = f"{wrapped[path]}.{name}"
        keyed[key] = tensor
    return keyed


def add_keys_of_wrapped(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Add, in place, what PEFT takes beside A and B, under the keys where PEFT looks for it.

    These keys have the names of checkpoint wrappers, which a state dict leaves out.
    """
    starts = _beside(model)
    for key, tensor in keyed_by_path(model, state_dict).items():
        if CHECKPOINT_WRAPPER in key and key.startswith(starts):
            state_dict[key] = tensor


def gather_beside(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Gather, in place, what PEFT will take out of a state dict beside A and B.

    These are modules that are trained whole, tokens, and the embedding and the head.

    Every process must call this if a tensor is sharded.

    Args:
        model: the model with the adapter.
        state_dict: keys as in the model.
    """
    starts = _beside(model)
    for key, tensor in state_dict.items():
        if key.startswith(starts) and ".original_module." not in key and is_sharded(tensor):
            state_dict[key] = whole(tensor).cpu()


def take_out_merged(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Replace, in place, embeddings that something is merged into by what they were before.

    PEFT saves copies of adapted embeddings and heads, and loads them into the base, where an update
    that they contain would come on top of the adapter's.

    Raises:
        ValueError: if nothing has kept what a weight was before.
    """
    starts = _beside(model)
    for path, layer in model.named_modules():
        key = f"{path}.base_layer.weight"
        if not isinstance(layer, BaseTunerLayer) or not layer.merged:
            continue
        if not key.startswith(starts) or key not in state_dict:
            continue
        before = restoring.before_merge(layer)
        if before is None:
            raise ValueError(
                f"adapters {layer.merged_adapters} are merged into {base_path(path)}, of which the "
                "file gets a copy; call model.unmerge_adapter() before saving."
            )
        state_dict[key] = before


def fill_with_whole(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> None:
    """Replace, in place, the empty tensors that ZeRO-3 leaves in a model's state dict.

    Those of frozen weights, of which PEFT takes none, stay as they are. Every process must call
    this if ZeRO-3 manages the model and the state dict is the model's own.
    """
    starts = _beside(model)
    for name, parameter in model.named_parameters():
        if not zero.is_partitioned(parameter) or name not in state_dict:
            continue
        saved = parameter.requires_grad or ".lora_" in name or name.startswith(starts)
        if saved and not state_dict[name].numel():
            state_dict[name] = zero.whole(parameter)


def _beside(model: nn.Module) -> tuple[str, ...]:
    """What the keys of tensors begin with that PEFT may save beside A and B."""
    ends = [called(model, "get_input_embeddings"), called(model, "get_output_embeddings")]
    return tuple(
        f"{path}."
        for path, module in model.named_modules()
        if isinstance(module, AuxiliaryTrainingWrapper) or module in ends
    )


def gathered(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict with whole tensors in place of sharded ones, and keys without wrappers.

    Whole tensors that were gathered are on the CPU.

    Every process must call this if a tensor is sharded.
    """
    return {
        key.replace(CHECKPOINT_WRAPPER, ""): whole(tensor).cpu() if is_sharded(tensor) else tensor
        for key, tensor in state_dict.items()
    }
