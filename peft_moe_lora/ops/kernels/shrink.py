"""xa[m, j] = scaling * sum over k of A[e, j, k] * mask[m, k] * x[row, k].

row = row_token[m] where x is gathered, else m. A program computes R columns of a tile of rows: all
of them, or with few rows some of them, so that more programs load A.

With many ranks this is a product like those of the base weights, and `sm90.linear_roles` computes
it, from a copy of scaling * A in the dtype of x. For r = 256 the kernel of this file takes four
times as long (NVIDIA H200, 2026-11-30).

In backward A is a transposed B: its ranks lie next to each other, one expert after the other. If r
is no multiple of 16, they can only be loaded one by one. So a copy is made first, whose ranks are
padded to such a multiple.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..dropout import Dropout, kept_scale
from ..ranks import stored_rank
from ..routing import Routing
from .launching.launch import facts, launch
from .launching.table import ceil_div, device_facts, dot_precision, find, options_of, padded_rank
from .operands import Operand, Routes, Weight
from .routing import with_tiles
from .sm90.by_roles import by_roles
from .tiles.cast import cast_as_weight
from .tiles.dropout import kept, probability_and_drop, row_hash
from .tiles.eights import as_eights, by_8
from .tiles.product import Product
from .tiles.tile import linear_blocks, table_line

# from this rank on A is multiplied as a weight is: the tile of A would have 128 ranks
MANY_RANKS = 65
# up to this K the loop is short, and higher occupancy is worth more than more pipeline stages
SHORT_K = 2048


class _Sizes(NamedTuple):
    """Numbers of the product.

    Attributes:
        K: depth.
        r: the rank; from it on, xa has zeros.
        in_A, in_xa: ranks of A and of xa in memory, zeros included.
    """

    K: Any
    r: Any
    in_A: Any
    in_xa: Any


class _Tile(NamedTuple):
    """Constants of the kernel.

    Attributes:
        M, K: rows of a tile, and columns of x in a step of the loop.
        R: columns of xa in a tile.
        PARTS: tiles that a tile of the table is cut into.
        SPLIT: whether the columns of xa are split into more than one tile.
        EVEN_K: whether the depth is a multiple of K.
        BY_8: as in `tiles.eights`.
        GATHER: whether x is gathered.
        P: probability of dropout.
        PRECISION: input_precision of the product.
    """

    M: Any
    K: Any
    R: Any
    PARTS: Any
    SPLIT: Any
    EVEN_K: Any
    BY_8: Any
    GATHER: Any
    P: Any
    PRECISION: Any


@triton.jit
def _shrink_kernel(x, lora_A, xa_ptr, drop, routes, sizes, scaling, TILE):
    """Grid [max_tiles * PARTS, tiles of ranks]: a tile of the table is cut into PARTS of M rows."""
    e, first_row, end = table_line(routes.tiles, tl.program_id(0) // TILE.PARTS)
    first_row += tl.program_id(0) % TILE.PARTS * TILE.M
    if e < 0 or first_row >= end:
        return
    # int64: an expert index times a stride passes 2**31
    e = e.to(tl.int64)
    offs_m = first_row + tl.arange(0, TILE.M)
    # past the expert's last row, that row is repeated: loads need no mask. Copies are not stored
    rows = tl.minimum(offs_m, end - 1)
    x_rows = rows
    if TILE.GATHER:
        x_rows = tl.load(routes.row_token + rows)
    offs_k = tl.arange(0, TILE.K)
    offs_r = tl.arange(0, TILE.R)
    if TILE.SPLIT:
        offs_r += tl.program_id(1) * TILE.R
    K = as_eights(sizes.K, TILE.BY_8)
    stride_m = as_eights(x.stride_m, TILE.BY_8)
    x_ptrs = x.ptr + x_rows.to(tl.int64)[:, None] * stride_m + offs_k[None, :] * x.stride_k
    # int64: if lora_A is a transposed B, a column times r * E passes 2**31
    lora_A_ptrs = lora_A.ptr + e * lora_A.stride_e + offs_r.to(tl.int64)[None, :] * lora_A.stride_n
    lora_A_ptrs += offs_k.to(tl.int64)[:, None] * lora_A.stride_k
    if TILE.P > 0:
        hashes = row_hash(tl.load(drop.seed), tl.load(drop.row_slot + rows))
    acc = tl.zeros((TILE.M, TILE.R), dtype=tl.float32)
    for k in range(0, K, TILE.K):
        if TILE.EVEN_K:
            x_tile = tl.load(x_ptrs)
            A_tile = tl.load(lora_A_ptrs, mask=(offs_r < sizes.in_A)[None, :], other=0.0)
        else:
            mask_k = offs_k < K - k
            x_tile = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            mask = mask_k[:, None] & (offs_r < sizes.in_A)[None, :]
            A_tile = tl.load(lora_A_ptrs, mask=mask, other=0.0)
        if TILE.P > 0:
            columns = (k + offs_k)[None, :]
            x_tile = kept(x_tile, hashes[:, None], columns, TILE.P)
        A_tile = A_tile.to(x.ptr.dtype.element_ty)
        # [M, K] @ [K, R] -> [M, R]
        acc = tl.dot(x_tile, A_tile, acc, input_precision=TILE.PRECISION)
        x_ptrs += TILE.K * x.stride_k
        lora_A_ptrs += TILE.K * lora_A.stride_k
    width = sizes.in_xa
    xa_ptrs = xa_ptr + offs_m.to(tl.int64)[:, None] * width + offs_r[None, :]
    # zeros past rank r, also in a row that is not finite
    xa = tl.where((offs_r < sizes.r)[None, :], acc * scaling, 0.0).to(xa_ptr.dtype.element_ty)
    tl.store(xa_ptrs, xa, mask=(offs_m < end)[:, None] & (offs_r < width)[None, :])


def expert_shrink(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    routing: Routing,
    scaling: float,
    *,
    gather: bool = False,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """xa[m] = scaling * A[e] drop(x[m]).

    Args:
        x: [M, K] rows, or [T, K] tokens with gather; bf16, fp16 or fp32.
        lora_A: [E, r, K], any strides and float dtype; it is cast to the dtype of x.
        scaling: lora_alpha / r.
        gather: whether row m reads token row_token[m].
        dropout: masks x.
    Returns: [M, R], dtype of x, with R of `ranks.stored_rank`; zeros past rank r.
    Twin: `reference.expert_shrink`.
    """
    routing = with_tiles(routing)
    M = routing.num_rows
    _, r, K = lora_A.shape
    width = stored_rank(r)
    xa = torch.empty(M, width, dtype=x.dtype, device=x.device)
    if M == 0:
        return xa
    if dropout is None and _as_product(x, lora_A, routing, scaling, gather, xa):
        return xa
    if dropout is not None:
        # the kernel sums x where it is kept
        scaling *= kept_scale(dropout.p)
    lora_A = _in_sixteens(lora_A, x.dtype)
    in_A = lora_A.shape[1]
    op = "shrink"
    if K <= SHORT_K:
        op = "shrink_short"
    arch, _ = device_facts(x.device)
    blocks = dict(find(op, arch, x.element_size(), routing.block_m))
    blocks["BLOCK_M"] = min(blocks["BLOCK_M"], routing.block_m)
    parts = routing.block_m // blocks["BLOCK_M"]
    ranks = min(padded_rank(r), blocks["RANKS"])
    # the tile of A grows with the rank. So there are fewer stages, and more warps hold the sums
    if ranks > 64:
        blocks |= {"BLOCK_K": 32, "num_stages": 2, "num_warps": 8}
    elif ranks > 16:
        blocks["BLOCK_K"] = min(blocks["BLOCK_K"], 64)
    precision = dot_precision(x.dtype)
    p, drop = probability_and_drop(dropout, routing)

    def arguments() -> tuple[tuple, tuple, dict]:
        tile = _Tile(
            M=blocks["BLOCK_M"],
            K=blocks["BLOCK_K"],
            R=ranks,
            PARTS=parts,
            SPLIT=ranks < width,
            EVEN_K=K % blocks["BLOCK_K"] == 0,
            BY_8=by_8(x),
            GATHER=gather,
            P=p,
            PRECISION=precision,
        )
        routes = Routes(routing.tiles, routing.row_token)
        rows = Operand.of(x), Weight.of(lora_A), xa, drop, routes
        return rows, (_Sizes(K, r, in_A, width), scaling), {"TILE": tile, **options_of(blocks)}

    key = "shrink", facts(x, lora_A), K, r, in_A, scaling, gather, p, precision, routing.block_m
    tensors = x, lora_A, xa, *drop, routing.tiles, routing.row_token
    # the last three lines of the table are never tiles
    max_tiles = routing.tiles.shape[0] - 3
    grid = max_tiles * parts, ceil_div(width, ranks), 1
    launch(key, _shrink_kernel, grid, tensors, arguments)
    return xa


def _lies_along_ranks(lora_A: torch.Tensor) -> bool:
    """Whether adjacent values of A are of adjacent ranks, as in a transposed B."""
    return lora_A.stride(2) != 1


def _padded(lora_A: torch.Tensor, dtype: torch.dtype, scaling: float) -> torch.Tensor:
    """scaling * A in `dtype`, with the ranks of xa in memory, in the memory order of A."""
    width = stored_rank(lora_A.shape[1])
    along_ranks = _lies_along_ranks(lora_A)
    # ranks are the columns that a cast pads
    transposed = cast_as_weight(lora_A.transpose(1, 2), width, dtype, along_ranks, scaling)
    return transposed.transpose(1, 2)


def _in_sixteens(lora_A: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A, or a padded copy of it, so that its ranks can be loaded 16 bytes at a time.

    Up to rank 8 no copy is made: the tile of A is small, and a copy would have 8 ranks, too.
    """
    r = lora_A.shape[1]
    if r <= 8 or r % 16 == 0 or not _lies_along_ranks(lora_A):
        return lora_A
    return _padded(lora_A, dtype, 1.0)


def _as_product(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    routing: Routing,
    scaling: float,
    gather: bool,
    xa: torch.Tensor,
) -> bool:
    """Write xa by the kernel of large products; return whether it was written.

    That kernel writes all columns of xa, so a copy of A has as many ranks. Past rank r they are
    zeros, and so is xa there, unless a row is not finite.
    """
    if lora_A.shape[1] < MANY_RANKS:
        return False
    if linear_blocks("linear_roles", x, lora_A, routing.block_m) is None:
        return False
    weight = _padded(lora_A, x.dtype, scaling)
    return by_roles(Product(x, weight, routing, gather=gather, y=xa))
