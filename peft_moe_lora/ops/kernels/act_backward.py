"""dpre = activation.backward(pre, w * draw), act = activation(pre), dw = <act, draw>.

w is the routing weight, and dw its gradient. draw is the gradient of act before the multiplication
by w; so dw needs act, but not the output of the down projection. One program computes whole rows, a
block of columns at a time.

A separate kernel computes draw. The two kernels take 510 us; one kernel, with this pass in the
epilogue of the product, took 700 us (H200, 2026-11-21; docs/performance.md). The kernel of
`sm90.act_backward_outer` computes dpre and dw, too, and the rank-r products of dpre and act.
"""

import torch
import triton
import triton.language as tl

from ..activation import Activation
from ..routing import Routing
from .launching.launch import facts, launch
from .launching.table import ceil_div, device_facts, find, power_of_2
from .operands import Act, Bias, Operand
from .tiles.activation import activate_backward, activate_plain_backward, activation_constants
from .tiles.bias import bias_times_dout
from .tiles.eights import as_eights, by_8
from .tiles.tile import strides_or_zeros


@triton.jit(do_not_specialize=["M"])
def _act_backward_kernel(
    draw_ptr, pre_ptr, top_k_weights_ptr, bias_ptr, dout_ptr, row_token_ptr, row_slot_ptr,
    expert_offsets_ptr,
    dpre_ptr, dw_ptr, M, E, I, H,  # noqa: E741
    stride_prem, stride_pren, stride_biase, stride_biasn, stride_dm, stride_dh,
    KIND: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, LIMIT: tl.constexpr,
    ALPHA: tl.constexpr, UP_SHIFT: tl.constexpr, E_PADDED: tl.constexpr, BY_8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Grid [M / BLOCK_M]: whole rows. act is written over draw; dw of a sentinel's row is 0."""
    ACT: tl.constexpr = Act(KIND, GATED, INTERLEAVED, LIMIT, ALPHA, UP_SHIFT, 1)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    routed = offs_m < tl.load(expert_offsets_ptr + E)
    slots = tl.load(row_slot_ptr + offs_m, mask=offs_m < M, other=0)
    w = tl.load(top_k_weights_ptr + slots, mask=routed, other=0.0).to(tl.float32)[:, None]
    rows = offs_m.to(tl.int64)[:, None]
    I = as_eights(I, BY_8)  # noqa: E741
    stride_prem = as_eights(stride_prem, BY_8)
    N = 2 * I if GATED else I
    dw = tl.zeros((BLOCK_M, BLOCK_I), dtype=tl.float32)
    for i in range(0, I, BLOCK_I):
        cols = (i + tl.arange(0, BLOCK_I))[None, :]
        mask = routed[:, None] & (cols < I)
        draw_ptrs = draw_ptr + rows * I + cols
        draw = tl.load(draw_ptrs, mask=mask, other=0.0).to(tl.float32)
        if GATED:
            pre_ptrs = pre_ptr + rows * stride_prem
            if INTERLEAVED:
                # gate and up are loaded as pairs: a load of gate alone would not be coalesced
                pair_cols = (2 * i + tl.arange(0, 2 * BLOCK_I))[None, :]
                mask_pairs = routed[:, None] & (pair_cols < 2 * I)
                pairs = tl.load(pre_ptrs + pair_cols * stride_pren, mask=mask_pairs, other=0.0)
                gate, up = pairs.reshape(BLOCK_M, BLOCK_I, 2).split()
            else:
                gate = tl.load(pre_ptrs + cols * stride_pren, mask=mask, other=0.0)
                up = tl.load(pre_ptrs + (I + cols) * stride_pren, mask=mask, other=0.0)
            act, dgate, dup = activate_backward(
                gate.to(tl.float32), up.to(tl.float32), w * draw, ACT
            )
            dgate = dgate.to(dpre_ptr.dtype.element_ty)
            dup = dup.to(dpre_ptr.dtype.element_ty)
            if INTERLEAVED:
                dpre_ptrs = dpre_ptr + rows * N + pair_cols
                tl.store(dpre_ptrs, tl.interleave(dgate, dup), mask=mask_pairs)
            else:
                tl.store(dpre_ptr + rows * N + cols, dgate, mask=mask)
                tl.store(dpre_ptr + rows * N + I + cols, dup, mask=mask)
        else:
            pre = tl.load(pre_ptr + rows * stride_prem + cols * stride_pren, mask=mask, other=0.0)
            act, dpre = activate_plain_backward(pre.to(tl.float32), w * draw, ACT)
            tl.store(dpre_ptr + rows * N + cols, dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
        tl.store(draw_ptrs, act.to(draw_ptr.dtype.element_ty), mask=mask)
        dw += act * draw
    dw = tl.sum(dw, axis=1)
    if bias_ptr is not None:
        dw += bias_times_dout(
            Bias(bias_ptr, stride_biase, stride_biasn), Operand(dout_ptr, stride_dm, stride_dh),
            row_token_ptr, expert_offsets_ptr, offs_m, routed, E, H, E_PADDED, BLOCK_I,
        )  # fmt: skip
    tl.store(dw_ptr + slots, dw, mask=offs_m < M)


def expert_act_backward(
    draw: torch.Tensor,
    pre: torch.Tensor,
    routing: Routing,
    activation: Activation,
    top_k_weights: torch.Tensor,
    *,
    dout: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the pre-activation and of the routing weights, and act, computed again.

    Args:
        draw: [M, I], the gradient of act before the routing weight: W[e]^T dout[t] of the down
            projection, with its low-rank term. It is overwritten by act.
        pre: [M, N], the pre-activation that forward kept.
        top_k_weights: [T, top_k] float.
        dout: [T, H], needed if there is a bias.
        bias: [E, H], the bias of the down projection.
    Returns: dpre [M, N], act [M, I], both in the dtype of pre, and d_top_k_weights [T, top_k] in
        fp32, 0 for sentinels.
    Twin: `reference.expert_act_backward`.
    """
    M, I = draw.shape  # noqa: E741
    E = routing.num_experts
    dpre = torch.empty(pre.shape, dtype=pre.dtype, device=pre.device)
    d_top_k_weights = torch.empty(top_k_weights.shape, dtype=torch.float32, device=pre.device)
    if M == 0:
        return dpre, draw, d_top_k_weights
    H = 0
    if bias is None:
        dout = None
    else:
        H = bias.shape[1]
    arch, _ = device_facts(pre.device)
    blocks = find("act_backward", arch, pre.element_size(), 16)
    if activation.interleaved:
        # half as many columns, because a load of pairs is twice as wide
        blocks = {**blocks, "BLOCK_I": blocks["BLOCK_I"] // 2}

    def rest() -> tuple[tuple, tuple, dict]:
        strides = *pre.stride(), *strides_or_zeros(bias, 2), *strides_or_zeros(dout, 2)
        constants = activation_constants(activation) | {"E_PADDED": power_of_2(E)} | blocks
        constants["BY_8"] = by_8(draw, pre)
        return tensors, (E, I, H, *strides), constants

    key = "act_backward", facts(pre, dout, bias), top_k_weights.dtype, E, I, H, activation
    tensors = (
        draw, pre, top_k_weights.contiguous(), bias, dout, routing.row_token, routing.row_slot,
        routing.expert_offsets, dpre, d_top_k_weights,
    )  # fmt: skip
    launch(key, _act_backward_kernel, (ceil_div(M, blocks["BLOCK_M"]), 1, 1), tensors, rest, (M,))
    return dpre, draw, d_top_k_weights
