"""Layers beside experts get back, bit for bit, the weights that they had before a merge.

PEFT subtracts what an adapter gives at that moment, and each sum is rounded. Programs that merge
before each synchronization with a server do so thousands of times, and an adapter may be rescaled
or cast in between. So `merge_adapter` keeps a copy of these weights in host memory, and
`unmerge_adapter` writes it back. They are a small part of a model with experts; of the experts' own
weights `layers.remainders` keeps less.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..layers.layer import MoELoraLayer

# attribute of a layer that has something merged: a `_Kept`, which is not saved with the layer
_BEFORE = "_before_merge"


class _Kept(NamedTuple):
    """What is kept of a merged layer.

    Attributes:
        before: the weight before the first merge, in host memory.
        sums: `_sums` of the weight after the last merge; None until there was one.
    """

    before: torch.Tensor
    sums: bytes | None = None


class Merged(NamedTuple):
    """A merged layer just before it is unmerged.

    Attributes:
        layer, weight: the layer and its weight.
        largest: the weight's largest absolute value.
        is_untouched: whether the weight has the values that the last merge gave it.
    """

    layer: nn.Module
    weight: nn.Parameter
    largest: float
    is_untouched: bool


def keep(model: nn.Module) -> None:
    """Copy the weights of all layers beside experts that have nothing merged yet."""
    for layer, weight in _layers(model):
        kept = layer.__dict__.get(_BEFORE)
        if not layer.merged:
            layer.__dict__[_BEFORE] = _Kept(weight.detach().to("cpu", copy=True))
        elif kept is not None and kept.sums != _sums(weight):
            # the copy is of another weight than the one that gets a further merge
            del layer.__dict__[_BEFORE]


def note_merged(model: nn.Module) -> None:
    """Note what the merged weights are, and drop the copies of layers that have nothing merged."""
    for layer, weight in _layers(model):
        kept = layer.__dict__.pop(_BEFORE, None)
        if layer.merged and kept is not None:
            layer.__dict__[_BEFORE] = kept._replace(sums=_sums(weight))


def before_merge(layer: BaseTunerLayer) -> torch.Tensor | None:
    """The weight of a merged layer as it was before; None if it was not kept, or changed since."""
    kept = layer.__dict__.get(_BEFORE)
    base: Any = layer.get_base_layer()
    if kept is None or kept.sums != _sums(base.weight):
        return None
    return kept.before


def merged_layers(model: nn.Module) -> list[Merged]:
    """The layers whose weights were copied and are merged now."""
    return [
        Merged(
            layer,
            weight,
            weight.detach().abs().max().item(),
            layer.__dict__[_BEFORE].sums == _sums(weight),
        )
        for layer, weight in _layers(model)
        if layer.merged and _BEFORE in layer.__dict__ and weight.numel()
    ]


@torch.no_grad()
def restore(merged: list[Merged]) -> None:
    """Write the copies back into layers that PEFT has unmerged.

    If something else has changed the weight since the merge, and PEFT's result differs from the
    copy by more than rounding, PEFT's result stays.
    """
    for layer, weight, largest, is_untouched in merged:
        before = layer.__dict__.pop(_BEFORE).before.to(weight.device)
        if before.shape != weight.shape:
            continue
        largest = max(largest, before.abs().max().item())
        # the sum and the difference are rounded, and PEFT rounds the update itself; a cast in
        # between rounds too
        eps = max(torch.finfo(tensor.dtype).eps for tensor in (weight, before))
        if is_untouched or (weight - before).abs().max() <= 4 * eps * largest:
            weight.copy_(before)


def _sums(weight: torch.Tensor) -> bytes:
    """The bits of two sums over a weight, which change if any of its values does."""
    values = weight.detach()
    squares = torch.linalg.vector_norm(values, dtype=torch.float64)
    sums = torch.stack([values.sum(dtype=torch.float64), squares])
    # bits, because NaN is not equal to itself
    return sums.cpu().numpy().tobytes()


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
