"""One projection of an experts module together with the active adapters of its layer.

Several adapters are concatenated along their ranks: [B1 B2] [A1; A2] = B1 A1 + B2 A2.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from ..functional import Projection, per_expert
from ..ops import QuantizedWeight
from ..parallel.gradients import local

if TYPE_CHECKING:
    from .layer import MoELoraLayer

# lora_A and lora_B
Pair = tuple[nn.Parameter, nn.Parameter]
# by the names of the adapters, in their order
Pairs = dict[str, Pair]


def projection_of(
    layer: "MoELoraLayer", module: nn.Module, name: str, adapters: Sequence[str]
) -> Projection:
    """A projection with the update of some adapters.

    Args:
        layer: the layer that adapts `module`.
        module: the experts module, whose parameters are plain local tensors at this moment.
        name: name of the projection.
        adapters: names of the active adapters.
    Raises:
        ValueError: if the active adapters drop with different probabilities.
    """
    weight, up_weight = _weights(layer, module, name)
    bias = layer.layout.bias(module, name)
    pairs: Pairs = {}
    for adapter_name in adapters:
        pair = layer.find_pair(adapter_name, name)
        if pair is not None:
            pairs[adapter_name] = pair
    if not pairs:
        return Projection(weight, bias, up_weight=up_weight)
    held = weight.shape[0]
    only, *others = pairs
    dropout_p = layer.dropout_of(only)
    if others:
        _check_common_dropout(layer, list(pairs))
    experts = layer.experts[only]
    some_of_divided = experts is not None and _is_divided_by_experts(layer)
    scaling = factor_of(layer.scaling[only])
    if others or some_of_divided or isinstance(scaling, torch.Tensor):
        A, B, chosen = _several(layer, held, pairs, name)
        return Projection(weight, bias, A, B, 1.0, dropout_p, chosen, up_weight)
    A, B, _ = _pair_here(layer, held, only, name, pairs[only])
    return Projection(weight, bias, A, B, scaling, dropout_p, experts, up_weight)


def factor_of(scaling: float | torch.Tensor) -> float | torch.Tensor:
    """A scaling as a number, or as the tensor that it is, if it is trained."""
    if isinstance(scaling, torch.Tensor) and scaling.requires_grad:
        return scaling
    # PEFT's prepare_model_for_compiled_hotswap makes tensors of the scalings
    return float(scaling)


def _is_divided_by_experts(layer: "MoELoraLayer") -> bool:
    return layer.share is not None and layer.share.by_expert


def _pair_here(
    layer: "MoELoraLayer", held: int, adapter_name: str, name: str, pair: Pair
) -> tuple[torch.Tensor, torch.Tensor, Sequence[int]]:
    """What this process holds of an adapter's pair, as plain tensors, and for which experts.

    Args:
        layer: the layer.
        held: number of experts whose weights this process holds.
        adapter_name: an adapter of the layer.
        name: name of a projection that the adapter adapts.
        pair: the adapter's parameters for it.
    Returns: lora_A [r * S, K] and lora_B [N, r * S], expert-major, and the ids of the S experts;
        under tensor parallelism K and N are those of this process's part of the projection.
    Raises:
        ValueError: if this process does not hold the weights of all its experts, or not all of
            their A and B. Other shapes may fit each other, with ranks of other experts.
    """
    A: torch.Tensor
    B: torch.Tensor
    A, B = pair
    here = layer.experts_of(adapter_name)
    share = layer.share
    if share is not None:
        here, how = share.held(layer.experts[adapter_name])
        A = local(A, how)
        B = local(B, how)
        if name in share.features:
            A, B = share.features[name].of(A, B)
    ranks = layer.r[adapter_name] * len(here)
    E = len(layer.experts_here)
    if held == E and A.ndim == 2 and A.shape[0] == ranks and B.ndim == 2 and B.shape[1] == ranks:
        return A, B, here
    raise ValueError(
        f"adapter {adapter_name!r} needs lora_A [{ranks}, K] and lora_B [N, {ranks}] beside the "
        f"weights of {E} experts, but this process holds lora_A {list(A.shape)}, lora_B "
        f"{list(B.shape)} and the weights of {held} experts. Something has divided them among "
        "processes: use FSDP2 (torch.distributed.fsdp.fully_shard), DDP or DeepSpeed, not FSDP1."
    )


def _weights(
    layer: "MoELoraLayer", module: nn.Module, name: str
) -> tuple[torch.Tensor | QuantizedWeight, torch.Tensor | None]:
    """`weight` and `up_weight` of a `Projection`."""
    parts = layer.layout.parts(module, name)
    if len(parts) == 1:
        return parts[0], None
    # gate and up are stored apart only in families whose weights are never quantized
    gate, up = cast(tuple[torch.Tensor, torch.Tensor], parts)
    return gate, up


def _check_common_dropout(layer: "MoELoraLayer", active: list[str]) -> None:
    """Check that all active adapters drop with the same probability now."""
    first, *others = [layer.dropout_of(name) for name in active]
    if any(p != first for p in others):
        raise ValueError(
            f"adapters {active} are active together, but their lora_dropout differs: "
            f"{sorted({first, *others})}; train them one at a time, or give them the same value."
        )


def _several(
    layer: "MoELoraLayer", held: int, pairs: Pairs, name: str
) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...] | None]:
    """`lora_A`, `lora_B` and `experts` of a `Projection` with several adapters.

    The scaling of each adapter is multiplied into its B.
    """
    experts = _experts_of_any(layer, list(pairs))
    As = []
    Bs = []
    for adapter_name, pair in pairs.items():
        A, B = _pair_of_experts(layer, held, adapter_name, name, pair, experts)
        As.append(A)
        Bs.append(layer.scaling[adapter_name] * B)
    # [S, r1 + r2, K] -> [(r1 + r2) * S, K], expert-major
    lora_A = torch.cat(As, dim=1).flatten(0, 1)
    # [S, N, r1 + r2] -> [N, (r1 + r2) * S], expert-major
    lora_B = torch.cat(Bs, dim=2).transpose(0, 1).flatten(1)
    return lora_A, lora_B, experts


def _experts_of_any(layer: "MoELoraLayer", adapter_names: list[str]) -> tuple[int, ...] | None:
    """Ascending ids of the experts that at least one of the adapters adapts; None for all E.

    Under expert parallelism None, for all experts of this process: so the same collective calls run
    in every process, also in one that holds no chosen expert.
    """
    found: set[int] = set()
    if _is_divided_by_experts(layer):
        return None
    for name in adapter_names:
        chosen = layer.experts[name]
        if chosen is None:
            return None
        found.update(chosen)
    return tuple(sorted(found))


def _pair_of_experts(
    layer: "MoELoraLayer",
    here: int,
    adapter_name: str,
    projection: str,
    pair: Pair,
    experts: tuple[int, ...] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of some experts, with zeros for experts that the adapter does not adapt.

    Args:
        layer: the layer.
        here: number of experts whose weights this process holds.
        adapter_name: an adapter of the layer.
        projection: name of a projection that the adapter adapts.
        pair: the adapter's parameters for it.
        experts: ascending ids of S experts; None for all experts of this process.
    Returns: [S, r, K] and [S, N, r].
    """
    A, B, held = _pair_here(layer, here, adapter_name, projection, pair)
    As, Bs = per_expert(A, B, len(held))
    wanted = layer.experts_here
    if experts is not None:
        wanted = experts
    if list(held) == list(wanted):
        return As, Bs
    return _entries_of(As, held, wanted), _entries_of(Bs, held, wanted)


def _entries_of(stacked: torch.Tensor, held: Sequence[int], wanted: Sequence[int]) -> torch.Tensor:
    """The entries of the experts `wanted`, with zeros for experts that are not in `held`.

    Args:
        stacked: [S, ., .], the entries of the experts `held`.
        held: ids of S experts.
        wanted: ids of experts.
    Returns: [len(wanted), ., .].
    """
    nothing = torch.zeros_like(stacked[:1])
    # one tensor, so that the entries depend on `stacked` even if it holds none of `wanted`
    *entries, nothing = torch.cat([stacked, nothing]).unbind(0)
    held_entries = dict(zip(held, entries, strict=True))
    return torch.stack([held_entries.get(expert, nothing) for expert in wanted])
