"""W[e] + scaling * B[e] A[e] written into the base weights of an experts module, and removed again.

A dense weight is changed in place, one expert after the other, and restored bit for bit. A
quantized weight is replaced: the updates of all merged adapters are added to the original weight,
and the sum is quantized once.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..experts.decoding import requantized, store
from ..functional import per_expert
from ..ops import QuantizedWeight
from ..parallel import zero
from ..parallel.fsdp import is_fully_sharded, reshard
from ..parallel.sharding import anywhere, is_sharded, selected, shard_of, whole
from . import remainders
from .remainders import Remainder

if TYPE_CHECKING:
    from .layer import MoELoraLayer

logger = logging.getLogger(__name__)


class ExpertWeight(NamedTuple):
    """The block of one projection of one expert that this process stores in one parameter.

    Attributes:
        projection: name of the projection.
        expert: index of the expert.
        part: which of the projection's parameters.
        weight: [n, k], a view of the parameter.
        delta: [n, k], the adapter's update of the block, in at least fp32.
    """

    projection: str
    expert: int
    part: int
    weight: torch.Tensor
    delta: torch.Tensor

    @property
    def key(self) -> tuple[str, int, int]:
        return self.projection, self.expert, self.part


class _Update(NamedTuple):
    """The update of one projection by one adapter, with A and B as whole tensors.

    Attributes:
        A: [S, r, K].
        B: [S, N, r].
        held: ids of the S experts that have an update.
        scaling: the factor of B A.
    """

    A: torch.Tensor
    B: torch.Tensor
    held: Sequence[int]
    scaling: float

    @classmethod
    def of(cls, layer: "MoELoraLayer", adapter_name: str, projection: str) -> "_Update":
        """Every process must call this if A and B are sharded."""
        held = layer.experts_of(adapter_name)
        A, B = (whole(side) for side in layer.pair(adapter_name, projection))
        scaling = layer.merged_scaling.get(adapter_name, layer.scaling[adapter_name])
        return cls(*per_expert(A, B, len(held)), held, scaling)

    def of_expert(self, expert: int) -> torch.Tensor:
        """[N, K], in at least fp32; zeros for an expert without an update."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        if expert not in self.held:
            return self.A.new_zeros(self.B.shape[1], self.A.shape[2], dtype=dtype)
        s = self.held.index(expert)
        # [N, r] @ [r, K]
        return self.scaling * (self.B[s].to(dtype) @ self.A[s].to(dtype))


def delta_weight(
    layer: "MoELoraLayer", adapter_name: str, projection: str, expert: int
) -> torch.Tensor:
    """[N, K] update of one expert, in at least fp32: scaling * B[e] A[e].

    The update is zero if the adapter does not adapt the expert. The scaling of a merged adapter is
    the one with which it was merged, whatever happened to it since.
    """
    return _Update.of(layer, adapter_name, projection).of_expert(expert)


@torch.no_grad()
def merge(layer: "MoELoraLayer", adapter_name: str, safe: bool) -> None:
    """Merge one adapter that the layer has.

    Args:
        layer: the layer.
        adapter_name: the adapter.
        safe: first check that every merged weight is finite.
    Raises:
        ValueError: with `safe`, if a merged weight is not finite; if the base weights are in a
            quantized format that this package can only read, or quantized and sharded.
    """
    reshard(layer)
    check_codes_are_whole(layer, adapter_name)
    if safe:
        check_finite(layer, adapter_name)
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
    kept: dict[tuple[str, int, int], Remainder] = {}
    for part in _expert_weights(layer, adapter_name, dense):
        kept[part.key] = remainders.add(part.weight, part.delta)
    layer.remainders[adapter_name] = kept
    layer.merged_adapters.append(adapter_name)
    layer.merged_scaling[adapter_name] = float(layer.scaling[adapter_name])


def check_codes_are_whole(layer: "MoELoraLayer", adapter_name: str) -> None:
    """Check that this process holds all codes of the quantized weights that an adapter adapts.

    Raises:
        ValueError: if they are sharded.
    """
    # first, because DeepSpeed's ZeRO-3 leaves empty weights, which have no parts
    if not any(is_sharded(parameter) for parameter in layer.base_layer.parameters()):
        return
    projections = layer.adapted_projections(adapter_name)
    if any(_quantized(layer, name) is not None for name in projections):
        raise ValueError(
            f"adapter {adapter_name!r} cannot be merged into quantized experts that FSDP2 has "
            "sharded, because blocks of their codes are divided among processes; save the "
            "adapter, and merge it in one process."
        )


