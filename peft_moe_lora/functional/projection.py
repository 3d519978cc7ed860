"""W[e] + scaling * B[e] A[e]: a projection, and its A and B in the layout that kernels read.

Legend:
    E experts, S of them with an update; r rank of one update; K in- and N out-features
    pair: lora_A and lora_B of one projection
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, overload

import torch

from ..ops import QuantizedWeight

# A and B, or their gradients; both are None without an adapter
Pair = tuple[torch.Tensor | None, torch.Tensor | None]
# A and B, or their gradients, if there is an adapter
Tensors = tuple[torch.Tensor, torch.Tensor]


class Projection(NamedTuple):
    """One frozen projection of every expert, and its low-rank update.

    Attributes:
        weight: [E, N, K] float, any strides (a transposed model passes a view), or quantized. If
            `up_weight` is not None, weight is only the gate half, [E, N/2, K].
        bias: [E, N] or None.
        lora_A: [r * S, K], expert-major: rows s*r up to (s + 1)*r are A of the s-th of the S
            experts that have an update. None if no adapter is active.
        lora_B: [N, r * S], expert-major: columns s*r up to (s + 1)*r are B of that expert.
        scaling: factor of the update.
        dropout_p: probability that an element of x is dropped before A, in [0, 1).
        experts: ascending ids of the S experts that have an update; None for all, S = E.
        up_weight: [E, N/2, K], the up half of a gate_up projection whose halves are stored as two
            tensors; else None.
        rank_major: whether lora_B has PEFT's order of columns instead, in which column j*S + s is
            column j of B of the s-th expert. Its gradient has the same order.
    """

    weight: torch.Tensor | QuantizedWeight
    bias: torch.Tensor | None = None
    lora_A: torch.Tensor | None = None
    lora_B: torch.Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0
    experts: tuple[int, ...] | None = None
    up_weight: torch.Tensor | None = None
    rank_major: bool = False

    def expert_major(self) -> "Projection":
        """The projection with an expert-major lora_B; itself if it has one."""
        if not self.rank_major or self.lora_B is None:
            return self
        S = self.weight.shape[0] if self.experts is None else len(self.experts)
        lora_B = rank_to_expert_major(self.lora_B, S).flatten(1)
        return self._replace(lora_B=lora_B, rank_major=False)

    def halves(self) -> list["Projection"]:
        """The gate half and the up half, which share A; [self] if the weight is one tensor."""
        if self.up_weight is None:
            return [self]
        n = self.weight.shape[1]
        return [
            self._replace(
                weight=weight,
                up_weight=None,
                bias=None if self.bias is None else self.bias[:, rows],
                lora_B=None if self.lora_B is None else self.lora_B[rows],
            )
            for weight, rows in ((self.weight, slice(n)), (self.up_weight, slice(n, None)))
        ]


def rank_to_expert_major(lora_B: torch.Tensor, num_experts: int) -> torch.Tensor:
    """PEFT's B in the order of this package; gradients return the same way.

    Args:
        lora_B: [N, r*E], rank-major: column j*E + e is column j of B[e].
        num_experts: E.
    Returns: [N, E, r], so that column e*r + j of the flattened tensor is column j of B[e].
    """
    return lora_B.reshape(lora_B.shape[0], -1, num_experts).transpose(1, 2)


@overload
def per_expert(lora_A: torch.Tensor, lora_B: torch.Tensor, num_experts: int) -> Tensors: ...
@overload
def per_expert(
    lora_A: torch.Tensor | None, lora_B: torch.Tensor | None, num_experts: int
) -> Pair: ...
def per_expert(lora_A: torch.Tensor | None, lora_B: torch.Tensor | None, num_experts: int) -> Pair:
    """An expert-major pair as one matrix per expert.

    Args:
        lora_A: [r * E, K], expert-major; None without an adapter.
        lora_B: [N, r * E], expert-major.
        num_experts: E.
    Returns: views [E, r, K] and [E, N, r]; None twice without an adapter.
    """
    if lora_A is None or lora_B is None:
        return None, None
    A = lora_A.view(num_experts, -1, lora_A.shape[1])
    B = lora_B.view(lora_B.shape[0], num_experts, -1).permute(1, 0, 2)
    return A, B


def whole_pair(
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    num_experts: int,
    experts: Sequence[int] | None,
    dtype: torch.dtype,
) -> Pair:
    """Make a pair for all E experts from a pair for S experts.

    The kernels index A and B by the expert's id, as they index W. But the parameters, their
    gradients and the optimizer's state hold only S experts. The new pair exists during one call.

    Args:
        lora_A: [r * S, K], expert-major; None without an adapter.
        lora_B: [N, r * S], expert-major.
        num_experts: E.
        experts: ascending ids of the S experts; None for all, and then lora_A and lora_B are
            returned.
        dtype: dtype of the new pair.
    Returns: [r * E, K] and [N, r * E], expert-major, zeros for an expert without an update.
    """
    if lora_A is None or lora_B is None or experts is None:
        return lora_A, lora_B
    index = _index(tuple(experts), lora_A.device)
    A = lora_A.view(len(experts), -1, lora_A.shape[1]).to(dtype)
    B = lora_B.view(lora_B.shape[0], len(experts), -1).to(dtype)
    whole_A = A.new_zeros(num_experts, *A.shape[1:]).index_copy_(0, index, A)
    whole_B = B.new_zeros(B.shape[0], num_experts, B.shape[2]).index_copy_(1, index, B)
    return whole_A.flatten(0, 1), whole_B.flatten(1)


@overload
def spread(
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    num_experts: int,
    experts: Sequence[int] | None,
    dtype: torch.dtype,
) -> Tensors: ...
@overload
def spread(
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    num_experts: int,
    experts: Sequence[int] | None,
    dtype: torch.dtype,
) -> Pair: ...
def spread(
    lora_A: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    num_experts: int,
    experts: Sequence[int] | None,
    dtype: torch.dtype,
) -> Pair:
    """Views [E, r, K] and [E, N, r] of the result of `whole_pair`, with the same arguments."""
    return per_expert(*whole_pair(lora_A, lora_B, num_experts, experts, dtype), num_experts)


def rank_of(lora_A: torch.Tensor, num_experts: int, experts: Sequence[int] | None) -> int:
    """r, the rank of one expert's update.

    Args:
        lora_A, num_experts, experts: as in `whole_pair`.
    """
    if experts is None:
        return lora_A.shape[0] // num_experts
    return lora_A.shape[0] // len(experts)


def transposed(weight: torch.Tensor | None) -> torch.Tensor | None:
    """View [E, K, N] of a weight [E, N, K]; None for None."""
    if weight is None:
        return None
    return weight.transpose(1, 2)


def gradient_like(parameter: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """An uninitialised, contiguous gradient in at least fp32, also for a bf16 or fp16 parameter.

    Args:
        parameter: the parameter.
        shape: shape of the gradient; by default the shape of the parameter.
    """
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.new_empty(shape or parameter.shape, dtype=dtype)


def pair_like(lora_A: torch.Tensor | None, lora_B: torch.Tensor | None) -> Tensors:
    """Uninitialised gradients of a pair, as `gradient_like` makes them."""
    assert lora_A is not None and lora_B is not None, "no pair, no gradients"
    return gradient_like(lora_A), gradient_like(lora_B)


def whole_gradients(
    lora_A: torch.Tensor, lora_B: torch.Tensor, num_experts: int, experts: Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised gradients dA [r * E, K] and dB [N, r * E] of all E experts.

    Args:
        lora_A, lora_B, num_experts, experts: as in `whole_pair`.
    """
    total_rank = num_experts * rank_of(lora_A, num_experts, experts)
    dA = gradient_like(lora_A, (total_rank, lora_A.shape[1]))
    dB = gradient_like(lora_B, (lora_B.shape[0], total_rank))
    return dA, dB


