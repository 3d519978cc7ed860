"""xa[m] = scaling * A[e] x[row], and out[e, k, j] = sum over the rows m of e of w[m] * x[row, k] * right[m, j].

`expert_shrink` and `expert_outer` of the same rows, which backward asks of dout and of dpre, in one reading of them.
A program has all rows of a chunk and goes over their columns, 64 a step. So a step's part of out is whole, and is
stored; of xa, sums over the columns, all is held. Loads of a step are on their way while the one before is multiplied,
and of two programs a multiprocessor one multiplies while the other waits.

Time over that of the two operations, dout and dpre, r = 16 (NVIDIA H200, 2026-11-24; 8192 tokens): qwen3.5-35b 0.62
and 0.60, qwen3-30b 0.76 and 0.71 (2048 tokens: 0.60 and 0.69), olmoe 0.77 and 0.69, the gpt-oss shape 0.89 and 0.81,
the deepseek-v3 slice 0.70 and 0.71; mixtral, of 51 chunks, 1.5 and 1.3.
In Triton, whose loads of a step begin when the step before is done with, unless a third is kept: 0.82 and 0.66 at
qwen3.5-35b. Over what stands here, there and at qwen3-30b: warps of three roles, which load, shrink and take outer
products, 1.01 and 0.96 of dout, 1.04 and 1.01 of dpre (the gpt-oss shape, of 102 chunks, 0.68 and 0.86); programs that
begin at different columns 1.02 and 1.04; products of a step begun ahead of the next loads 1.00.

Written in Gluon for wgmma, of compute capability 9.0; `in_gluon` imports it.

Legend:
    chunks: those of `outer`, of up to ROWS + TAIL rows; all of an expert's are of one size, give or take a row
    rows [STAGES, ROWS, 64], tails [STAGES, TAIL, 64]: the chunk's rows of each step; zeros where it has fewer
    lora_A [STAGES, 64, RANKS]; right [ROWS, RANKS] and right_tail [TAIL, RANKS], weighted
    partial_ptr [max_chunks, K, r] fp32: out of one chunk, where its expert has more than one
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ...routing import Routing
from ..launching.launch import facts, launch
from ..launching.table import power_of_2
from ..tiles.chunks import sum_chunks
from .pieces import NARROW, RANKS, WIDE, barrier, chunk_of, load_rows

# columns of a step
BLOCK_K = gl.constexpr(64)
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))
# threads that copy rows, and that load ranks of A and of right, 16 bytes each
BY_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
BY_FOUR = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
BY_EIGHT = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0]))
BY_EXPERT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _row_pointers(
    x_ptr, row_token_ptr, first_row, end, stride_xm, GATHER: gl.constexpr, ROWS: gl.constexpr
):
    """Where the first columns of so many rows lie, and which rows there are."""
    offs_m = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, BY_ROWS))
    rows = gl.load(row_token_ptr + offs_m, mask=offs_m < end, other=0) if GATHER else offs_m
    cols = gl.arange(0, BLOCK_K, gl.SliceLayout(0, BY_ROWS))
    return x_ptr + rows.to(gl.int64)[:, None] * stride_xm + cols[None, :], (offs_m < end)[:, None]


@gluon.jit
def _put_right(there, right_ptr, row_weights_ptr, row_slot_ptr, first_row, end, r):
    """w[m] * right[m] of so many rows and of RANKS into shared memory, zeros where there are fewer."""
    offs_m = first_row + gl.arange(0, there.shape[0], gl.SliceLayout(1, BY_EIGHT))
    offs_r = gl.arange(0, RANKS, gl.SliceLayout(0, BY_EIGHT))
    mask = (offs_m < end)[:, None] & (offs_r < r)[None, :]
    right = gl.load(
        right_ptr + offs_m.to(gl.int64)[:, None] * r + offs_r[None, :], mask=mask, other=0.0
    )
    if row_weights_ptr is not None:
        slots = gl.load(row_slot_ptr + offs_m, mask=offs_m < end, other=0)
        w = gl.load(row_weights_ptr + slots, mask=offs_m < end, other=0.0).to(gl.float32)
        right = (right.to(gl.float32) * w[:, None]).to(right_ptr.dtype.element_ty)
    there.store(right)


@gluon.jit
def _store_xa(xa_ptr, acc, scaling, first_row, end, r):
    offs_m = first_row + gl.arange(0, acc.shape[0], gl.SliceLayout(1, SUMS))
    offs_r = gl.arange(0, RANKS, gl.SliceLayout(0, SUMS))
    ptrs = xa_ptr + offs_m.to(gl.int64)[:, None] * r + offs_r[None, :]
    gl.store(
        ptrs,
        (acc * scaling).to(xa_ptr.dtype.element_ty),
        mask=(offs_m < end)[:, None] & (offs_r < r)[None, :],
    )


@gluon.jit
def _shrink_outer_kernel(
    x_ptr, lora_A_ptr, right_ptr, row_weights_ptr, row_token_ptr, row_slot_ptr, expert_offsets_ptr, xa_ptr,
    partial_ptr, out_ptr, E, K, r, scaling,
    stride_xm, stride_ae, stride_ar, stride_ak, stride_oe, stride_ok, stride_or,
    E_PADDED: gl.constexpr, GATHER: gl.constexpr, ROWS: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid [max_chunks]: an expert of one chunk or no row goes straight to out."""
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    chunk = gl.program_id(0)
    e, index = chunk_of(chunk, expert_offsets_ptr, E, ROWS + TAIL, E_PADDED, BY_EXPERT)
    if e >= E:
        return
    first_row, end = gl.load(expert_offsets_ptr + e), gl.load(expert_offsets_ptr + e + 1)
    chunks = gl.maximum(gl.cdiv(end - first_row, ROWS + TAIL), 1)
    size = gl.cdiv(end - first_row, chunks)
    first_row += index * size
    end = gl.minimum(end, first_row + size)
    # int64: an expert index times a stride passes 2**31
    e, tail_row = e.to(gl.int64), first_row + ROWS

    rows = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK_K], WIDE)
    tails = gl.allocate_shared_memory(dtype, [STAGES, TAIL, BLOCK_K], WIDE)
    lora_A = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, RANKS], NARROW)
    right = gl.allocate_shared_memory(dtype, [ROWS, RANKS], NARROW)
    right_tail = gl.allocate_shared_memory(dtype, [TAIL, RANKS], NARROW)

    x_ptrs, mask_x = _row_pointers(x_ptr, row_token_ptr, first_row, end, stride_xm, GATHER, ROWS)
    tail_ptrs, mask_tail = _row_pointers(
        x_ptr, row_token_ptr, tail_row, end, stride_xm, GATHER, TAIL
    )
    for i in gl.static_range(STAGES - 1):
        load_rows(rows.index(i), x_ptrs, mask_x & (i * BLOCK_K < K))
        load_rows(tails.index(i), tail_ptrs, mask_tail & (i * BLOCK_K < K))
        async_copy.commit_group()
        x_ptrs += BLOCK_K
        tail_ptrs += BLOCK_K
    a_k = gl.arange(0, BLOCK_K, gl.SliceLayout(1, BY_FOUR)).to(gl.int64)[:, None]
    a_r = gl.arange(0, RANKS, gl.SliceLayout(0, BY_FOUR)).to(gl.int64)[None, :]
    a_ptrs = lora_A_ptr + e * stride_ae + a_r * stride_ar + a_k * stride_ak
    a = gl.load(a_ptrs, mask=(a_r < r) & (a_k < K), other=0.0)
    _put_right(right, right_ptr, row_weights_ptr, row_slot_ptr, first_row, end, r)
    _put_right(right_tail, right_ptr, row_weights_ptr, row_slot_ptr, tail_row, end, r)

    out_k = gl.arange(0, BLOCK_K, gl.SliceLayout(1, SUMS)).to(gl.int64)[:, None]
    out_r = gl.arange(0, RANKS, gl.SliceLayout(0, SUMS)).to(gl.int64)[None, :]
    mask_out = (out_r < r) & (out_k >= 0)
    out_ptrs = out_ptr + e * stride_oe + out_r * stride_or + out_k * stride_ok
    partial_ptrs = partial_ptr + chunk.to(gl.int64) * K * r + out_k * r + out_r
    acc = gl.zeros([ROWS, RANKS], gl.float32, SUMS)
    acc_tail = gl.zeros([TAIL, RANKS], gl.float32, SUMS)
    steps = K // BLOCK_K
    for i in range(steps):
        s, ahead = i % STAGES, i + STAGES - 1
        lora_A.index(s).store(a.to(dtype))
        async_copy.wait_group(STAGES - 2)
        # products are to see what threads wrote, and have read what the next loads replace
        fence_async_shared()
        barrier()
        load_rows(rows.index(ahead % STAGES), x_ptrs, mask_x & (ahead < steps))
        load_rows(tails.index(ahead % STAGES), tail_ptrs, mask_tail & (ahead < steps))
        async_copy.commit_group()
        x_ptrs += BLOCK_K
        tail_ptrs += BLOCK_K
        a_ptrs += BLOCK_K * stride_ak
        a = gl.load(a_ptrs, mask=(a_r < r) & (a_k < K - (i + 1) * BLOCK_K), other=0.0)
        x, tail = rows.index(s), tails.index(s)
        acc = warpgroup_mma(x, lora_A.index(s), acc, is_async=True)  # [M, K] @ [K, R] -> [M, R]
        acc_tail = warpgroup_mma(tail, lora_A.index(s), acc_tail, is_async=True)
        outer = gl.zeros([BLOCK_K, RANKS], gl.float32, SUMS)
        outer = warpgroup_mma(
            x.permute([1, 0]), right, outer, is_async=True
        )  # [K, M] @ [M, R] -> [K, R]
        outer = warpgroup_mma(tail.permute([1, 0]), right_tail, outer, is_async=True)
        acc, acc_tail, outer = warpgroup_mma_wait(0, deps=[acc, acc_tail, outer])
        if chunks > 1:
            gl.store(partial_ptrs, outer, mask=mask_out)
        else:
            gl.store(out_ptrs, outer, mask=mask_out)
        partial_ptrs += BLOCK_K * r
        out_ptrs += BLOCK_K * stride_ok
    _store_xa(xa_ptr, acc, scaling, first_row, end, r)
    _store_xa(xa_ptr, acc_tail, scaling, tail_row, end, r)


