"""out[e, p, q] = sum over the rows m of e of w[m] * left[m, p] * mask[m, q] * right[m, q].

All gradients of A and B are this product: for dA left is dY @ B and right is X; for dB left is dY
and right is X @ A^T. The side whose width is the rank is called small, and the other side wide. The
small side is multiplied by the routing weight w.

A program sums over one chunk of an expert's rows, for one tile [wide, small] of the output.
`tiles.chunks` defines chunks, and adds the partial sums of experts with several chunks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..dropout import Dropout
from ..ranks import check_columns
from ..routing import Routing
from .launching.launch import facts, launch
from .launching.table import ceil_div, device_facts, dot_precision, find, power_of_2
from .tiles.chunks import chunk_of, chunk_rows, sum_chunks
from .tiles.dropout import dropout_mask, probability_and_seed
from .tiles.eights import as_eights, by_8

# elements of a program's output tile, which is held in registers
SUMS = 128 * 64


@triton.jit
def _of_rows(ptr, rows, end):
    """ptr[rows], and 0 for rows from `end` on."""
    return tl.load(ptr + rows, mask=rows < end, other=0)


@triton.jit
def _outer_kernel(
    small_ptr, wide_ptr, row_weights_ptr, seed_ptr, row_token_ptr, row_slot_ptr,
    expert_offsets_ptr, partial_ptr, out_ptr, E, SMALL, STORED, WIDE, num_s,
    stride_sm, stride_ss, stride_wm, stride_ww, stride_oe, stride_os, stride_ow,
    CHUNK: tl.constexpr, E_PADDED: tl.constexpr, GATHER_SMALL: tl.constexpr,
    GATHER_WIDE: tl.constexpr, BY_8: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_SMALL: tl.constexpr, BLOCK_WIDE: tl.constexpr,
):  # fmt: skip
    """Grid [tiles of wide * tiles of small, max_chunks].

    The sums of an expert with one chunk or without rows are stored to out, other sums to partial.
    """
    chunk = tl.program_id(1)
    e, index = chunk_of(chunk, expert_offsets_ptr, E, CHUNK, E_PADDED)
    if e >= E:
        return
    start = tl.load(expert_offsets_ptr + e)
    end = tl.load(expert_offsets_ptr + e + 1)
    one_chunk = end - start <= CHUNK
    start += index * CHUNK
    end = tl.minimum(end, start + CHUNK)

    offs_s = tl.program_id(0) % num_s * BLOCK_SMALL + tl.arange(0, BLOCK_SMALL)
    offs_w = tl.program_id(0) // num_s * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    stored_s = offs_s < STORED
    mask_w = offs_w < as_eights(WIDE, BY_8)
    stride_wm = as_eights(stride_wm, BY_8)
    rows = start + tl.arange(0, BLOCK_M)
    # tokens, slots and weights are loaded one block ahead of the rows that they select. Otherwise
    # every block would wait for memory twice: for the tokens, and then for their rows
    if GATHER_SMALL or GATHER_WIDE:
        tokens = _of_rows(row_token_ptr, rows, end)
    if row_weights_ptr is not None or P > 0:
        slots = _of_rows(row_slot_ptr, rows, end)
        next_slots = _of_rows(row_slot_ptr, rows + BLOCK_M, end)
    if row_weights_ptr is not None:
        w = tl.load(row_weights_ptr + slots, mask=rows < end, other=0.0)
    acc = tl.zeros((BLOCK_WIDE, BLOCK_SMALL), dtype=tl.float32)
    for _ in range(start, end, BLOCK_M):
        mask_m = rows < end
        next_rows = rows + BLOCK_M
        if GATHER_SMALL or GATHER_WIDE:
            next_tokens = _of_rows(row_token_ptr, next_rows, end)
        if row_weights_ptr is not None:
            next_w = tl.load(row_weights_ptr + next_slots, mask=next_rows < end, other=0.0)
        small_rows = rows
        wide_rows = rows
        if GATHER_SMALL:
            small_rows = tokens
        if GATHER_WIDE:
            wide_rows = tokens
        small_rows = small_rows.to(tl.int64)
        wide_rows = wide_rows.to(tl.int64)
        small_ptrs = small_ptr + small_rows[:, None] * stride_sm + offs_s[None, :] * stride_ss
        wide_ptrs = wide_ptr + wide_rows[:, None] * stride_wm + offs_w[None, :] * stride_ww
        small = tl.load(
            small_ptrs, mask=mask_m[:, None] & stored_s[None, :], other=0.0
        )  # [M, small]
        wide = tl.load(wide_ptrs, mask=mask_m[:, None] & mask_w[None, :], other=0.0)  # [M, wide]
        if row_weights_ptr is not None:
            small = small.to(tl.float32) * w.to(tl.float32)[:, None]
            small = small.to(small_ptr.dtype.element_ty)
            w = next_w
        if P > 0:
            wide = wide.to(tl.float32) * dropout_mask(seed_ptr, slots[:, None], offs_w[None, :], P)
            wide = wide.to(wide_ptr.dtype.element_ty)
        # [wide, M] @ [M, small] -> [wide, small]
        acc = tl.dot(wide.trans(), small, acc, input_precision=PRECISION)
        if GATHER_SMALL or GATHER_WIDE:
            tokens = next_tokens
        if row_weights_ptr is not None or P > 0:
            slots = next_slots
            next_slots = _of_rows(row_slot_ptr, next_rows + BLOCK_M, end)
        rows = next_rows

    mask = mask_w[:, None] & (offs_s < SMALL)[None, :]
    if one_chunk:
        # int64: an expert index times a stride passes 2**31
        out_ptrs = out_ptr + e.to(tl.int64) * stride_oe + offs_s.to(tl.int64)[None, :] * stride_os
        out_ptrs += offs_w.to(tl.int64)[:, None] * stride_ow
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        partial_ptrs = (
            partial_ptr + (chunk.to(tl.int64) * SMALL + offs_s)[None, :] * WIDE + offs_w[:, None]
        )
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
    # the kernel masks the wide side, and dropout masks right: so right is the wide side
    if dropout is not None or left.shape[1] <= right.shape[1]:
        strides = stride_e, stride_p, stride_q
        return _Sides(left, right, gather_left, gather_right, strides, out.shape[1])
    strides = stride_e, stride_q, stride_p
    return _Sides(right, left, gather_right, gather_left, strides, out.shape[2])


def _block_sizes(sides: _Sides, arch: int) -> dict:
    """The constexprs of the kernel's blocks: from the table, adapted to the rank."""
    op = "outer"
    if sides.gather_wide:
        op = "outer_gathered"
    blocks = dict(find(op, arch, sides.small.element_size(), 16))
    blocks["BLOCK_SMALL"] = min(64, max(16, power_of_2(sides.small.shape[1])))
    blocks["BLOCK_WIDE"] = min(blocks["BLOCK_WIDE"], SUMS // blocks["BLOCK_SMALL"])
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
        right: [M, Q] rows, or [T, Q] tokens with gather_right; dtype of left. The narrower of the
            two may be rows of rank r, with zeros past r.
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
    blocks = _block_sizes(sides, arch)
    num_s = ceil_div(SMALL, blocks["BLOCK_SMALL"])
    tiles = ceil_div(WIDE, blocks["BLOCK_WIDE"]) * num_s
    chunk = chunk_rows(M, E, tiles, blocks["BLOCK_M"], arch)
    # if all rows fit into one chunk, no expert has several
    several = M > chunk
    max_chunks = E + several * (M // chunk)
    partial = torch.empty(several * max_chunks, SMALL, WIDE, dtype=torch.float32, device=out.device)
    precision = dot_precision(small.dtype)
    p, seed = probability_and_seed(dropout)

    def rest() -> tuple[tuple, tuple, dict]:
        constants = {
            "GATHER_SMALL": gather_small,
            "GATHER_WIDE": gather_wide,
            "BY_8": by_8(wide),
            "P": p,
            "PRECISION": precision,
            "CHUNK": chunk,
            "E_PADDED": power_of_2(E),
            **blocks,
        }
        sizes = E, SMALL, small.shape[1], WIDE, num_s
        return tensors, (*sizes, *small.stride(), *wide.stride(), *strides), constants

    key = (
        "outer", E, SMALL, WIDE, strides, out.dtype, chunk, blocks["BLOCK_WIDE"],
        facts(small, wide, row_weights), gather_small, gather_wide, p, precision,
    )  # fmt: skip
    tensors = (
        small, wide, row_weights, seed, routing.row_token, routing.row_slot,
        routing.expert_offsets, partial, out,
    )  # fmt: skip
    launch(key, _outer_kernel, (tiles, max_chunks, 1), tensors, rest)
    if several:
        sum_chunks(partial, routing, out, strides, chunk)
