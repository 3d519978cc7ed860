"""Layers beside experts get back, bit for bit, the weights that they had before a merge.

PEFT subtracts a merged update again, and each sum is rounded. Programs that merge before each
synchronization with a server do so thousands of times. So `merge_adapter` keeps a copy of these
weights in host memory, and `unmerge_adapter` writes it back. They are a small part of a model with
experts; of the experts' own weights `layers.remainders` keeps less.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..layers.layer import MoELoraLayer

# attribute of a layer; a plain tensor, which is neither saved nor moved with the layer
_BEFORE = "_before_merge"


class Merged(NamedTuple):
    """A merged layer, its weight, and the weight's largest absolute value."""

    layer: nn.Module
    weight: nn.Parameter
    largest: float


def keep(model: nn.Module) -> None:
    """Copy the weights of all layers beside experts that have nothing merged yet."""
    for layer, weight in _layers(model):
        if not layer.merged:
            layer.__dict__[_BEFORE] = weight.detach().to("cpu", copy=True)


def drop_unmerged(model: nn.Module) -> None:
    """Drop the copies of layers that have nothing merged."""
    for layer, _ in _layers(model):
        if not layer.merged:
            layer.__dict__.pop(_BEFORE, None)


def merged_layers(model: nn.Module) -> list[Merged]:
    """The layers whose weights were copied and are merged now."""
    return [
        Merged(layer, weight, weight.detach().abs().max().item())
        for layer, weight in _layers(model)
        if layer.merged and _BEFORE in layer.__dict__ and weight.numel()
    ]


@torch.no_grad()
def restore(merged: list[Merged]) -> None:
    """Write the copies back into layers that PEFT has unmerged.

    Where PEFT's result differs by more than rounding, something else has changed the weight since,
    and PEFT's result stays.
    """
    for layer, weight, largest in merged:
        before = layer.__dict__.pop(_BEFORE).to(weight.device)
        largest = max(largest, before.abs().max().item())
        # the sum and the difference are rounded, and PEFT rounds the update itself
        rounding = 4 * torch.finfo(weight.dtype).eps * largest
        if before.shape == weight.shape and (weight - before).abs().max() <= rounding:
            weight.copy_(before)


def _layers(model: nn.Module) -> Iterator[tuple[Any, nn.Parameter]]:
    """The adapted layers beside experts whose weight is dense and whole, with the weight."""
    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer) or isinstance(layer, MoELoraLayer):
            continue
        weight = getattr(layer.get_base_layer(), "weight", None)
        if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
            continue
        if weight.is_floating_point() and not weight.is_meta:
            yield layer, weight