def shrink_outer(
    blocks: dict,
    x: torch.Tensor,
    lora_A: torch.Tensor,
    right: torch.Tensor,
    routing: Routing,
    scaling: float,
    out: torch.Tensor,
    row_weights: torch.Tensor | None,
    gather: bool,
) -> torch.Tensor | None:
    """`expert_shrink_outer`, or None where ranks, strides or alignment forbid.

    Args:
        blocks: constexprs of the table's row.
    """
    M, (E, r, K), chunk = routing.num_rows, lora_A.shape, blocks["ROWS"] + blocks["TAIL"]
    # rows are copied 16 bytes at a time
    aligned = x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    if r > RANKS.value or K % BLOCK_K.value or not aligned:
        return None
    several = M > chunk
    max_chunks = E + several * (M // chunk)
    xa = torch.empty(M, r, dtype=x.dtype, device=x.device)
    partial = torch.empty(several * max_chunks, K, r, dtype=torch.float32, device=x.device)
    right = right.contiguous()
    weights = None if row_weights is None else row_weights.contiguous()

    def rest():
        constants = {"E_PADDED": power_of_2(E), "GATHER": gather, **blocks}
        return (E, K, r, scaling, x.stride(0), *lora_A.stride(), *out.stride()), constants

    key = "shrink_outer", facts(x, lora_A, weights, out), E, K, r, scaling, gather, chunk
    tensors = (
        x, lora_A, right, weights, routing.row_token, routing.row_slot, routing.expert_offsets, xa, partial, out,
    )  # fmt: skip
    launch(key, _shrink_outer_kernel, (max_chunks, 1, 1), tensors, rest)
    if several:
        strides = out.stride(0), out.stride(2), out.stride(1)
        sum_chunks(partial.transpose(1, 2), routing, out, strides, chunk)
    return xa
