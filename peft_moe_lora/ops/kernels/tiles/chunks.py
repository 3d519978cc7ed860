"""out[e] = sum over the chunks c of e of partial[c]: an expert's rows are cut in chunks, whose sums are added.

An operation that sums over the rows of each expert gives one program one chunk of rows, so that an expert with most of
the rows is the work of many programs. An expert of one chunk is written to the output directly. The chunks of the
others leave partial sums, which a second kernel adds in a fixed order: no atomics, so a result repeats bit by bit.

Legend:
    chunk c < E: the first chunk of expert c, found without a search. From E on the further chunks follow, expert by
        expert. There are at most E + M // CHUNK chunks, whatever the routing.
    CHUNK: rows of the largest chunk
    partial_ptr [max_chunks, small, wide] fp32: sums of the chunks of experts that have more than one
"""

import torch
import triton
import triton.language as tl

from ...routing import Routing
from ..launching.launch import launch
from ..launching.table import ceil_div, power_of_2

# elements of a program's tile of sums: several chunks of it are in registers at once
SUM_ELEMENTS = 128 * 16
# chunks that are loaded while as many are added: an expert with most of the rows has hundreds
TOGETHER = tl.constexpr(4)
# programs that fill the device several times over, with products and with sums
PROGRAMS = 1024
SUM_PROGRAMS = 1024


@triton.jit
def _further_chunks(expert_offsets_ptr, E, CHUNK: tl.constexpr, E_PADDED: tl.constexpr):
    """Number [E_PADDED] of chunks of each expert after its first."""
    experts = tl.arange(0, E_PADDED)
    start = tl.load(expert_offsets_ptr + experts, mask=experts < E, other=0)
    end = tl.load(expert_offsets_ptr + experts + 1, mask=experts < E, other=0)
    return tl.maximum(end - start - 1, 0) // CHUNK


@triton.jit
def chunk_of(chunk, expert_offsets_ptr, E, CHUNK: tl.constexpr, E_PADDED: tl.constexpr):
    """(expert, E for none; which of its chunks) of a chunk."""
    e, index = chunk, 0
    if chunk >= E:
        further_end = tl.cumsum(_further_chunks(expert_offsets_ptr, E, CHUNK, E_PADDED), axis=0)
        passed = further_end <= chunk - E
        e = tl.minimum(tl.sum(passed.to(tl.int32), axis=0), E)
        index = chunk - E - tl.max(tl.where(passed, further_end, 0), axis=0) + 1
    return e, index


@triton.jit
def _parts(partial_ptrs, e, second_chunk, first, chunks, offs_w, WIDE, mask_s, stride_pc):
    """TOGETHER chunks of an expert, from its `first` on; zeros past its last."""
    parts = ()
    for u in tl.static_range(TOGETHER):
        c = first + u
        chunk = tl.where(c == 0, e, second_chunk + c - 1).to(tl.int64)
        mask = (offs_w < tl.where(c < chunks, WIDE, 0))[:, None] & mask_s
        parts += (tl.load(partial_ptrs + chunk * stride_pc, mask=mask, other=0.0),)
    return parts


