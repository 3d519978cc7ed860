"""dpre = activation.backward(pre, w * draw), act = activation(pre), dw = <act, draw>.

w is the routing weight, and dw its gradient. draw is the gradient of act before the multiplication
by w; so dw needs act, but not the output of the down projection. One program computes whole rows, a
block of columns at a time.

A separate kernel computes draw. The two kernels take 510 us; one kernel, with this pass in the
epilogue of the product, took 700 us (H200, 2026-11-21; docs/performance.md). The kernel of
`sm90.act_backward_outer` computes dpre and dw, too, and the rank-r products of dpre and act.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..activation import Activation
from ..routing import Routing
from .launching.launch import facts, launch
from .launching.table import ceil_div, device_facts, find, options_of, power_of_2
from .operands import Act, Bias, Operand
from .tiles.activation import activate_backward, activate_plain_backward
from .tiles.bias import bias_times_dout
from .tiles.eights import as_eights, by_8


class _Sizes(NamedTuple):
    """Experts, columns of act, and columns of the bias."""

    E: Any
    I: Any  # noqa: E741
    H: Any


class _Tile(NamedTuple):
    """Constants of the kernel.

    Attributes:
        M, I: rows of a program, and columns of act in a step of its loop.
        E_PADDED: E, padded to a power of two.
        BY_8: as in `tiles.eights`.
    """

    M: Any
    I: Any  # noqa: E741
    E_PADDED: Any
    BY_8: Any


@triton.jit(do_not_specialize=["M"])
def _act_backward_kernel(
    draw_ptr, pre, top_k_weights_ptr, bias, dout, row_token_ptr, row_slot_ptr, expert_offsets_ptr,
    dpre_ptr, dw_ptr, M, sizes, TILE, ACT,
):  # fmt: skip
    """Grid [M / TILE.M]: whole rows. act is written over draw; dw of a sentinel's row is 0."""
    offs_m = tl.program_id(0) * TILE.M + tl.arange(0, TILE.M)
    routed = offs_m < tl.load(expert_offsets_ptr + sizes.E)
    slots = tl.load(row_slot_ptr + offs_m, mask=offs_m < M, other=0)
    w = tl.load(top_k_weights_ptr + slots, mask=routed, other=0.0).to(tl.float32)[:, None]
    rows = offs_m.to(tl.int64)[:, None]
    I = as_eights(sizes.I, TILE.BY_8)  # noqa: E741
    stride_m = as_eights(pre.stride_m, TILE.BY_8)
    N = 2 * I if ACT.GATED else I
    dw = tl.zeros((TILE.M, TILE.I), dtype=tl.float32)
    for i in range(0, I, TILE.I):
        cols = (i + tl.arange(0, TILE.I))[None, :]
        mask = routed[:, None] & (cols < I)
        draw_ptrs = draw_ptr + rows * I + cols
        draw = tl.load(draw_ptrs, mask=mask, other=0.0).to(tl.float32)
        if ACT.GATED:
            pre_ptrs = pre.ptr + rows * stride_m
            if ACT.INTERLEAVED:
                # gate and up are loaded as pairs: a load of gate alone would not be coalesced
                pair_cols = (2 * i + tl.arange(0, 2 * TILE.I))[None, :]
                mask_pairs = routed[:, None] & (pair_cols < 2 * I)
                pairs = tl.load(pre_ptrs + pair_cols * pre.stride_k, mask=mask_pairs, other=0.0)
                gate, up = pairs.reshape(TILE.M, TILE.I, 2).split()
            else:
                gate = tl.load(pre_ptrs + cols * pre.stride_k, mask=mask, other=0.0)
                up = tl.load(pre_ptrs + (I + cols) * pre.stride_k, mask=mask, other=0.0)
            act, dgate, dup = activate_backward(
                gate.to(tl.float32), up.to(tl.float32), w * draw, ACT
            )
            dgate = dgate.to(dpre_ptr.dtype.element_ty)
            dup = dup.to(dpre_ptr.dtype.element_ty)
            if ACT.INTERLEAVED:
                dpre_ptrs = dpre_ptr + rows * N + pair_cols
                tl.store(dpre_ptrs, tl.interleave(dgate, dup), mask=mask_pairs)
            else:
                tl.store(dpre_ptr + rows * N + cols, dgate, mask=mask)
                tl.store(dpre_ptr + rows * N + I + cols, dup, mask=mask)
        else:
            pre_ptrs = pre.ptr + rows * stride_m + cols * pre.stride_k
            plain = tl.load(pre_ptrs, mask=mask, other=0.0)
            act, dpre = activate_plain_backward(plain.to(tl.float32), w * draw, ACT)
            tl.store(dpre_ptr + rows * N + cols, dpre.to(dpre_ptr.dtype.element_ty), mask=mask)
        tl.store(draw_ptrs, act.to(draw_ptr.dtype.element_ty), mask=mask)
        dw += act * draw
    dw = tl.sum(dw, axis=1)
    if bias.ptr is not None:
        dw += bias_times_dout(
            bias, dout, row_token_ptr, expert_offsets_ptr, offs_m, routed, sizes.E, sizes.H,
            TILE.E_PADDED, TILE.I,
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

    weights = top_k_weights.contiguous()

    def arguments() -> tuple[tuple, tuple, dict]:
        tile = _Tile(
            M=blocks["BLOCK_M"],
            I=blocks["BLOCK_I"],
            E_PADDED=power_of_2(E),
            BY_8=by_8(draw, pre),
        )
        operands = (
            draw, Operand.of(pre), weights, Bias.of(bias), Operand.of(dout), routing.row_token,
            routing.row_slot, routing.expert_offsets, dpre, d_top_k_weights,
        )  # fmt: skip
        return (
            operands,
            (_Sizes(E, I, H),),
            {"TILE": tile, "ACT": Act.of(activation), **options_of(blocks)},
        )

    key = "act_backward", facts(pre, dout, bias), weights.dtype, E, I, H, activation
    tensors = (
        draw, pre, weights, bias, dout, routing.row_token, routing.row_slot,
        routing.expert_offsets, dpre, d_top_k_weights,
    )  # fmt: skip
    grid = ceil_div(M, blocks["BLOCK_M"]), 1, 1
    launch(key, _act_backward_kernel, grid, tensors, arguments, (M,))
    return dpre, draw, d_top_k_weights