def check_may_unmerge(layer: BaseTunerLayer) -> None:
    """Check that a forward may unmerge a layer whose adapters are disabled.

    Raises:
        ValueError: if the layer is a replica of nn.DataParallel. Its weights are a copy, but the
            list of merged adapters is the original's: the other replicas would stay merged. Also
            if FSDP2 has sharded the weights.
    """
    # PEFT derives its layers from nn.Module and BaseTunerLayer
    check_shards_are_unmerged(cast(nn.Module, layer))
    if getattr(layer, "_is_replica", False):
        raise ValueError(
            f"adapters {layer.merged_adapters} are merged and disabled, but a replica of "
            "nn.DataParallel cannot unmerge the weights of the model; call unmerge_adapter() on "
            "the model before its forward."
        )


def check_shards_are_unmerged(module: nn.Module) -> None:
    """Check that nothing is merged into weights that a forward cannot unmerge.

    Args:
        module: an adapted layer, or a model.
    Raises:
        ValueError: if an adapter is merged and FSDP2 or ZeRO-3 has sharded the weights. A forward
            works with gathered weights, and what it writes into them is lost.
    """
    merged: set[str] = set()
    for layer in module.modules():
        if isinstance(layer, BaseTunerLayer):
            merged.update(layer.merged_adapters)
    if merged and (is_fully_sharded(module) or zero.partitions(module)):
        raise ValueError(
            f"adapters {sorted(merged)} are merged into weights that FSDP2 or ZeRO-3 has sharded, "
            "so a forward without adapters cannot unmerge them; call unmerge_adapter() on the "
            "model in every process first."
        )


@torch.no_grad()
def unmerge(layer: "MoELoraLayer") -> None:
    """Subtract all merged adapters again; the weights are what they were, bit for bit."""
    reshard(layer)
    quantized = set(layer.unmerged_weights)
    for name, original in layer.unmerged_weights.items():
        _store(layer, name, original)
    layer.unmerged_weights.clear()
    layer.merge_errors.clear()
    while layer.merged_adapters:
        adapter_name = layer.merged_adapters.pop()
        projections = layer.adapted_projections(adapter_name)
        dense = [name for name in projections if name not in quantized]
        kept = layer.remainders.pop(adapter_name)
        for part in _expert_weights(layer, adapter_name, dense):
            remainders.subtract(part.weight, part.delta, kept[part.key])
        del layer.merged_scaling[adapter_name]


def check_finite(layer: "MoELoraLayer", adapter_name: str) -> None:
    """Check that merging one adapter gives finite weights; every process must call this.

    Raises:
        ValueError: if a merged weight is not finite.
    """
    wrong = [
        f"{part.projection} of expert {part.expert}"
        for part in _expert_weights(layer, adapter_name, layer.adapted_projections(adapter_name))
        if not torch.isfinite(part.weight + part.delta).all()
    ]
    if anywhere(bool(wrong), layer.weight):
        where = "a weight in another process"
        if wrong:
            where = wrong[0]
        raise ValueError(
            f"NaNs detected in the merged weights: adapter {adapter_name!r}, {where} is not "
            "finite; nothing was merged into this layer."
        )


def _expert_weights(
    layer: "MoELoraLayer", adapter_name: str, projections: Iterable[str]
) -> Iterator[ExpertWeight]:
    """The blocks of the base weights that this process stores and an adapter changes.

    Every process must iterate to the end if the weights are sharded.
    """
    for name in projections:
        update = _Update.of(layer, adapter_name, name)
        first_row = 0
        for part, stacked in enumerate(layer.layout.parts(layer.base_layer, name)):
            local, (here, rows, columns) = shard_of(stacked.detach())
            ids = list(range(local.shape[0]))
            if here is not None:
                ids = here.tolist()
            n = stacked.shape[1]
            for entry, expert in enumerate(ids):
                if expert in update.held:
                    delta = update.of_expert(expert)[first_row : first_row + n]
                    block = selected(selected(delta, 0, rows), 1, columns)
                    yield ExpertWeight(name, expert, part, local[entry], block)
            first_row += n


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
