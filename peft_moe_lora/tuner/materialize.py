"""W[e] + scaling * B[e] A[e] of every expert, written out for an experts implementation that wants whole weights."""

import torch
from torch.autograd.function import once_differentiable

from ..functional import Projection, gathered, per_expert, spread, whole_gradients

# a chunk of experts that stays in a large GPU's L2 between the copy of W and the product that is added to it
_CHUNK_BYTES = 32 * 2**20


def materialize(projection: Projection) -> torch.Tensor:
    """W[e] + scaling * B[e] A[e] of every expert, rounded once to the weight's dtype.

    Args:
        projection: one with lora_A and lora_B; its bias is not read.
    Returns: [E, N, K], dtype and strides of the weight. Its gradient dW becomes dA[e] = scaling * B[e]^T dW[e] and
        dB[e] = scaling * dW[e] A[e]^T, summed in at least fp32; the weight itself gets none.
    Raises:
        ValueError: if the weight asks for a gradient.
    """
    assert not projection.dropout_p, (
        "W + scaling * B A has no low-rank path whose input could be dropped"
    )
    if torch.is_grad_enabled() and projection.weight.requires_grad:
        raise ValueError(
            "the experts' base weights are frozen and get no gradient here, but one has requires_grad=True; "
            "call requires_grad_(False) on it, or train it without an adapter on these experts."
        )
    p = projection
    return _Materialize.apply(p.lora_A, p.lora_B, p.weight, p.scaling, p.experts)


class _Materialize(torch.autograd.Function):
    """Keeps A and B. Nothing of the size of W exists in fp32, only a chunk of experts at a time."""

    @staticmethod
    def forward(ctx, lora_A, lora_B, weight, scaling: float, experts):
        ctx.save_for_backward(lora_A, lora_B)
        ctx.scaling, ctx.num_experts, ctx.experts = scaling, weight.shape[0], experts
        ctx.set_materialize_grads(False)
        A, B = spread(
            lora_A.to(weight.dtype), lora_B.to(weight.dtype), weight.shape[0], experts, weight.dtype
        )
        out = torch.empty_like(weight)
        for chunk in _chunks(weight):
            # [c, N, K] + [c, N, r] @ [c, r, K]; autocast leaves products into a given tensor alone
            torch.baddbmm(weight[chunk], B[chunk], A[chunk], alpha=scaling, out=out[chunk])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dweight):
        if dweight is None:
            raise RuntimeError(
                "the experts implementation gave its weights no gradient, so the adapter cannot be trained with it; "
                "choose another with model.set_experts_implementation(...)."
            )
        lora_A, lora_B = ctx.saved_tensors
        wide = torch.promote_types(lora_A.dtype, torch.float32)
        scaled = lora_A.to(wide) * ctx.scaling, lora_B.to(wide) * ctx.scaling
        A, B = spread(*scaled, ctx.num_experts, ctx.experts, wide)
        dlora_A, dlora_B = whole_gradients(lora_A, lora_B, ctx.num_experts, ctx.experts)
        dA, dB = per_expert(dlora_A, dlora_B, ctx.num_experts)
        with torch.autocast(dweight.device.type, enabled=False):
            for chunk in _chunks(dweight):
                d = dweight[chunk].to(wide)
                # [c, r, N] @ [c, N, K] and [c, N, K] @ [c, K, r]
                dA[chunk] = B[chunk].transpose(1, 2) @ d
                dB[chunk] = d @ A[chunk].transpose(1, 2)
        dlora_A, dlora_B = gathered(dlora_A, dlora_B, ctx.num_experts, ctx.experts)
        return dlora_A.to(lora_A.dtype), dlora_B.to(lora_B.dtype), None, None, None


def _chunks(weight: torch.Tensor) -> list[slice]:
    """Slices of experts, of at most `_CHUNK_BYTES` of weight or of one expert each."""
    size = max(1, _CHUNK_BYTES // (weight[0].numel() * weight.element_size()))
    return [slice(first, first + size) for first in range(0, weight.shape[0], size)]
