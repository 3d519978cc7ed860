"""W[e] + scaling * B[e] A[e]: a projection as it is kept, and views of its A and B as the kernels address them.

Legend: E experts, S of them with an update; r rank, K in- and N out-features; a pair is lora_A and lora_B of one
projection.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from ..ops import QuantizedWeight


@dataclass(frozen=True)
class Projection:
    """One frozen projection of every expert and the low-rank update that rides on it.

    Attributes:
        weight: [E, N, K] float, any strides (a transposed model passes a view), or quantized; its gate half
            [E, N/2, K] where `up_weight` is the other half.
        bias: [E, N] or None.
        lora_A: [r * S, K], expert-major: rows s*r up to (s + 1)*r are A of the s-th expert that has one; S = E unless
            `experts` says otherwise. None where no adapter is active.
        lora_B: [N, r * S], expert-major: columns s*r up to (s + 1)*r are B of that expert.
        scaling: factor of the update.
        dropout_p: probability that an element of x is dropped before A, in [0, 1).
        experts: ascending ids of the S experts that have an update; None for all E.
        up_weight: [E, N/2, K], the up half of a gate_up projection whose halves are stored apart; else None.
    """

    weight: torch.Tensor | QuantizedWeight
    bias: torch.Tensor | None = None
    lora_A: torch.Tensor | None = None
    lora_B: torch.Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0
    experts: tuple[int, ...] | None = None
    up_weight: torch.Tensor | None = None

    def halves(self) -> list["Projection"]:
        """The gate and the up half, which share A; itself where it is stored whole."""
        if self.up_weight is None:
            return [self]
        n = self.weight.shape[1]
        return [
            replace(
                self,
                weight=weight,
                up_weight=None,
                bias=None if self.bias is None else self.bias[:, rows],
                lora_B=None if self.lora_B is None else self.lora_B[rows],
            )
            for weight, rows in ((self.weight, slice(n)), (self.up_weight, slice(n, None)))
        ]


def per_expert(lora_A: torch.Tensor | None, lora_B: torch.Tensor | None, num_experts: int):
    """Views [E, r, K] and [E, N, r] of an expert-major pair [r * E, K] and [N, r * E], or of nothing."""
    if lora_A is None:
        return None, None
    A = lora_A.view(num_experts, -1, lora_A.shape[1])
    return A, lora_B.view(lora_B.shape[0], num_experts, -1).permute(1, 0, 2)


def whole_pair(lora_A, lora_B, num_experts: int, experts: Sequence[int] | None, dtype: torch.dtype):
    """[r * E, K] and [N, r * E] of a pair [r * S, K] and [N, r * S]: itself where all experts have one.

    Where only `experts` do, a scratch of `dtype` with zeros for the others, that lives as long as the call: the
    kernels then address A and B as they do W, and A, B, their gradients and the optimizer's state hold S experts.
    """
    if lora_A is None or experts is None:
        return lora_A, lora_B
    index, (N, K) = _index(tuple(experts), lora_A.device), (lora_B.shape[0], lora_A.shape[1])
    A, B = lora_A.view(len(experts), -1, K).to(dtype), lora_B.view(N, len(experts), -1).to(dtype)
    A = A.new_zeros(num_experts, *A.shape[1:]).index_copy_(0, index, A)
    B = B.new_zeros(N, num_experts, B.shape[2]).index_copy_(1, index, B)
    return A.flatten(0, 1), B.flatten(1)


def spread(lora_A, lora_B, num_experts: int, experts: Sequence[int] | None, dtype: torch.dtype):
    """[E, r, K] and [E, N, r] of a pair [r * S, K] and [N, r * S]: views of `whole_pair`."""
    return per_expert(*whole_pair(lora_A, lora_B, num_experts, experts, dtype), num_experts)


def transposed(weight: torch.Tensor | None) -> torch.Tensor | None:
    """[E, K, N] view of a weight [E, N, K]; None for None."""
    return None if weight is None else weight.transpose(1, 2)


def gradient_like(parameter: torch.Tensor, shape: tuple[int, ...] | None = None) -> torch.Tensor:
    """Uninitialised, contiguous, at least fp32: gradients are summed wide whatever the parameter is stored in."""
    return parameter.new_empty(
        shape or parameter.shape, dtype=torch.promote_types(parameter.dtype, torch.float32)
    )


def whole_gradients(
    lora_A: torch.Tensor, lora_B: torch.Tensor, num_experts: int, experts: Sequence[int] | None
):
    """Uninitialised dA [r * E, K] and dB [N, r * E] of all experts, also where the pair is of some."""
    ranks = lora_A.shape[0] if experts is None else lora_A.shape[0] // len(experts) * num_experts
    return gradient_like(lora_A, (ranks, lora_A.shape[1])), gradient_like(
        lora_B, (lora_B.shape[0], ranks)
    )


def gathered(
    dA: torch.Tensor | None,
    dB: torch.Tensor | None,
    num_experts: int,
    experts: Sequence[int] | None,
):
    """Of gradients [r * E, K] and [N, r * E] the [r * S, K] and [N, r * S] of `experts`; all where that is None."""
    if dA is None or experts is None:
        return dA, dB
    index = _index(tuple(experts), dA.device)
    dA = dA.unflatten(0, (num_experts, -1)).index_select(0, index).flatten(0, 1)
    return dA, dB.unflatten(1, (num_experts, -1)).index_select(1, index).flatten(1)


@cache
def _index(experts: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """[S] int64 on the device, kept: made anew, each call would wait for a copy from the host."""
    return torch.tensor(experts, device=device)
