"""out[e, p, q] = sum over the rows m of e of w[m] * left[m, p] * mask[m, q] * right[m, q].

All gradients of A and B are this product: for dA left is dY @ B and right is X; for dB left is dY
and right is X @ A^T. The side whose width is the rank is called small, and the other side wide. The
small side is multiplied by the routing weight w.

A program sums over one chunk of an expert's rows, for one tile [wide, small] of the output.
`tiles.chunks` defines chunks, and adds the partial sums of experts with several chunks.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..dropout import Dropout
from ..ranks import check_columns
from ..routing import Routing
from .launching.launch import facts, launch
from .launching.table import (
    ceil_div,
    device_facts,
    dot_precision,
    find,
    lookup,
    options_of,
    power_of_2,
)
from .operands import Operand, Weight
from .tiles.chunks import chunk_of, chunk_rows, sum_chunks
from .tiles.dropout import kept, probability_and_seed, row_hash, scale_of_kept
from .tiles.eights import as_eights, by_8

# columns of a tile of the small side. Each tile reads the wide side. So where the small side has
# more columns, and the table has the row "outer_many", a tile has MANY_COLUMNS
COLUMNS = 64
MANY_COLUMNS = 128
# columns of the wide side of a tile with the most columns of the small side
WIDE_COLUMNS = 128


@triton.jit
def _of_rows(ptr, rows, end):
    """ptr[rows], and 0 for rows from `end` on."""
    return tl.load(ptr + rows, mask=rows < end, other=0)


class _Sizes(NamedTuple):
    """Numbers of the output.

    Attributes:
        E: experts.
        SMALL, WIDE: sums of an expert along each side.
        STORED: columns of the small side in memory.
        num_s: tiles of the small side.
    """

    E: Any
    SMALL: Any
    STORED: Any
    WIDE: Any
    num_s: Any


class _Tile(NamedTuple):
    """Constants of the kernel.

    Attributes:
        M: rows of a step of the loop.
        SMALL, WIDE: a program's tile of the output.
        CHUNK, E_PADDED: as in `tiles.chunks`.
        GATHER_SMALL, GATHER_WIDE: whether the rows of a side are gathered.
        BY_8: as in `tiles.eights`, of the wide side.
        P: probability of dropout.
        PRECISION: input_precision of the product.
    """

    M: Any
    SMALL: Any
    WIDE: Any
    CHUNK: Any
    E_PADDED: Any
    GATHER_SMALL: Any
    GATHER_WIDE: Any
    BY_8: Any
    P: Any
    PRECISION: Any


@triton.jit
def _outer_kernel(
    small, wide, row_weights_ptr, seed_ptr, row_token_ptr, row_slot_ptr, expert_offsets_ptr,
    partial_ptr, out, sizes, TILE,
):  # fmt: skip
    """Grid [tiles of wide * tiles of small, max_chunks].

    The sums of an expert with one chunk or without rows are stored to out, other sums to partial.
    out: its columns are the small side, its depth is the wide side.
    """
    chunk = tl.program_id(1)
    e, index = chunk_of(chunk, expert_offsets_ptr, sizes.E, TILE.CHUNK, TILE.E_PADDED)
    if e >= sizes.E:
        return
    start = tl.load(expert_offsets_ptr + e)
    end = tl.load(expert_offsets_ptr + e + 1)
    one_chunk = end - start <= TILE.CHUNK
    start += index * TILE.CHUNK
    end = tl.minimum(end, start + TILE.CHUNK)

    offs_s = tl.program_id(0) % sizes.num_s * TILE.SMALL + tl.arange(0, TILE.SMALL)
    offs_w = tl.program_id(0) // sizes.num_s * TILE.WIDE + tl.arange(0, TILE.WIDE)
    stored_s = offs_s < sizes.STORED
    mask_w = offs_w < as_eights(sizes.WIDE, TILE.BY_8)
    wide_stride_m = as_eights(wide.stride_m, TILE.BY_8)
    rows = start + tl.arange(0, TILE.M)
    # tokens, slots and weights are loaded one block ahead of the rows that they select. Otherwise
    # every block would wait for memory twice: for the tokens, and then for their rows
    if TILE.GATHER_SMALL or TILE.GATHER_WIDE:
        tokens = _of_rows(row_token_ptr, rows, end)
    if row_weights_ptr is not None or TILE.P > 0:
        slots = _of_rows(row_slot_ptr, rows, end)
        next_slots = _of_rows(row_slot_ptr, rows + TILE.M, end)
    if row_weights_ptr is not None:
        w = tl.load(row_weights_ptr + slots, mask=rows < end, other=0.0)
    if TILE.P > 0:
        seed = tl.load(seed_ptr)
        hashes = row_hash(seed, slots)
    acc = tl.zeros((TILE.WIDE, TILE.SMALL), dtype=tl.float32)
    for _ in range(start, end, TILE.M):
        mask_m = rows < end
        next_rows = rows + TILE.M
        if TILE.GATHER_SMALL or TILE.GATHER_WIDE:
            next_tokens = _of_rows(row_token_ptr, next_rows, end)
        if row_weights_ptr is not None:
            next_w = tl.load(row_weights_ptr + next_slots, mask=next_rows < end, other=0.0)
        if TILE.P > 0:
            next_hashes = row_hash(seed, next_slots)
        small_rows = rows
        wide_rows = rows
        if TILE.GATHER_SMALL:
            small_rows = tokens
        if TILE.GATHER_WIDE:
            wide_rows = tokens
        small_rows = small_rows.to(tl.int64)
        wide_rows = wide_rows.to(tl.int64)
        small_ptrs = small.ptr + small_rows[:, None] * small.stride_m
        small_ptrs += offs_s[None, :] * small.stride_k
        wide_ptrs = wide.ptr + wide_rows[:, None] * wide_stride_m + offs_w[None, :] * wide.stride_k
        # [M, small] and [M, wide]
        left = tl.load(small_ptrs, mask=mask_m[:, None] & stored_s[None, :], other=0.0)
        right = tl.load(wide_ptrs, mask=mask_m[:, None] & mask_w[None, :], other=0.0)
        if row_weights_ptr is not None:
            left = left.to(tl.float32) * w.to(tl.float32)[:, None]
            left = left.to(small.ptr.dtype.element_ty)
            w = next_w
        if TILE.P > 0:
            right = kept(right, hashes[:, None], offs_w[None, :], TILE.P)
            hashes = next_hashes
        # [wide, M] @ [M, small] -> [wide, small]
        acc = tl.dot(right.trans(), left, acc, input_precision=TILE.PRECISION)
        if TILE.GATHER_SMALL or TILE.GATHER_WIDE:
            tokens = next_tokens
        if row_weights_ptr is not None or TILE.P > 0:
            next_slots = _of_rows(row_slot_ptr, next_rows + TILE.M, end)
        rows = next_rows
    if TILE.P > 0:
        acc *= scale_of_kept(TILE.P)

    mask = mask_w[:, None] & (offs_s < sizes.SMALL)[None, :]
    if one_chunk:
        # int64: an expert index times a stride passes 2**31
        out_ptrs = out.ptr + e.to(tl.int64) * out.stride_e
        out_ptrs += offs_s.to(tl.int64)[None, :] * out.stride_n
        out_ptrs += offs_w.to(tl.int64)[:, None] * out.stride_k
        tl.store(out_ptrs, acc.to(out.ptr.dtype.element_ty), mask=mask)
    else:
        columns = (chunk.to(tl.int64) * sizes.SMALL + offs_s)[None, :]
        partial_ptrs = partial_ptr + columns * sizes.WIDE + offs_w[:, None]
        tl.store(partial_ptrs, acc, mask=mask)


class _Sides(NamedTuple):
    """left and right, named by their width, and the strides of out along expert, small and wide.

    rank: columns of the small side that have sums in out; the others are zeros.
    """

    small: torch.Tensor
    wide: torch.Tensor
    gather_small: bool
    gather_wide: bool
    strides: tuple[int, int, int]
    rank: int


def _sides(
    left: torch.Tensor,
    right: torch.Tensor,
    out: torch.Tensor,
    gather_left: bool,
    gather_right: bool,
    dropout: Dropout | None,
) -> _Sides:
    """Find which of left and right is the small side, and which is the wide side.

    Only the small side may have more columns than out, as rows of rank r have.
    """
    stride_e, stride_p, stride_q = out.stride()
    left_is_small = left.shape[1] <= right.shape[1]
    # past rank r there are no sums: written, they would overwrite those of other experts
    if left.shape[1] > out.shape[1]:
        left_is_small = True
    if right.shape[1] > out.shape[2]:
        left_is_small = False
    # the kernel masks the wide side, and dropout masks right: so right is the wide side
    if dropout is not None or left_is_small:
        strides = stride_e, stride_p, stride_q
        return _Sides(left, right, gather_left, gather_right, strides, out.shape[1])
    strides = stride_e, stride_q, stride_p
    return _Sides(right, left, gather_right, gather_left, strides, out.shape[2])


def _block_sizes(sides: _Sides, masked: bool, arch: int) -> dict:
    """The constexprs of the kernel's blocks: from the table, adapted to the rank."""
    itemsize = sides.small.element_size()
    columns = sides.small.shape[1]
    op = "outer"
    # with a mask, wide blocks need the registers of one more program, and so would larger tiles
    if sides.gather_wide and not masked:
        op = "outer_gathered"
    blocks = dict(find(op, arch, itemsize, 16))
    most = COLUMNS
    many = lookup("outer_many", arch, itemsize, 16)
    if many and columns > COLUMNS and not masked:
        blocks = dict(many)
        most = MANY_COLUMNS
    blocks["BLOCK_SMALL"] = min(most, max(16, power_of_2(columns)))
    blocks["BLOCK_WIDE"] = min(blocks["BLOCK_WIDE"], most * WIDE_COLUMNS // blocks["BLOCK_SMALL"])
    return blocks


def expert_outer(
    left: torch.Tensor,
    right: torch.Tensor,
    routing: Routing,
    out: torch.Tensor,
    *,
    row_weights: torch.Tensor | None = None,
    gather_left: bool = False,
    gather_right: bool = False,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Write the sum of the outer products of each expert's rows into `out`, and return it.

    Args:
        left: [M, P] rows, or [T, P] tokens with gather_left.
        right: [M, Q] rows, or [T, Q] tokens with gather_right; dtype of left. One of the two
            may be rows of rank r, with zeros past r.
        out: [E, P, Q] fp32, any strides. Every element is written; an expert without rows gets
            zeros.
        row_weights: [T, top_k] float; None for ones.
        dropout: masks right.
    Twin: `reference.expert_outer`.
    """
    check_columns(left, out.shape[1])
    check_columns(right, out.shape[2])
    if routing.num_rows == 0:
        return out.zero_()
    if row_weights is not None:
        row_weights = row_weights.contiguous()
    sides = _sides(left, right, out, gather_left, gather_right, dropout)
    _outer(sides, routing, out, row_weights, dropout)
    return out


def _outer(
    sides: _Sides,
    routing: Routing,
    out: torch.Tensor,
    row_weights: torch.Tensor | None,
    dropout: Dropout | None,
) -> None:
    """Launch the kernel and, if an expert may have several chunks, the sum over the chunks."""
    small, wide, gather_small, gather_wide, strides, SMALL = sides
    M = routing.num_rows
    E = out.shape[0]
    WIDE = wide.shape[1]
    arch, _ = device_facts(small.device)
    blocks = _block_sizes(sides, dropout is not None, arch)
    num_s = ceil_div(SMALL, blocks["BLOCK_SMALL"])
    tiles = ceil_div(WIDE, blocks["BLOCK_WIDE"]) * num_s
    chunk = chunk_rows(M, E, tiles, blocks["BLOCK_M"], arch)
    # if all rows fit into one chunk, no expert has several
    several = M > chunk
    max_chunks = E + several * (M // chunk)
    partial = torch.empty(several * max_chunks, SMALL, WIDE, dtype=torch.float32, device=out.device)
    precision = dot_precision(small.dtype)
    p, seed = probability_and_seed(dropout)

    def arguments() -> tuple[tuple, tuple, dict]:
        tile = _Tile(
            M=blocks["BLOCK_M"],
            SMALL=blocks["BLOCK_SMALL"],
            WIDE=blocks["BLOCK_WIDE"],
            CHUNK=chunk,
            E_PADDED=power_of_2(E),
            GATHER_SMALL=gather_small,
            GATHER_WIDE=gather_wide,
            BY_8=by_8(wide),
            P=p,
            PRECISION=precision,
        )
        operands = (
            Operand.of(small), Operand.of(wide), row_weights, seed, routing.row_token,
            routing.row_slot, routing.expert_offsets, partial, Weight(out, *strides),
        )  # fmt: skip
        return (
            operands,
            (_Sizes(E, SMALL, small.shape[1], WIDE, num_s),),
            {"TILE": tile, **options_of(blocks)},
        )

    key = (
        "outer", E, SMALL, WIDE, strides, out.dtype, chunk, blocks["BLOCK_SMALL"],
        blocks["BLOCK_WIDE"],
        facts(small, wide, row_weights), gather_small, gather_wide, p, precision,
    )  # fmt: skip
    tensors = (
        small, wide, row_weights, seed, routing.row_token, routing.row_slot,
        routing.expert_offsets, partial, out,
    )  # fmt: skip
    launch(key, _outer_kernel, (tiles, max_chunks, 1), tensors, arguments)
    if several:
        sum_chunks(partial, routing, out, strides, chunk)
