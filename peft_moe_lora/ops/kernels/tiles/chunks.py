"""out[e] = sum over the chunks c of expert e of partial[c]: sums over an expert's rows, in parts.

The rows of each expert are cut into chunks. For each output tile, one program sums over one chunk.
So many programs share the rows of an expert that has most of them. If an expert has a single chunk,
its sums are written to the output directly. For other experts each program writes partial sums, and
a second kernel adds these in a fixed order, without atomics: results are the same in every run.

Legend:
    chunk c < E: the first chunk of expert c; its program needs no search to find its rows
    chunks c >= E: all other chunks, ordered by expert. There are at most E + M // CHUNK chunks
        for any routing.
    CHUNK: the largest number of rows of a chunk
    partial_ptr [max_chunks, small, wide] fp32: the sums of each chunk; used only for experts with
        several chunks
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...routing import Routing
from ..launching.launch import launch
from ..launching.table import ceil_div, power_of_2
from ..operands import Weight

# elements of a program's output tile; a program holds this tile of several chunks in registers
SUM_ELEMENTS = 128 * 16
# chunks are added in groups of this size, while the next group is being loaded
TOGETHER = tl.constexpr(4)
# programs that keep a large GPU busy: of a kernel that writes partial sums, and of `sum_chunks`
PROGRAMS = 1024
SUM_PROGRAMS = 1024


@triton.jit
def _further_chunks(expert_offsets_ptr, E, CHUNK: tl.constexpr, E_PADDED: tl.constexpr):
    """[E_PADDED]: for each expert, the number of its chunks after the first."""
    experts = tl.arange(0, E_PADDED)
    start = tl.load(expert_offsets_ptr + experts, mask=experts < E, other=0)
    end = tl.load(expert_offsets_ptr + experts + 1, mask=experts < E, other=0)
    return tl.maximum(end - start - 1, 0) // CHUNK


@triton.jit
def chunk_of(chunk, expert_offsets_ptr, E, CHUNK: tl.constexpr, E_PADDED: tl.constexpr):
    """(expert, index among its chunks) of a chunk; the expert is E if there is no such chunk."""
    e = chunk
    index = 0
    if chunk >= E:
        further_end = tl.cumsum(_further_chunks(expert_offsets_ptr, E, CHUNK, E_PADDED), axis=0)
        passed = further_end <= chunk - E
        e = tl.minimum(tl.sum(passed.to(tl.int32), axis=0), E)
        index = chunk - E - tl.max(tl.where(passed, further_end, 0), axis=0) + 1
    return e, index


class _Sizes(NamedTuple):
    """Experts, sums along each side, and tiles of the small side."""

    E: Any
    SMALL: Any
    WIDE: Any
    num_s: Any


class _Tile(NamedTuple):
    """Constants of the kernel.

    Attributes:
        SMALL, WIDE: a program's tile of the output.
        EXPERTS: experts whose tiles a program computes.
        CHUNK: as in the legend. E_PADDED: E, padded to a power of two.
    """

    SMALL: Any
    WIDE: Any
    EXPERTS: Any
    CHUNK: Any
    E_PADDED: Any


@triton.jit
def _parts(partial_ptrs, e, second_chunk, first, chunks, offs_w, WIDE, mask_s, stride_c):
    """Tiles of partial sums of TOGETHER chunks of expert e, from its chunk `first` on.

    Past the expert's last chunk, tiles are zero. second_chunk: index of its second chunk in
    partial. chunks: number of its chunks.
    """
    parts = ()
    for u in tl.static_range(TOGETHER):
        c = first + u
        chunk = tl.where(c == 0, e, second_chunk + c - 1).to(tl.int64)
        mask = (offs_w < tl.where(c < chunks, WIDE, 0))[:, None] & mask_s
        parts += (tl.load(partial_ptrs + chunk * stride_c, mask=mask, other=0.0),)
    return parts


@triton.jit
def _sum_chunks_kernel(expert_offsets_ptr, partial, out, sizes, TILE):
    """Grid [tiles of wide * tiles of small, E / EXPERTS]: one output tile of EXPERTS experts.

    partial and out: their columns are the small side, their depth is the wide side. partial has a
    chunk in the place of an expert.
    """
    first = tl.program_id(1) * TILE.EXPERTS
    experts = first + tl.arange(0, TILE.EXPERTS)
    starts = tl.load(expert_offsets_ptr + experts, mask=experts < sizes.E, other=0)
    ends = tl.load(expert_offsets_ptr + experts + 1, mask=experts < sizes.E, other=0)
    # if routing is even, most programs return here
    if tl.max(ends - starts, axis=0) <= TILE.CHUNK:
        return
    further = _further_chunks(expert_offsets_ptr, sizes.E, TILE.CHUNK, TILE.E_PADDED)
    offs_s = tl.program_id(0) % sizes.num_s * TILE.SMALL + tl.arange(0, TILE.SMALL)
    offs_w = tl.program_id(0) // sizes.num_s * TILE.WIDE + tl.arange(0, TILE.WIDE)
    mask_s = (offs_s < sizes.SMALL)[None, :]
    partial_ptrs = partial.ptr + offs_s[None, :] * partial.stride_n
    partial_ptrs += offs_w[:, None] * partial.stride_k
    out_ptrs = out.ptr + offs_s.to(tl.int64)[None, :] * out.stride_n
    out_ptrs += offs_w.to(tl.int64)[:, None] * out.stride_k
    for e in range(first, tl.minimum(first + TILE.EXPERTS, sizes.E)):
        rows = tl.load(expert_offsets_ptr + e + 1) - tl.load(expert_offsets_ptr + e)
        if rows > TILE.CHUNK:
            earlier = tl.arange(0, TILE.E_PADDED) < e
            second = sizes.E + tl.sum(tl.where(earlier, further, 0), axis=0)
            chunks = (rows + TILE.CHUNK - 1) // TILE.CHUNK
            acc = tl.zeros((TILE.WIDE, TILE.SMALL), dtype=tl.float32)
            parts = _parts(
                partial_ptrs, e, second, 0, chunks, offs_w, sizes.WIDE, mask_s, partial.stride_e
            )
            for c in range(0, chunks, TOGETHER):
                ahead = _parts(
                    partial_ptrs, e, second, c + TOGETHER, chunks, offs_w, sizes.WIDE, mask_s,
                    partial.stride_e,
                )  # fmt: skip
                for u in tl.static_range(TOGETHER):
                    acc += parts[u]
                parts = ahead
            # int64: an expert index times a stride passes 2**31
            ptrs = out_ptrs + tl.cast(e, tl.int64) * out.stride_e
            mask = (offs_w < sizes.WIDE)[:, None] & mask_s
            tl.store(ptrs, acc.to(out.ptr.dtype.element_ty), mask=mask)


def chunk_rows(M: int, E: int, tiles: int, block_m: int, arch: int) -> int:
    """CHUNK: enough rows that most experts have one chunk, but few enough that programs fill a GPU.

    Args:
        M: rows of all E experts.
        tiles: number of output tiles; every chunk has one program for each of them.
        block_m: lower bound of the result.
        arch: compute capability times ten. On a GPU the result is at least 256. In the interpreter
            (0) it may be smaller, so that small experts have several chunks, too.
    """
    # even: twice the rows of an expert when routing is even. filling: twice the rows that each of
    # PROGRAMS programs has
    even = 2 * ceil_div(M, E)
    filling = 2 * ceil_div(M * tiles, PROGRAMS)
    least = 1
    if arch:
        least = 256
    return max(block_m, power_of_2(min(even, filling)), least)


def sum_chunks(
    partial: torch.Tensor,
    routing: Routing,
    out: torch.Tensor,
    strides: tuple[int, int, int],
    chunk: int,
) -> None:
    """Add the partial sums of every expert that has several chunks, and write them to out.

    Args:
        partial: [max_chunks, small, wide] fp32; one of the last two dimensions is contiguous.
        strides: of out along expert, small and wide.
        chunk: CHUNK, the largest number of rows of a chunk.
    """
    E = routing.num_experts
    _, SMALL, WIDE = partial.shape
    block_small = min(64, max(16, power_of_2(SMALL)))
    block_wide = SUM_ELEMENTS // block_small
    num_s = ceil_div(SMALL, block_small)
    tiles = ceil_div(WIDE, block_wide) * num_s
    experts = power_of_2(ceil_div(E * tiles, SUM_PROGRAMS))

    def arguments() -> tuple[tuple, tuple, dict]:
        tile = _Tile(
            SMALL=block_small,
            WIDE=block_wide,
            EXPERTS=experts,
            CHUNK=chunk,
            E_PADDED=power_of_2(E),
        )
        sums = Weight(partial, *partial.stride()), Weight(out, *strides)
        return (routing.expert_offsets, *sums), (_Sizes(E, SMALL, WIDE, num_s),), {"TILE": tile}

    key = "sum", E, SMALL, WIDE, partial.stride(), strides, out.dtype, chunk, experts
    tensors = routing.expert_offsets, partial, out
    launch(key, _sum_chunks_kernel, (tiles, ceil_div(E, experts), 1), tensors, arguments)