@triton.jit
def _sum_chunks_kernel(
    expert_offsets_ptr, partial_ptr, out_ptr, E, SMALL, WIDE, num_s,
    stride_pc, stride_ps, stride_pw, stride_oe, stride_os, stride_ow,
    CHUNK: tl.constexpr, E_PADDED: tl.constexpr, EXPERTS: tl.constexpr, BLOCK_SMALL: tl.constexpr,
    BLOCK_WIDE: tl.constexpr,
):  # fmt: skip
    """Grid [tiles of wide * tiles of small, E / EXPERTS]: an expert's chunks in order, where it has several."""
    first = tl.program_id(1) * EXPERTS
    experts = first + tl.arange(0, EXPERTS)
    starts = tl.load(expert_offsets_ptr + experts, mask=experts < E, other=0)
    ends = tl.load(expert_offsets_ptr + experts + 1, mask=experts < E, other=0)
    # most programs, where the routing is even
    if tl.max(ends - starts, axis=0) <= CHUNK:
        return
    further = _further_chunks(expert_offsets_ptr, E, CHUNK, E_PADDED)
    offs_s = tl.program_id(0) % num_s * BLOCK_SMALL + tl.arange(0, BLOCK_SMALL)
    offs_w = tl.program_id(0) // num_s * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    mask_s = (offs_s < SMALL)[None, :]
    partial_ptrs = partial_ptr + offs_s[None, :] * stride_ps + offs_w[:, None] * stride_pw
    out_ptrs = (
        out_ptr
        + offs_s.to(tl.int64)[None, :] * stride_os
        + offs_w.to(tl.int64)[:, None] * stride_ow
    )
    for e in range(first, tl.minimum(first + EXPERTS, E)):
        rows = tl.load(expert_offsets_ptr + e + 1) - tl.load(expert_offsets_ptr + e)
        if rows > CHUNK:
            second = E + tl.sum(tl.where(tl.arange(0, E_PADDED) < e, further, 0), axis=0)
            chunks = (rows + CHUNK - 1) // CHUNK
            acc = tl.zeros((BLOCK_WIDE, BLOCK_SMALL), dtype=tl.float32)
            parts = _parts(partial_ptrs, e, second, 0, chunks, offs_w, WIDE, mask_s, stride_pc)
            for c in range(0, chunks, TOGETHER):
                ahead = _parts(
                    partial_ptrs, e, second, c + TOGETHER, chunks, offs_w, WIDE, mask_s, stride_pc
                )
                for u in tl.static_range(TOGETHER):
                    acc += parts[u]
                parts = ahead
            # int64: an expert index times a stride passes 2**31
            ptrs = out_ptrs + tl.cast(e, tl.int64) * stride_oe
            tl.store(ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_w < WIDE)[:, None] & mask_s)


def chunk_rows(M: int, E: int, tiles: int, block_m: int, arch: int) -> int:
    """Rows of a chunk: an expert's, which leaves no partial sums; fewer where that leaves too few programs.

    Args:
        M: rows of E experts.
        tiles: programs of a chunk.
        block_m: the least.
        arch: 0 for the interpreter, where small experts have several chunks.
    """
    even, filling = 2 * ceil_div(M, E), 2 * ceil_div(M * tiles, PROGRAMS)
    return max(block_m, power_of_2(min(even, filling)), 256 if arch else 1)


def sum_chunks(
    partial: torch.Tensor,
    routing: Routing,
    out: torch.Tensor,
    strides: tuple[int, int, int],
    chunk: int,
) -> None:
    """Write the sums of the experts that have several chunks of rows into out.

    Args:
        partial: [max_chunks, small, wide] fp32, either of the last two contiguous.
        strides: of out by expert, by small and by wide index.
        chunk: rows of the largest.
    """
    E, (_, SMALL, WIDE) = routing.num_experts, partial.shape
    block_small = min(64, max(16, power_of_2(SMALL)))
    block_wide = SUM_ELEMENTS // block_small
    num_s = ceil_div(SMALL, block_small)
    tiles = ceil_div(WIDE, block_wide) * num_s
    experts = power_of_2(ceil_div(E * tiles, SUM_PROGRAMS))
    constants = {
        "CHUNK": chunk, "E_PADDED": power_of_2(E), "EXPERTS": experts, "BLOCK_SMALL": block_small,
        "BLOCK_WIDE": block_wide,
    }  # fmt: skip
    key = "sum", E, SMALL, WIDE, partial.stride(), strides, out.dtype, chunk, experts
    tensors = routing.expert_offsets, partial, out
    fixed = E, SMALL, WIDE, num_s, *partial.stride(), *strides
    launch(
        key,
        _sum_chunks_kernel,
        (tiles, ceil_div(E, experts), 1),
        tensors,
        lambda: (fixed, constants),
    )
