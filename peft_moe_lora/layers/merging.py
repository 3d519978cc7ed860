"""W[e] + scaling * B[e] A[e] written into the base weights of an experts module, and removed again.

A dense weight is changed in place, one expert after the other, and restored bit for bit. A
quantized weight is replaced: the updates of all merged adapters are added to the original weight,
and the sum is quantized once.

A merged adapter may be loaded again, cast or rescaled before it is unmerged. So what was merged is
kept with the layer.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..experts.decoding import check_is_written, requantized, store
from ..experts.stored import Weight
from ..functional import per_expert, without_autocast
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


class Update(NamedTuple):
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
    def of(cls, layer: "MoELoraLayer", adapter_name: str, projection: str) -> "Update":
        """The update that the adapter gives now. Every process must call this if A is sharded."""
        held = layer.experts_of(adapter_name)
        lora_A, lora_B = layer.pair(adapter_name, projection)
        A, B = per_expert(whole(lora_A), whole(lora_B), len(held))
        # contiguous, so that a copy of it gives the same bits
        return cls(A.contiguous(), B.contiguous(), held, float(layer.scaling[adapter_name]))

    def of_expert(self, expert: int) -> torch.Tensor:
        """[N, K], in at least fp32; zeros for an expert without an update."""
        dtype = torch.promote_types(self.A.dtype, torch.float32)
        if expert not in self.held:
            return self.A.new_zeros(self.B.shape[1], self.A.shape[2], dtype=dtype)
        s = self.held.index(expert)
        with without_autocast(self.A.device.type):
            # [N, r] @ [r, K]
            return self.scaling * (self.B[s].to(dtype) @ self.A[s].to(dtype))

    def copied(self, experts: Collection[int]) -> "Update":
        """A copy in host memory, of these experts alone."""
        places = [s for s, expert in enumerate(self.held) if expert in experts]
        A, B = (side.detach()[places].cpu() for side in (self.A, self.B))
        return Update(A, B, [self.held[s] for s in places], self.scaling)

    def to(self, device: torch.device) -> "Update":
        return self._replace(A=self.A.to(device), B=self.B.to(device))


# projection -> its update by one adapter
Updates = Mapping[str, Update]


class Merged(NamedTuple):
    """What is kept of a merged adapter, in host memory.

    Attributes:
        updates: what was merged.
        remainders: (projection, expert, parameter) -> what subtracting it does not restore.
    """

    updates: Updates
    remainders: Mapping[tuple[str, int, int], Remainder]


def delta_weight(
    layer: "MoELoraLayer", adapter_name: str, projection: str, expert: int
) -> torch.Tensor:
    """[N, K] update of one expert, in at least fp32: scaling * B[e] A[e].

    The update is zero if the adapter does not adapt the expert. The update of a merged adapter is
    what was merged, whatever happened to the adapter since.
    """
    merged = layer.kept_of_merged.get(adapter_name)
    if merged is None:
        return Update.of(layer, adapter_name, projection).of_expert(expert)
    A, _ = layer.pair(adapter_name, projection)
    return merged.updates[projection].to(A.device).of_expert(expert)


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
    updates = _updates(layer, adapter_name)
    if safe:
        _raise_unless_finite(layer, adapter_name, updates)
    # all merged weights are computed before one is stored: an error leaves the layer unchanged
    kept = {name: update.copied(_stored(layer, name)) for name, update in updates.items()}
    merged = {}
    for name, update in updates.items():
        if _quantized(layer, name) is not None:
            merged[name] = _merged_quantized(layer, adapter_name, name, update)
    for name, (original, weight) in merged.items():
        layer.unmerged_weights[name] = original
        _store(layer, name, weight)
    dense = {name: update for name, update in updates.items() if name not in merged}
    changed = {
        part.key: remainders.add(part.weight, part.delta) for part in _expert_weights(layer, dense)
    }
    layer.kept_of_merged[adapter_name] = Merged(kept, changed)
    layer.merged_adapters.append(adapter_name)


def _updates(layer: "MoELoraLayer", adapter_name: str) -> dict[str, Update]:
    """What the adapter gives each of its projections now; every process must call this."""
    names = layer.adapted_projections(adapter_name)
    return {name: Update.of(layer, adapter_name, name) for name in names}


def check_codes_are_written(layer: "MoELoraLayer", adapter_name: str) -> None:
    """Check that this package writes the formats of the quantized weights that an adapter adapts.

    Raises:
        ValueError: if it can only read one.
    """
    # DeepSpeed's ZeRO-3 leaves empty weights, which have no parts
    if any(zero.is_partitioned(parameter) for parameter in layer.base_layer.parameters()):
        return
    for name in layer.adapted_projections(adapter_name):
        weight = _quantized(layer, name)
        if weight is not None:
            check_is_written(weight)


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
            if FSDP2 has sharded the weights, or if they are offloaded.
    """
    # PEFT derives its layers from nn.Module and BaseTunerLayer
    module = cast(nn.Module, layer)
    check_shards_are_unmerged(module)
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(
            f"adapters {layer.merged_adapters} are merged into weights that are offloaded, so a "
            "forward without adapters cannot unmerge them; call unmerge_adapter() on the model "
            "first."
        )
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
        merged = layer.kept_of_merged.pop(adapter_name)
        dense = {name: kept for name, kept in merged.updates.items() if name not in quantized}
        for part in _expert_weights(layer, dense):
            remainders.subtract(part.weight, part.delta, merged.remainders[part.key])