@overload
def gathered(
    dA: torch.Tensor,
    dB: torch.Tensor,
    num_experts: int,
    experts: Sequence[int] | None,
) -> Tensors: ...
@overload
def gathered(
    dA: torch.Tensor | None,
    dB: torch.Tensor | None,
    num_experts: int,
    experts: Sequence[int] | None,
) -> Pair: ...
def gathered(
    dA: torch.Tensor | None,
    dB: torch.Tensor | None,
    num_experts: int,
    experts: Sequence[int] | None,
) -> Pair:
    """Select the gradients of S experts from the gradients of all E experts.

    Args:
        dA: [r * E, K], expert-major; None if it is not needed.
        dB: [N, r * E], expert-major.
        num_experts: E.
        experts: ascending ids of the S experts; None for all.
    Returns: [r * S, K] and [N, r * S], expert-major.
    """
    if dA is None or dB is None or experts is None:
        return dA, dB
    index = _index(tuple(experts), dA.device)
    dA = dA.unflatten(0, (num_experts, -1)).index_select(0, index).flatten(0, 1)
    dB = dB.unflatten(1, (num_experts, -1)).index_select(1, index).flatten(1)
    return dA, dB


@cache
def _index(experts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """[S] int64 on the device.

    It is cached, because a new tensor would wait for a copy from the host in every call.
    """
    return torch.tensor(experts, device=device)
