"""draw[m] = W[e] dout[token] + mask * (A[e] yb[m]); dpre = activation.backward(pre, w * draw); dw = <act, draw>.

The weight is the down projection transposed, so draw is the gradient of act before the routing weight w. The sum over
the columns that dw needs is left per column tile, and added up in a fixed order by a second kernel.
"""

import torch
import triton
import triton.language as tl

from ..activation import Activation
from ..routing import Dropout, Routing
from .activation import activate_backward, activate_plain_backward
from .config import dot_precision, padded_rank
from .routing import with_tiles
from .tile import add_product, halves, launch_facts, low_rank, position, strides_or_zeros, tile_columns


@triton.jit
def _finish_columns(
    draw, w, pre_ptr, dpre_ptr, act_ptr, offs_m, end, n0, I, stride_prem, stride_pren,  # noqa: E741
    KIND: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    UP_SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write dpre and act for columns n0 up to n0 + BLOCK of draw [M, BLOCK]; returns their share of dw [M]."""
    cols = n0 + tl.arange(0, BLOCK)
    mask = (offs_m < end)[:, None] & (cols < I)[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    dtype = dpre_ptr.dtype.element_ty
    N = 2 * I if GATED else I
    if GATED:
        gate_cols = 2 * cols if INTERLEAVED else cols
        up_cols = 2 * cols + 1 if INTERLEAVED else I + cols
        gate = tl.load(pre_ptr + rows * stride_prem + gate_cols[None, :] * stride_pren, mask=mask, other=0.0)
        up = tl.load(pre_ptr + rows * stride_prem + up_cols[None, :] * stride_pren, mask=mask, other=0.0)
        act, dgate, dup = activate_backward(
            gate.to(tl.float32), up.to(tl.float32), w[:, None] * draw, KIND, LIMIT, ALPHA, UP_SHIFT
        )
        tl.store(dpre_ptr + rows * N + gate_cols[None, :], dgate.to(dtype), mask=mask)
        tl.store(dpre_ptr + rows * N + up_cols[None, :], dup.to(dtype), mask=mask)
    else:
        pre = tl.load(pre_ptr + rows * stride_prem + cols[None, :] * stride_pren, mask=mask, other=0.0)
        act, dpre = activate_plain_backward(pre.to(tl.float32), w[:, None] * draw, KIND, ALPHA)
        tl.store(dpre_ptr + rows * N + cols[None, :], dpre.to(dtype), mask=mask)
    tl.store(act_ptr + rows * I + cols[None, :], act.to(dtype), mask=mask)
    return tl.sum(act * draw, axis=1)


@triton.jit
def _linear_act_backward_tile(
    dout_ptr, weight_ptr, weight_desc, yb_ptr, lora_A_ptr, pre_ptr, top_k_weights_ptr, dpre_ptr, act_ptr, partial_ptr,
    seed_ptr, row_token_ptr, row_slot_ptr, e, first_row, end, n, I, H, r,  # noqa: E741
    stride_xm, stride_xk, stride_we, stride_wn, stride_wk, stride_ybm, stride_ybr, stride_ae, stride_an, stride_ar,
    stride_prem, stride_pren, stride_partial,
    KIND: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    UP_SHIFT: tl.constexpr, P: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, K_UNIT: tl.constexpr,
):  # fmt: skip
    """Rows first_row up to min(first_row + BLOCK_M, end) of expert e, the n-th BLOCK_N columns of act."""
    offs_m = first_row + tl.arange(0, BLOCK_M)
    # a row past the expert's last computes the last again, unmasked, and is not stored
    rows = tl.minimum(offs_m, end - 1)
    tokens = tl.load(row_token_ptr + rows)
    cols, mask_n = tile_columns(n * BLOCK_N, I, BLOCK_N, 1)
    draw = low_rank(
        yb_ptr, lora_A_ptr, None, seed_ptr, row_slot_ptr, e, rows, cols, mask_n, r,
        stride_ybm, stride_ybr, stride_ae, stride_an, stride_ar, 0, 0,
        BLOCK_M, BLOCK_N, R, dout_ptr.dtype.element_ty, P, PRECISION,
    )  # fmt: skip
    draw = add_product(
        draw, dout_ptr, None, weight_ptr, weight_desc, e, tokens, first_row, n * BLOCK_N, cols, mask_n, H,
        stride_xm, stride_xk, stride_we, stride_wn, stride_wk, BLOCK_N, BLOCK_K, EVEN_K, K_UNIT, PRECISION,
    )  # fmt: skip

    w = tl.load(top_k_weights_ptr + tl.load(row_slot_ptr + rows)).to(tl.float32)
    # a quarter of the columns at a time: a whole tile of draw, gate and up takes more registers than there are
    QUARTER: tl.constexpr = BLOCK_N // 4
    left, right = halves(draw, BLOCK_M, BLOCK_N // 2)
    dw = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for half in tl.static_range(2):
        first, second = halves(left if half == 0 else right, BLOCK_M, QUARTER)
        n0 = n * BLOCK_N + half * 2 * QUARTER
        dw += _finish_columns(
            first, w, pre_ptr, dpre_ptr, act_ptr, offs_m, end, n0, I, stride_prem, stride_pren,
            KIND, GATED, INTERLEAVED, LIMIT, ALPHA, UP_SHIFT, QUARTER,
        )  # fmt: skip
        dw += _finish_columns(
            second, w, pre_ptr, dpre_ptr, act_ptr, offs_m, end, n0 + QUARTER, I, stride_prem, stride_pren,
            KIND, GATED, INTERLEAVED, LIMIT, ALPHA, UP_SHIFT, QUARTER,
        )  # fmt: skip
    tl.store(partial_ptr + n * stride_partial + offs_m, dw, mask=offs_m < end)


@triton.jit
def _linear_act_backward_kernel(
    dout_ptr, weight_ptr, weight_desc, yb_ptr, lora_A_ptr, pre_ptr, top_k_weights_ptr, dpre_ptr, act_ptr, partial_ptr,
    seed_ptr, row_token_ptr, row_slot_ptr, expert_offsets_ptr, tiles_ptr, max_tiles, I, H, r,  # noqa: E741
    stride_xm, stride_xk, stride_we, stride_wn, stride_wk, stride_ybm, stride_ybr, stride_ae, stride_an, stride_ar,
    stride_prem, stride_pren, stride_partial,
    KIND: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr,
    UP_SHIFT: tl.constexpr, P: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    K_UNIT: tl.constexpr,
):  # fmt: skip
    """Persistent grid: each program takes every num_programs-th output tile."""
    num_tiles = tl.load(tiles_ptr + 2 * max_tiles + 1)
    num_n = tl.cdiv(I, BLOCK_N)
    for t in range(tl.program_id(0), num_tiles * num_n, tl.num_programs(0)):
        tile, n = position(t, num_tiles, num_n, GROUP)
        # int64: an expert index times a stride passes 2**31
        e = tl.load(tiles_ptr + 2 * tile).to(tl.int64)
        first_row = tl.load(tiles_ptr + 2 * tile + 1)
        end = tl.load(expert_offsets_ptr + e + 1)
        if TAIL and end - first_row <= BLOCK_M // 2:
            _linear_act_backward_tile(
                dout_ptr, weight_ptr, weight_desc, yb_ptr, lora_A_ptr, pre_ptr, top_k_weights_ptr, dpre_ptr, act_ptr,
                partial_ptr, seed_ptr, row_token_ptr, row_slot_ptr, e, first_row, end, n, I, H, r, stride_xm,
                stride_xk, stride_we, stride_wn, stride_wk, stride_ybm, stride_ybr, stride_ae, stride_an, stride_ar,
                stride_prem, stride_pren, stride_partial, KIND, GATED, INTERLEAVED, LIMIT, ALPHA, UP_SHIFT, P, R,
                PRECISION, BLOCK_M // 2, BLOCK_N, BLOCK_K, EVEN_K, K_UNIT,
            )  # fmt: skip
        else:
            _linear_act_backward_tile(
                dout_ptr, weight_ptr, weight_desc, yb_ptr, lora_A_ptr, pre_ptr, top_k_weights_ptr, dpre_ptr, act_ptr,
                partial_ptr, seed_ptr, row_token_ptr, row_slot_ptr, e, first_row, end, n, I, H, r, stride_xm,
                stride_xk, stride_we, stride_wn, stride_wk, stride_ybm, stride_ybr, stride_ae, stride_an, stride_ar,
                stride_prem, stride_pren, stride_partial, KIND, GATED, INTERLEAVED, LIMIT, ALPHA, UP_SHIFT, P, R,
                PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, K_UNIT,
            )  # fmt: skip


@triton.jit
def _weight_gradient_kernel(
    partial_ptr, bias_ptr, dout_ptr, slot_row_ptr, expert_offsets_ptr, out_ptr, S, E, H, top_k, num_n,
    stride_partial, stride_biase, stride_biasn, stride_xm, stride_xk,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, E_PADDED: tl.constexpr,
):  # fmt: skip
    """Grid [slots / BLOCK_S]: out[slot] = sum over n of partial[n, row] + <bias[e], dout[token]>, 0 for a sentinel."""
    slots = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    row = tl.load(slot_row_ptr + slots, mask=slots < S, other=-1)
    real = row >= 0
    dw = tl.zeros((BLOCK_S,), dtype=tl.float32)
    for n in range(num_n):
        dw += tl.load(partial_ptr + n * stride_partial + row, mask=real, other=0.0)
    if bias_ptr is not None:
        experts = tl.arange(0, E_PADDED)
        ends = tl.load(expert_offsets_ptr + 1 + experts, mask=experts < E, other=2**31 - 1)
        e = tl.sum((ends[None, :] <= row[:, None]).to(tl.int32), axis=1).to(tl.int64)
        bias_ptrs = bias_ptr + e[:, None] * stride_biase
        dout_ptrs = dout_ptr + (slots // top_k).to(tl.int64)[:, None] * stride_xm
        for h0 in range(0, H, BLOCK_H):
            offs_h = h0 + tl.arange(0, BLOCK_H)
            mask = real[:, None] & (offs_h < H)[None, :]
            bias = tl.load(bias_ptrs + offs_h[None, :] * stride_biasn, mask=mask, other=0.0).to(tl.float32)
            dout = tl.load(dout_ptrs + offs_h[None, :] * stride_xk, mask=mask, other=0.0).to(tl.float32)
            dw += tl.sum(bias * dout, axis=1)
    tl.store(out_ptr + slots, dw, mask=slots < S)


def expert_linear_act_backward(
    dout: torch.Tensor,
    weight: torch.Tensor,
    routing: Routing,
    activation: Activation,
    pre: torch.Tensor,
    top_k_weights: torch.Tensor,
    *,
    yb: torch.Tensor | None = None,
    lora_A: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From the gradient of the combined output to that of the pre-activation and of the routing weights.

    Args:
        dout: [T, H]; row m reads token row_token[m].
        weight: [E, I, H] dtype of dout, the down weight transposed, any strides.
        pre: [M, N] kept by forward.
        top_k_weights: [T, top_k] float.
        yb: [M, r] = scaling * B[e]^T dout[t], with lora_A [E, I, r], the down A transposed, any strides and dtype.
        bias: [E, H], the down bias.
        dropout: masks the low-rank term of draw.
    Returns: dpre [M, N], act [M, I] (dtype of pre), d_top_k_weights [T, top_k] fp32, 0 for sentinels.
    Twin: `reference.expert_linear_act_backward`.
    """
    routing = with_tiles(routing)
    M, (E, I, H) = routing.num_rows, weight.shape  # noqa: E741
    dpre = torch.empty(pre.shape, dtype=pre.dtype, device=pre.device)
    act = torch.empty(M, I, dtype=pre.dtype, device=pre.device)
    d_top_k_weights = torch.empty(top_k_weights.shape, dtype=torch.float32, device=pre.device)
    if M == 0:
        return dpre, act, d_top_k_weights
    programs, blocks, weight_desc = launch_facts("linear_act_backward", dout, weight, routing.block_m)
    num_n = triton.cdiv(I, blocks["BLOCK_N"])
    partial = torch.empty(num_n, M, dtype=torch.float32, device=pre.device)
    r = 0 if yb is None else yb.shape[1]
    _linear_act_backward_kernel[(programs,)](
        dout, weight, weight_desc, yb, lora_A, pre, top_k_weights.contiguous(), dpre, act, partial,
        dropout.seed if dropout else None, routing.row_token, routing.row_slot, routing.expert_offsets, routing.tiles,
        routing.tiles.shape[0] - 1, I, H, r,
        *dout.stride(), *weight.stride(), *strides_or_zeros(yb, 2), *strides_or_zeros(lora_A, 3), *pre.stride(), M,
        KIND=activation.kind, GATED=activation.gated, INTERLEAVED=activation.interleaved, LIMIT=activation.limit,
        ALPHA=activation.alpha, UP_SHIFT=activation.up_shift,
        P=dropout.p if dropout else 0.0, R=padded_rank(r), PRECISION=dot_precision(dout.dtype), **blocks,
    )  # fmt: skip
    block_s = 128 if bias is None else 16
    _weight_gradient_kernel[(triton.cdiv(M, block_s),)](
        partial, bias, dout, routing.slot_row, routing.expert_offsets, d_top_k_weights, M, E, H, routing.top_k, num_n,
        M, *strides_or_zeros(bias, 2), *dout.stride(),
        BLOCK_S=block_s, BLOCK_H=256, E_PADDED=triton.next_power_of_2(E),
    )  # fmt: skip
    return dpre, act, d_top_k_weights
