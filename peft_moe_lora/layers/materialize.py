"""W[e] + scaling * B[e] A[e] of every expert, as one dense tensor [E, N, K].

The model's own experts implementation gets this tensor as its weight.

Legend: E experts, r rank, K in- and N out-features of a projection.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ..functional import (
    Projection,
    gathered,
    per_expert,
    spread,
    whole_gradients,
    without_autocast,
)

# experts are computed in chunks of this size: each chunk of W is copied first, then the product is
# added, and in between the chunk stays in the L2 cache of a large GPU
_CHUNK_BYTES = 32 * 2**20


def materialize(projection: Projection) -> torch.Tensor:
    """W[e] + scaling * B[e] A[e] of every expert, rounded once to the weight's dtype.

    The gradient dW of the result becomes dA[e] = scaling * B[e]^T dW[e] and
    dB[e] = scaling * dW[e] A[e]^T, summed in at least fp32. The weight itself gets no gradient.

    Args:
        projection: has lora_A, lora_B and a dense weight; its bias is not read.
    Returns: [E, N, K], dtype and strides of the weight.
    Raises:
        ValueError: if the weight requires a gradient.
    """
    p = projection
    assert isinstance(p.weight, torch.Tensor), (
        "a quantized weight has no dense parameter to replace"
    )
    assert not p.dropout_p, "with B A added to W, A has no input of its own that could be dropped"
    if torch.is_grad_enabled() and p.weight.requires_grad:
        raise ValueError(
            "the experts' base weights are frozen and get no gradient here, but one has "
            "requires_grad=True; call requires_grad_(False) on it, or train it without an adapter "
            "on these experts."
        )
    assert not p.rank_major, "an adapter of this package is expert-major"
    return _Materialize.apply(p.lora_A, p.lora_B, p.weight, p.scaling, p.experts)


class _Materialize(torch.autograd.Function):
    """Keeps lora_A and lora_B for backward.

    No tensor of the size of W exists in fp32; only a chunk of experts is converted at a time.
    """

    @staticmethod
    def forward(
        # autograd's context accepts any attribute, but its class declares none
        ctx: Any,
        lora_A: torch.Tensor,
        lora_B: torch.Tensor,
        weight: torch.Tensor,
        scaling: float,
        experts: tuple[int, ...] | None,
    ) -> torch.Tensor:
        num_experts = weight.shape[0]
        ctx.save_for_backward(lora_A, lora_B)
        ctx.scaling = scaling
        ctx.num_experts = num_experts
        ctx.experts = experts
        ctx.set_materialize_grads(False)
        dtype = weight.dtype
        A, B = spread(lora_A.to(dtype), lora_B.to(dtype), num_experts, experts, dtype)
        out = torch.empty_like(weight)
        for chunk in _chunks(weight):
            # [c, N, K] + [c, N, r] @ [c, r, K]; autocast does not change an operation with out=
            torch.baddbmm(weight[chunk], B[chunk], A[chunk], alpha=scaling, out=out[chunk])
        return out

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dweight: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        if dweight is None:
            raise RuntimeError(
                "the experts implementation gave its weights no gradient, so the adapter cannot be "
                "trained with it; choose another with model.set_experts_implementation(...)."
            )
        lora_A, lora_B = ctx.saved_tensors
        num_experts = ctx.num_experts
        wide = torch.promote_types(lora_A.dtype, torch.float32)
        scaled_A = lora_A.to(wide) * ctx.scaling
        scaled_B = lora_B.to(wide) * ctx.scaling
        A, B = spread(scaled_A, scaled_B, num_experts, ctx.experts, wide)
        dlora_A, dlora_B = whole_gradients(lora_A, lora_B, num_experts, ctx.experts)
        dA, dB = per_expert(dlora_A, dlora_B, num_experts)
        with without_autocast(dweight.device.type):
            for chunk in _chunks(dweight):
                dW = dweight[chunk].to(wide)
                # [c, r, N] @ [c, N, K]
                dA[chunk] = B[chunk].transpose(1, 2) @ dW
                # [c, N, K] @ [c, K, r]
                dB[chunk] = dW @ A[chunk].transpose(1, 2)
        dlora_A, dlora_B = gathered(dlora_A, dlora_B, num_experts, ctx.experts)
        return dlora_A.to(lora_A.dtype), dlora_B.to(lora_B.dtype), None, None, None


def _chunks(weight: torch.Tensor) -> list[slice]:
    """Slices of experts. Each slice holds at most `_CHUNK_BYTES` of the weight, or one expert."""
    bytes_of_expert = weight[0].numel() * weight.element_size()
    size = max(1, _CHUNK_BYTES // bytes_of_expert)
    return [slice(first, first + size) for first in range(0, weight.shape[0], size)]
