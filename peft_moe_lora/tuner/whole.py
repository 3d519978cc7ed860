"""Checks the tensors of an adapter before they are written over an earlier file."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..files.text import shown
from ..layers.layer import MoELoraLayer
from ..parallel import zero
from ..parallel.sharding import path_without_wrappers
from .frames import frames, local_of

_REMEDY = (
    "What was saved before is unchanged. If the parameters are sharded or offloaded, gather them "
    "and hand them over: save_pretrained(folder, state_dict=...)."
)
_REMEDY_OF_ZERO = (
    "What was saved before is unchanged. Call save_pretrained(folder) in every process, or set "
    "zero_optimization.stage3_gather_16bit_weights_on_model_save to true where Trainer saves."
)

# the modules whose `save_pretrained` writes an adapter
_SAVERS = ("peft.peft_model", "transformers.modeling_utils")


class _Factor(NamedTuple):
    """A or B of one layer.

    Attributes:
        start, end: what stands before and after the adapter's name in its key.
        shape: of the whole tensor, also while the parameter is sharded; None if it is not known.
    """

    start: str
    end: str
    shape: tuple[int, ...] | None


def is_written() -> bool:
    """Whether the state dict that is being made will be written by this process."""
    for frame in frames():
        module = frame.f_globals.get("__name__", "")
        if frame.f_code.co_name == "save_pretrained" and module in _SAVERS:
            return bool(local_of(frame, "is_main_process"))
    return False


def check_whole(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> None:
    """Check that every A and B of an adapter is there, whole and finite.

    Args:
        model: the model with the adapter.
        adapter_name: the adapter.
        state_dict: the tensors that are about to be written; keys as in the model.
    Raises:
        ValueError: if a tensor is missing, sharded, without values, of another shape than its layer
            gives it, or not finite.
    """
    tensors = {path_without_wrappers(key): tensor for key, tensor in state_dict.items()}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.scaling:
            for factor in _factors(path_without_wrappers(path), layer, adapter_name):
                tensor = tensors.get(f"{factor.start}.{adapter_name}{factor.end}")
                fault = _fault(tensor, factor.shape)
                if fault is not None:
                    remedy = _REMEDY
                    if zero.partitions(model):
                        remedy = _REMEDY_OF_ZERO
                    raise ValueError(
                        f"adapter {adapter_name!r} cannot be saved, because "
                        f"{shown(factor.start + factor.end)} {fault}. {remedy}"
                    )


def _fault(tensor: torch.Tensor | None, shape: tuple[int, ...] | None) -> str | None:
    """What is wrong with a tensor; None if nothing is."""
    if tensor is None:
        return "is missing in the state dict"
    if tensor.is_meta:
        return "has no values here"
    found = tuple(tensor.shape)
    needed = shape or found
    if found != needed or 0 in found:
        return f"must be {needed}, but {found} of it is here"
    if not torch.isfinite(tensor).all():
        return "holds NaN or infinity: the training has diverged, so go back to what was saved"
    return None


def _factors(path: str, layer: LoraLayer, adapter_name: str) -> Iterator[_Factor]:
    for part in layer.adapter_layer_names:
        adapters = getattr(layer, part, {})
        if adapter_name not in adapters:
            continue
        start = f"{path}.{part}".removeprefix(".")
        held = adapters[adapter_name]
        if isinstance(layer, MoELoraLayer):
            for name in layer.adapted_projections(adapter_name):
                shape = _expert_shape(layer, adapter_name, part, name)
                yield _Factor(start, f".{name}", shape)
        elif isinstance(held, nn.Linear):
            yield _Factor(start, ".weight", (held.out_features, held.in_features))
        elif isinstance(held, nn.Parameter):
            yield _Factor(start, "", None)
        else:
            yield _Factor(start, ".weight", None)


def _expert_shape(layer: MoELoraLayer, adapter_name: str, part: str, name: str) -> tuple[int, int]:
    ranks = layer.r[adapter_name] * len(layer.experts_of(adapter_name))
    projection = layer.layout.projection(name)
    if part == "lora_A":
        return (ranks, projection.in_features)
    return (projection.out_features, ranks)
