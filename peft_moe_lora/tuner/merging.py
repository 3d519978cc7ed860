"""W[e] + scaling * B[e] A[e] written into the base weights of an experts module, and removed again.

A dense weight is changed in place, one expert after the other. A quantized weight is replaced: the
updates of all merged adapters are added to the original weight, and the sum is quantized once.
"""

import logging
from collections.abc import Iterable, Iterator
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ..experts.decoding import requantized, store
from ..ops import QuantizedWeight

if TYPE_CHECKING:
    from .layer import MoELoraLayer

logger = logging.getLogger(__name__)


class ExpertWeight(NamedTuple):
    """The rows of one projection of one expert that one parameter stores.

    Attributes:
        projection: name of the projection.
        expert: index of the expert.
        rows: the indices of these rows among the projection's N rows; all N in most families.
        weight: [n, K]; a view if the parameter is dense, a decoded copy if it is quantized.
    """

    projection: str
    expert: int
    rows: slice
    weight: torch.Tensor


def delta_weight(
    layer: "MoELoraLayer", adapter_name: str, projection: str, expert: int
) -> torch.Tensor:
    """[N, K] update of one expert, in at least fp32: scaling * B[e] A[e].

    The update is zero if the adapter does not adapt the expert. The scaling of a merged adapter is
    the one with which it was merged, whatever happened to it since.
    """
    scaling = layer.merged_scaling.get(adapter_name, layer.scaling[adapter_name])
    A, B = layer.pair_per_expert(adapter_name, projection)
    dtype = torch.promote_types(A.dtype, torch.float32)
    held = layer.experts_of(adapter_name)
    if expert not in held:
        return A.new_zeros(B.shape[1], A.shape[2], dtype=dtype)
    s = held.index(expert)
    # [N, r] @ [r, K]
    return scaling * (B[s].to(dtype) @ A[s].to(dtype))


@torch.no_grad()
def merge(layer: "MoELoraLayer", adapter_name: str, safe: bool) -> None:
    """Merge one adapter that the layer has.

    Args:
        layer: the layer.
        adapter_name: the adapter.
        safe: first check that every merged weight is finite.
    Raises:
        ValueError: with `safe`, if a merged weight is not finite; if the base weights are in a
            quantized format that this package can only read.
    """
    if safe:
        _check_finite(layer, adapter_name)
    projections = layer.adapted_projections(adapter_name)
    # all merged weights are computed before one is stored: an error leaves the layer unchanged
    merged = {}
    for name in projections:
        if _quantized(layer, name) is not None:
            merged[name] = _merged_quantized(layer, adapter_name, name)
    for name, (original, weight) in merged.items():
        layer.unmerged_weights[name] = original
        _store(layer, name, weight)
    dense = [name for name in projections if name not in merged]
    for part in _expert_weights(layer, adapter_name, dense):
        delta = delta_weight(layer, adapter_name, part.projection, part.expert)
        part.weight.copy_(part.weight + delta[part.rows])
    layer.merged_adapters.append(adapter_name)
    layer.merged_scaling[adapter_name] = float(layer.scaling[adapter_name])


def check_may_unmerge(layer: BaseTunerLayer) -> None:
    """Check that a forward may unmerge a layer whose adapters are disabled.

    Raises:
        ValueError: if the layer is a replica of nn.DataParallel. Its weights are a copy, but the
            list of merged adapters is the original's: the other replicas would stay merged.
    """
    if getattr(layer, "_is_replica", False):
        raise ValueError(
            f"adapters {layer.merged_adapters} are merged and disabled, but a replica of "
            "nn.DataParallel cannot unmerge the weights of the model; call unmerge_adapter() on "
            "the model before its forward."
        )


@torch.no_grad()
def unmerge(layer: "MoELoraLayer") -> None:
    """Subtract all merged adapters again; quantized weights are restored exactly."""
    quantized = set(layer.unmerged_weights)
    for name, original in layer.unmerged_weights.items():
        _store(layer, name, original)
    layer.unmerged_weights.clear()
    layer.merge_errors.clear()
    while layer.merged_adapters:
        adapter_name = layer.merged_adapters.pop()
        projections = layer.adapted_projections(adapter_name)
        dense = [name for name in projections if name not in quantized]
        for part in _expert_weights(layer, adapter_name, dense):
            delta = delta_weight(layer, adapter_name, part.projection, part.expert)
            part.weight.copy_(part.weight - delta[part.rows])
        del layer.merged_scaling[adapter_name]


def _check_finite(layer: "MoELoraLayer", adapter_name: str) -> None:
    projections = layer.adapted_projections(adapter_name)
    for part in _expert_weights(layer, adapter_name, projections):
        delta = delta_weight(layer, adapter_name, part.projection, part.expert)
        if not torch.isfinite(part.weight + delta[part.rows]).all():
            raise ValueError(
                f"NaNs detected in the merged weights: adapter {adapter_name!r}, {part.projection} "
                f"of expert {part.expert} is not finite; nothing was merged into this layer."
            )


def _expert_weights(
    layer: "MoELoraLayer", adapter_name: str, projections: Iterable[str]
) -> Iterator[ExpertWeight]:
    """The base weights that an adapter changes in these projections."""
    for name in projections:
        first_row = 0
        for stacked in layer.layout.parts(layer.base_layer, name):
            rows = slice(first_row, first_row + stacked.shape[1])
            for expert in layer.experts_of(adapter_name):
                yield ExpertWeight(name, expert, rows, stacked.detach()[expert])
            first_row = rows.stop


# ---- quantized weights ---------------------------------------------------------------------------


def _quantized(layer: "MoELoraLayer", name: str) -> QuantizedWeight | None:
    """The base weight [E, N, K] of a projection if it is quantized, else None."""
    weight = layer.layout.parts(layer.base_layer, name)[0]
    if isinstance(weight, QuantizedWeight):
        return weight
    return None


def _merged_quantized(
    layer: "MoELoraLayer", adapter_name: str, name: str
) -> tuple[QuantizedWeight, QuantizedWeight]:
    """A quantized weight without adapters, and with this adapter and all merged adapters.

    Raises:
        ValueError: if this package can only read the format.
    """
    original = layer.unmerged_weights.get(name, _quantized(layer, name))
    assert original is not None, "the caller checked that the projection is quantized"
    together = [
        merged
        for merged in (*layer.merged_adapters, adapter_name)
        if name in layer.adapted_projections(merged)
    ]

    def update(expert: int) -> torch.Tensor:
        return reduce(torch.add, (delta_weight(layer, a, name, expert) for a in together))

    weight, error = requantized(original, update)
    layer.merge_errors[name] = error
    logger.warning(
        "merging %r into %s experts (%s): requantizing changes the merged weights by %.0f %% of "
        "the update's norm; to keep the whole update, call dequantize_experts(model) before "
        "merging.",
        adapter_name,
        original.format,
        name,
        100 * error,
    )
    return original, weight


def _store(layer: "MoELoraLayer", name: str, weight: QuantizedWeight) -> None:
    """Replace a projection's parameter by a quantized weight [E, N, K]."""
    projection = layer.layout.projection(name)
    if projection.transposed:
        weight = weight.transpose(1, 2)
    store(layer.base_layer, projection.weight, weight)
