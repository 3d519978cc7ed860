"""The shrink and the outer product of the same rows x, by one kernel that reads them once:

    xa[m] = scaling * A[e] x[row]
    out[e, k, j] = sum over the rows m of e of w[m] * x[row, k] * right[m, j]

Backward needs both for dout and for dpre. A program has all rows of a chunk and loops over their
columns, 64 columns a step. Each step completes its columns of out and stores them. xa is a sum over
all columns, so it stays in registers until the end. The operands of the next step are loaded while
this step is multiplied. Two programs run on each multiprocessor, so that one multiplies while the
other waits. The kernel takes 0.60 to 0.89 of the time of the two operations at r = 16, if there are
enough chunks (NVIDIA H200, 2026-11-24; docs/performance.md).

It is written in Gluon for wgmma, which only compute capability 9.0 has. `in_gluon` imports it.

Legend:
    chunks: as in `tiles.chunks`, of up to ROWS + TAIL rows; the chunks of one expert differ by at
        most one row
    rows [STAGES, ROWS, 64], tails [STAGES, TAIL, 64]: each step's columns of the chunk's first ROWS
        rows and of its other rows; zeros if the chunk has fewer rows
    columns_A [STAGES, 64, RANKS]: each step's columns of A[e]
    right [ROWS, RANKS], right_tail [TAIL, RANKS]: w[m] * right[m] of the same rows
    width: columns of xa and right in memory, of which those past rank r are zeros
    RANKS: r rounded up to the columns of a tile
    partial_ptr [max_chunks, K, r] fp32: the sums of each chunk; used only for experts with several
        chunks
"""

from typing import Any, NamedTuple

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
from ..launching.table import options_of, power_of_2
from ..operands import Operand, Weight
from ..tiles.chunks import sum_chunks
from .pieces import MAX_RANKS, WIDE, barrier, chunk_of, load_rows, narrow, ranks_for

# columns of a step
BLOCK_K = gl.constexpr(64)
# layouts of 128 threads: to copy x, and to load A, right (16 bytes a thread each) and offsets
BY_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
BY_FOUR = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
BY_EIGHT = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [4, 1], [1, 0]))
BY_EXPERT = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _columns_left(left):
    """Mask [1, 64] of the columns of a step, of which `left`, a multiple of 8, exist."""
    cols = gl.arange(0, BLOCK_K, gl.SliceLayout(0, BY_ROWS))
    # in a form in which the compiler sees that eight columns have one mask
    return (cols // 8 < left // 8)[None, :]


@gluon.jit
def _row_pointers(x, row_token_ptr, first_row, end, GATHER: gl.constexpr, ROWS: gl.constexpr):
    """(pointers [ROWS, 64] to the first 64 columns, mask [ROWS, 1] of the rows before end)."""
    offs_m = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, BY_ROWS))
    rows = offs_m
    if GATHER:
        rows = gl.load(row_token_ptr + offs_m, mask=offs_m < end, other=0)
    cols = gl.arange(0, BLOCK_K, gl.SliceLayout(0, BY_ROWS))
    ptrs = x.ptr + rows.to(gl.int64)[:, None] * x.stride_m + cols[None, :]
    return ptrs, (offs_m < end)[:, None]


@gluon.jit
def _store_right(smem, right_ptr, row_weights_ptr, row_slot_ptr, first_row, end, width):
    """Store w[m] * right[m] into smem [rows, RANKS]; zeros past `end` and past `width`."""
    offs_m = first_row + gl.arange(0, smem.shape[0], gl.SliceLayout(1, BY_EIGHT))
    offs_r = gl.arange(0, smem.shape[1], gl.SliceLayout(0, BY_EIGHT))
    mask = (offs_m < end)[:, None] & (offs_r < width)[None, :]
    right = gl.load(
        right_ptr + offs_m.to(gl.int64)[:, None] * width + offs_r[None, :], mask=mask, other=0.0
    )
    if row_weights_ptr is not None:
        slots = gl.load(row_slot_ptr + offs_m, mask=offs_m < end, other=0)
        w = gl.load(row_weights_ptr + slots, mask=offs_m < end, other=0.0).to(gl.float32)
        right = (right.to(gl.float32) * w[:, None]).to(right_ptr.dtype.element_ty)
    smem.store(right)


@gluon.jit
def _store_xa(xa_ptr, acc, scaling, first_row, end, r, width):
    """Store scaling * acc of the rows before end; zeros past rank r, also if a row is infinite."""
    offs_m = first_row + gl.arange(0, acc.shape[0], gl.SliceLayout(1, acc.type.layout))
    offs_r = gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    ptrs = xa_ptr + offs_m.to(gl.int64)[:, None] * width + offs_r[None, :]
    xa = gl.where((offs_r < r)[None, :], acc * scaling, 0.0)
    gl.store(
        ptrs,
        xa.to(xa_ptr.dtype.element_ty),
        mask=(offs_m < end)[:, None] & (offs_r < width)[None, :],
    )


