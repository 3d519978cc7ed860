"""out[t] = sum over the slots j of w[t, j] * y[slot_row[t, j]]: from rows back to tokens.

One program gathers the rows of a token and adds them in slot order, so there are no atomics.
Gradients: dy[m] = w[slot] * dout[t], dw[slot] = <y[m], dout[t]>.
"""

import torch
import triton
import triton.language as tl

from ..routing import Routing
from .launching.launch import facts, launch
from .launching.table import ceil_div, device_facts, find, power_of_2
from .operands import Operand

# slots whose rows are loaded at the same time
UNROLLED = 8


@triton.jit
def _combine_kernel(
    y, top_k_weights, slot_row_ptr, out_ptr, N, top_k, UNROLLED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid [T, tiles of N]: one token each."""
    t = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for j0 in range(0, top_k, UNROLLED):
        for u in tl.static_range(UNROLLED):
            slot = t * top_k + j0 + u
            row = tl.load(slot_row_ptr + slot, mask=slot < (t + 1) * top_k, other=-1).to(tl.int64)
            # a sentinel's row is not read at all: it may hold NaN, and NaN times zero is NaN
            mask_y = offs_n < tl.where(row >= 0, N, 0)
            y_ptrs = y.ptr + row * y.stride_m + offs_n * y.stride_k
            term = tl.load(y_ptrs, mask=mask_y, other=0.0).to(tl.float32)
            if top_k_weights.ptr is not None:
                w_ptr = top_k_weights.ptr + t * top_k_weights.stride_m
                w_ptr += (j0 + u) * top_k_weights.stride_k
                term *= tl.load(w_ptr, mask=row >= 0, other=0.0).to(tl.float32)
            acc += term
    tl.store(out_ptr + t * N + offs_n, acc.to(out_ptr.dtype.element_ty), mask=offs_n < N)


@triton.jit
def _combine_backward_kernel(
    dout, y, top_k_weights, slot_row_ptr, dy_ptr, dw_ptr, N, top_k, BLOCK_N: tl.constexpr
):
    """Grid [T * top_k]: one slot each. A sentinel has no row; its dw is 0."""
    slot = tl.program_id(0).to(tl.int64)
    t = slot // top_k
    j = slot % top_k
    row = tl.load(slot_row_ptr + slot).to(tl.int64)
    dw = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if row >= 0:
        w_ptr = top_k_weights.ptr + t * top_k_weights.stride_m + j * top_k_weights.stride_k
        w = tl.load(w_ptr).to(tl.float32)
        for n in range(0, N, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            mask_n = offs_n < N
            dout_ptrs = dout.ptr + t * dout.stride_m + offs_n * dout.stride_k
            dout_tile = tl.load(dout_ptrs, mask=mask_n, other=0.0).to(tl.float32)
            y_ptrs = y.ptr + row * y.stride_m + offs_n * y.stride_k
            y_tile = tl.load(y_ptrs, mask=mask_n, other=0.0).to(tl.float32)
            dy = (w * dout_tile).to(dy_ptr.dtype.element_ty)
            tl.store(dy_ptr + row * N + offs_n, dy, mask=mask_n)
            dw += y_tile * dout_tile
    tl.store(dw_ptr + slot, tl.sum(dw, axis=0))


def combine(
    y: torch.Tensor,
    routing: Routing,
    top_k_weights: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """out[t] = sum over the slots j of top_k_weights[t, j] * y[slot_row[t, j]], summed in fp32.

    Args:
        y: [M, N] float rows in expert order.
        top_k_weights: [T, top_k] float; None for ones.
        dtype: dtype of the result; by default that of y.
    Returns: [T, N]; a sentinel slot adds nothing.
    Twin: `reference.combine`.
    """
    T = routing.num_tokens
    N = y.shape[1]
    top_k = routing.top_k
    out = torch.empty(T, N, dtype=dtype or y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    arch, _ = device_facts(y.device)
    blocks = find("combine", arch, y.element_size(), 16)

    def arguments() -> tuple[tuple, tuple, dict]:
        operands = Operand.of(y), Operand.of(top_k_weights), routing.slot_row, out
        return operands, (N, top_k), {"UNROLLED": min(UNROLLED, power_of_2(top_k)), **blocks}

    key = "combine", facts(y, top_k_weights), out.dtype, N, top_k
    grid = T, ceil_div(N, blocks["BLOCK_N"]), 1
    tensors = y, top_k_weights, routing.slot_row, out
    launch(key, _combine_kernel, grid, tensors, arguments)
    return out


def combine_backward(
    dout: torch.Tensor,
    y: torch.Tensor,
    routing: Routing,
    top_k_weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dy[m] = w[slot] * dout[t], d_top_k_weights[slot] = <y[m], dout[t]>.

    Args:
        dout: [T, N] float.
        y: [M, N] float rows in expert order.
        top_k_weights: [T, top_k] float.
    Returns: dy [M, N] (dtype of y), d_top_k_weights [T, top_k] fp32, 0 for sentinels.
    Twin: `reference.combine_backward`.
    """
    M = routing.num_rows
    N = y.shape[1]
    top_k = routing.top_k
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    dw = torch.empty(top_k_weights.shape, dtype=torch.float32, device=y.device)
    if M == 0:
        return dy, dw

    def arguments() -> tuple[tuple, tuple, dict]:
        arch, _ = device_facts(y.device)
        read = Operand.of(dout), Operand.of(y), Operand.of(top_k_weights)
        operands = *read, routing.slot_row, dy, dw
        return operands, (N, top_k), find("combine", arch, y.element_size(), 16)

    key = "combine_backward", facts(dout, y, top_k_weights), N, top_k
    tensors = dout, y, top_k_weights, routing.slot_row, dy, dw
    launch(key, _combine_backward_kernel, (M, 1, 1), tensors, arguments)
    return dy, dw