def check_finite(layer: "MoELoraLayer", adapter_name: str) -> None:
    """Check that merging one adapter gives finite weights; every process must call this.

    Raises:
        ValueError: if a merged weight is not finite.
    """
    _raise_unless_finite(layer, adapter_name, _updates(layer, adapter_name))


def _raise_unless_finite(layer: "MoELoraLayer", adapter_name: str, updates: Updates) -> None:
    wrong = [
        f"{part.projection} of expert {part.expert}"
        for part in _expert_weights(layer, updates)
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


def _expert_weights(layer: "MoELoraLayer", updates: Updates) -> Iterator[ExpertWeight]:
    """The blocks of the base weights that this process stores and that updates change.

    Every process must iterate to the end if the weights are sharded.
    """
    for name, update in updates.items():
        first_row = 0
        for part, stacked in enumerate(layer.layout.parts(layer.base_layer, name)):
            local, (here, rows, columns) = shard_of(stacked.detach())
            moved = update.to(local.device)
            n = stacked.shape[1]
            for entry, expert in enumerate(_ids(local, here)):
                if expert in moved.held:
                    delta = moved.of_expert(expert)[first_row : first_row + n]
                    block = selected(selected(delta, 0, rows), 1, columns)
                    yield ExpertWeight(name, expert, part, local[entry], block)
            first_row += n


def _stored(layer: "MoELoraLayer", name: str) -> set[int]:
    """Ids of the experts of whose projection this process stores a part."""
    stored: set[int] = set()
    for stacked in layer.layout.parts(layer.base_layer, name):
        local, (here, _, _) = shard_of(stacked.detach())
        stored.update(_ids(local, here))
    return stored


def _ids(local: Weight, here: torch.Tensor | None) -> list[int]:
    """Ids of the experts in the part of a stack that this process stores."""
    if here is None:
        return list(range(local.shape[0]))
    return here.tolist()


# ---- quantized weights ---------------------------------------------------------------------------


def _quantized(layer: "MoELoraLayer", name: str) -> QuantizedWeight | None:
    """The base weight [E, N, K] of a projection if it is quantized, else None."""
    weight = layer.layout.parts(layer.base_layer, name)[0]
    if isinstance(weight, QuantizedWeight):
        return weight
    return None


def _merged_quantized(
    layer: "MoELoraLayer", adapter_name: str, name: str, update: Update
) -> tuple[QuantizedWeight, QuantizedWeight]:
    """A quantized weight without adapters, and with this adapter and all merged adapters.

    Raises:
        ValueError: if this package can only read the format.
    """
    original = layer.unmerged_weights.get(name, _quantized(layer, name))
    assert original is not None, "the caller checked that the projection is quantized"
    together = [
        layer.kept_of_merged[merged].updates[name].to(original.device)
        for merged in layer.merged_adapters
        if name in layer.kept_of_merged[merged].updates
    ]
    together.append(update)

    def sum_of(expert: int) -> torch.Tensor:
        return reduce(torch.add, (one.of_expert(expert) for one in together))

    weight, error = requantized(original, sum_of)
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