class _Sizes(NamedTuple):
    """Experts, columns of x, rank, and columns of xa and right in memory."""

    E: Any
    K: Any
    r: Any
    width: Any


class _Tile(NamedTuple):
    """Constants of the kernel.

    Attributes:
        ROWS, TAIL, RANKS: as in the legend.
        STAGES: of the pipeline.
        E_PADDED: E, padded to a power of two.
        GATHER: whether x is gathered.
    """

    ROWS: Any
    TAIL: Any
    RANKS: Any
    STAGES: Any
    E_PADDED: Any
    GATHER: Any


@gluon.jit
def _shrink_outer_kernel(
    x, lora_A, right_ptr, row_weights_ptr, row_token_ptr, row_slot_ptr, expert_offsets_ptr, xa_ptr,
    partial_ptr, out, sizes, scaling, TILE,
):  # fmt: skip
    """Grid [max_chunks]. Sums of an expert with one chunk or without rows are stored to out."""
    _, K, r, width = sizes
    ROWS: gl.constexpr = TILE.ROWS
    TAIL: gl.constexpr = TILE.TAIL
    RANKS: gl.constexpr = TILE.RANKS
    STAGES: gl.constexpr = TILE.STAGES
    dtype: gl.constexpr = x.ptr.dtype.element_ty
    NARROW: gl.constexpr = narrow(RANKS)
    # layout of wgmma's sums
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, RANKS, 16])
    chunk = gl.program_id(0)
    e, index = chunk_of(chunk, expert_offsets_ptr, sizes.E, ROWS + TAIL, TILE.E_PADDED, BY_EXPERT)
    if e >= sizes.E:
        return
    first_row = gl.load(expert_offsets_ptr + e)
    end = gl.load(expert_offsets_ptr + e + 1)
    chunks = gl.maximum(gl.cdiv(end - first_row, ROWS + TAIL), 1)
    size = gl.cdiv(end - first_row, chunks)
    first_row += index * size
    end = gl.minimum(end, first_row + size)
    # int64: an expert index times a stride passes 2**31
    e = e.to(gl.int64)
    tail_row = first_row + ROWS

    rows = gl.allocate_shared_memory(dtype, [STAGES, ROWS, BLOCK_K], WIDE)
    tails = gl.allocate_shared_memory(dtype, [STAGES, TAIL, BLOCK_K], WIDE)
    columns_A = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, RANKS], NARROW)
    right = gl.allocate_shared_memory(dtype, [ROWS, RANKS], NARROW)
    right_tail = gl.allocate_shared_memory(dtype, [TAIL, RANKS], NARROW)

    x_ptrs, mask_x = _row_pointers(x, row_token_ptr, first_row, end, TILE.GATHER, ROWS)
    tail_ptrs, mask_tail = _row_pointers(x, row_token_ptr, tail_row, end, TILE.GATHER, TAIL)
    for i in gl.static_range(STAGES - 1):
        mask_k = _columns_left(K - i * BLOCK_K)
        load_rows(rows.index(i), x_ptrs, mask_x & mask_k)
        load_rows(tails.index(i), tail_ptrs, mask_tail & mask_k)
        async_copy.commit_group()
        x_ptrs += BLOCK_K
        tail_ptrs += BLOCK_K
    a_k = gl.arange(0, BLOCK_K, gl.SliceLayout(1, BY_FOUR)).to(gl.int64)[:, None]
    a_r = gl.arange(0, RANKS, gl.SliceLayout(0, BY_FOUR)).to(gl.int64)[None, :]
    a_ptrs = lora_A.ptr + e * lora_A.stride_e + a_r * lora_A.stride_n + a_k * lora_A.stride_k
    a = gl.load(a_ptrs, mask=(a_r < r) & (a_k < K), other=0.0)
    _store_right(right, right_ptr, row_weights_ptr, row_slot_ptr, first_row, end, width)
    _store_right(right_tail, right_ptr, row_weights_ptr, row_slot_ptr, tail_row, end, width)

    out_k = gl.arange(0, BLOCK_K, gl.SliceLayout(1, SUMS)).to(gl.int64)[:, None]
    out_r = gl.arange(0, RANKS, gl.SliceLayout(0, SUMS)).to(gl.int64)[None, :]
    exists = (out_r < r) & (out_k >= 0)
    out_ptrs = out.ptr + e * out.stride_e + out_r * out.stride_k + out_k * out.stride_n
    partial_ptrs = partial_ptr + chunk.to(gl.int64) * K * r + out_k * r + out_r
    acc = gl.zeros([ROWS, RANKS], gl.float32, SUMS)
    acc_tail = gl.zeros([TAIL, RANKS], gl.float32, SUMS)
    steps = gl.cdiv(K, BLOCK_K)
    for i in range(steps):
        s = i % STAGES
        ahead = i + STAGES - 1
        columns_A.index(s).store(a.to(dtype))
        async_copy.wait_group(STAGES - 2)
        # the fence makes what threads wrote visible to wgmma. After the barrier all products of the
        # previous step are done, so the next loads may overwrite their operands
        fence_async_shared()
        barrier()
        mask_k = _columns_left(K - ahead * BLOCK_K)
        load_rows(rows.index(ahead % STAGES), x_ptrs, mask_x & mask_k)
        load_rows(tails.index(ahead % STAGES), tail_ptrs, mask_tail & mask_k)
        async_copy.commit_group()
        x_ptrs += BLOCK_K
        tail_ptrs += BLOCK_K
        a_ptrs += BLOCK_K * lora_A.stride_k
        a = gl.load(a_ptrs, mask=(a_r < r) & (a_k < K - (i + 1) * BLOCK_K), other=0.0)
        step_rows = rows.index(s)
        tail = tails.index(s)
        # [M, K] @ [K, R] -> [M, R]
        acc = warpgroup_mma(step_rows, columns_A.index(s), acc, is_async=True)
        acc_tail = warpgroup_mma(tail, columns_A.index(s), acc_tail, is_async=True)
        # [K, M] @ [M, R] -> [K, R]
        outer = gl.zeros([BLOCK_K, RANKS], gl.float32, SUMS)
        outer = warpgroup_mma(step_rows.permute([1, 0]), right, outer, is_async=True)
        outer = warpgroup_mma(tail.permute([1, 0]), right_tail, outer, is_async=True)
        acc, acc_tail, outer = warpgroup_mma_wait(0, deps=[acc, acc_tail, outer])
        mask_out = exists & (out_k < K - i * BLOCK_K)
        if chunks > 1:
            gl.store(partial_ptrs, outer, mask=mask_out)
        else:
            gl.store(out_ptrs, outer, mask=mask_out)
        partial_ptrs += BLOCK_K * r
        out_ptrs += BLOCK_K * out.stride_n
    _store_xa(xa_ptr, acc, scaling, first_row, end, r, width)
    _store_xa(xa_ptr, acc_tail, scaling, tail_row, end, r, width)


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
    """`expert_shrink_outer`, or None if rank, K, strides or alignment do not allow it.

    Args:
        blocks: constexprs of the table's row.
        x: [M, K] rows, or [T, K] tokens with gather.
        lora_A: [E, r, K], any strides and float dtype. right: [M, R] rows of rank r, dtype of x.
        out: [E, K, r] fp32, any strides; every element is written.
        row_weights: [T, top_k] float, for the outer product; None for ones.
    Returns: xa [M, R], dtype of x; or None, and then nothing is written.
    """
    M = routing.num_rows
    E, r, K = lora_A.shape
    chunk = blocks["ROWS"] + blocks["TAIL"]
    # rows are copied 16 bytes at a time
    aligned = x.stride(1) == 1 and x.stride(0) % 16 == 0 and x.data_ptr() % 16 == 0
    if r > MAX_RANKS or K % 8 or not aligned:
        return None
    # if all rows fit into one chunk, no expert has several
    several = M > chunk
    max_chunks = E + several * (M // chunk)
    width = right.shape[1]
    xa = torch.empty(M, width, dtype=x.dtype, device=x.device)
    partial = torch.empty(several * max_chunks, K, r, dtype=torch.float32, device=x.device)
    right = right.contiguous()
    weights = row_weights
    if row_weights is not None:
        weights = row_weights.contiguous()

    def arguments() -> tuple[tuple, tuple, dict]:
        tile = _Tile(
            ROWS=blocks["ROWS"],
            TAIL=blocks["TAIL"],
            RANKS=ranks_for(r),
            STAGES=blocks["STAGES"],
            E_PADDED=power_of_2(E),
            GATHER=gather,
        )
        operands = (
            Operand.of(x), Weight.of(lora_A), right, weights, routing.row_token, routing.row_slot,
            routing.expert_offsets, xa, partial, Weight.of(out),
        )  # fmt: skip
        return operands, (_Sizes(E, K, r, width), scaling), {"TILE": tile, **options_of(blocks)}

    key = "shrink_outer", facts(x, lora_A, weights, out), E, K, r, scaling, gather, chunk
    tensors = (
        x, lora_A, right, weights, routing.row_token, routing.row_slot, routing.expert_offsets, xa,
        partial, out,
    )  # fmt: skip
    launch(key, _shrink_outer_kernel, (max_chunks, 1, 1), tensors, arguments)
    if several:
        strides = out.stride(0), out.stride(2), out.stride(1)
        sum_chunks(partial.transpose(1, 2), routing, out, strides, chunk)
    return xa
