"""acc[m, n] = mask * (B[e] xa[m]) + bias[e] + W[e] x[row]: one output tile of one expert.

`linear_general` multiplies by this code. The other kernels use only its tile table and its order of
tiles.

Legend, of one tile:
    e: the tile's expert
    rows [BLOCK_M]: rows of xa and of the output; past the expert's last row, that row is repeated
    x_rows [BLOCK_M]: rows of x: tokens if x is gathered, else the same as rows
    cols [BLOCK_N]: columns of weight, bias and lora_B
    HALVES: 2 if a tile holds BLOCK_N / 2 columns of the gate half and as many of the up half
    width: columns of a half       n0: the tile's first column within a half
    descs.weight: descriptor [E, HALVES, width, K] if K_UNIT, else [E, K, N]; None if the weight is
        loaded by pointers
    codes, FORMAT: as in `decode_4bit`; weight.ptr then points to packed bytes. For a dense weight
        codes.scales is None.
With dropout the low-rank term is computed first, and the accumulator is multiplied by the mask.
Then the bias is added, and the K loop adds W[e] x[row].
"""

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...quantized import QuantizedWeight
from ..codes.product_4bit import add_product_4bit
from ..launching.table import device_facts, lookup
from .descriptors import weight_descriptor
from .dropout import dropped, row_hash

# an expert is small up to the first number of bytes, and large above the second. L2 can hold
# several small experts. A large expert leaves L2 before all of its row tiles have read it. The
# table has one GROUP each for small, middle-sized and large experts
EXPERT_BYTES = 12 * 2**20, 32 * 2**20
# half tiles (TAIL) are used up to this K; with K=7168 they took 7.1 ms instead of 6.5 (NVIDIA H200,
# 2026-11-21)
TAIL_MAX_K = 5120


class Descriptors(NamedTuple):
    """Descriptors of x and of the weight; None for what is loaded by pointers."""

    x: Any
    weight: Any


class Inputs(NamedTuple):
    """What a linear kernel reads: named tuples of `operands`, and `Descriptors`."""

    descs: Any
    x: Any
    weight: Any
    codes: Any
    bias: Any
    low_rank: Any
    drop: Any
    shape: Any


class Spot(NamedTuple):
    """Where an output tile lies; the legend of this file names its members."""

    e: Any
    first_row: Any
    n0: Any
    rows: Any
    x_rows: Any
    cols: Any
    mask_n: Any


class Tile(NamedTuple):
    """Constants of an output tile.

    Attributes:
        M, N, K: BLOCK_M, BLOCK_N and the columns of x in a step of the K loop.
        EVEN_K: whether K is a multiple of these columns.
        K_UNIT: whether adjacent values of the weight lie along K.
        GATHER: whether x is gathered.
        P: probability of dropout.
        R: the rank, padded.
        PRECISION: input_precision of the products.
        GROUP: as in `position`.
        TAIL: whether an expert's last rows are computed with half the rows, if they fit.
    """

    M: Any
    N: Any
    K: Any
    EVEN_K: Any
    K_UNIT: Any
    GATHER: Any
    P: Any
    R: Any
    PRECISION: Any
    GROUP: Any
    TAIL: Any


@triton.jit
def position(t, num_tiles, num_n, GROUP: tl.constexpr):
    """(row tile, column tile) of output tile t.

    A group has GROUP consecutive row tiles. First all of its row tiles take one column tile, so
    that they share a weight tile in L2. Then all of them take the next column tile.
    """
    first = t // (GROUP * num_n) * GROUP
    size = tl.maximum(tl.minimum(num_tiles - first, GROUP), 1)
    within = t % (GROUP * num_n)
    return first + within % size, within // size


@triton.jit
def table_size(tiles_ptr, lines):
    """Number of row tiles in a tile table of `lines` lines."""
    return tl.load(tiles_ptr + 2 * lines - 3)


@triton.jit
def table_line(tiles_ptr, tile):
    """(expert, first row, end of rows) of a row tile, from the tile table."""
    line = tiles_ptr + 2 * tile
    return tl.load(line), tl.load(line + 1), tl.load(line + 3)


@triton.jit
def tile_columns(n0, width, BLOCK_N: tl.constexpr, HALVES: tl.constexpr):
    """Columns [BLOCK_N] of the tile that begins at n0 in each half, and which of them exist."""
    j = tl.arange(0, BLOCK_N)
    if HALVES == 1:
        return n0 + j, n0 + j < width
    in_half = n0 + j % (BLOCK_N // HALVES)
    return j // (BLOCK_N // HALVES) * width + in_half, in_half < width


@triton.jit
def halves(tile, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The left and the right half, [ROWS, WIDTH] each, of a tile [ROWS, 2 * WIDTH]."""
    return tl.split(tile.reshape(ROWS, 2, WIDTH).permute(0, 2, 1))


@triton.jit
def _low_rank_factors(low_rank, spot, e, r0, r, BLOCK_R: tl.constexpr):
    """xa [M, BLOCK_R], B [BLOCK_R, N] and the mask [BLOCK_R] of ranks r0 up to r0 + BLOCK_R.

    The mask is false from rank r on; there the values of xa and B are undefined.
    """
    xa, B = low_rank
    offs_r = r0 + tl.arange(0, BLOCK_R)
    xa_ptrs = xa.ptr + spot.rows.to(tl.int64)[:, None] * xa.stride_m
    xa_ptrs += offs_r[None, :] * xa.stride_k
    # int64: a column times r * E passes 2**31
    B_ptrs = B.ptr + e * B.stride_e + spot.cols.to(tl.int64)[None, :] * B.stride_n
    B_ptrs += offs_r.to(tl.int64)[:, None] * B.stride_k
    rows = tl.load(xa_ptrs, mask=offs_r[None, :] < r)
    columns = tl.load(B_ptrs, mask=(offs_r[:, None] < r) & spot.mask_n[None, :])
    return rows, columns, offs_r < r


@triton.jit
def _add_low_rank(acc, xa, lora_B, mask_r, PRECISION: tl.constexpr):
    """acc + B xa over the ranks of mask_r.  [M, R] @ [R, N] -> [M, N]"""
    xa = tl.where(mask_r[None, :], xa, 0.0)
    lora_B = tl.where(mask_r[:, None], lora_B.to(xa.dtype), 0.0)
    return tl.dot(xa, lora_B, acc, input_precision=PRECISION)


@triton.jit
def _add_product(acc, descs, x_ptrs, stride_xk, weight, spot, e, K, TILE):
    """acc [BLOCK_M, BLOCK_N] + x W[e]^T of a dense weight; e is the expert as int64."""
    offs_k = tl.arange(0, TILE.K)
    weight_ptrs = weight.ptr + e * weight.stride_e
    weight_ptrs += spot.cols.to(tl.int64)[None, :] * weight.stride_n
    weight_ptrs += offs_k.to(tl.int64)[:, None] * weight.stride_k
    for k in range(0, K, TILE.K):
        if descs.x is not None:
            rows = descs.x.load([spot.first_row, k])
        elif TILE.EVEN_K:
            rows = tl.load(x_ptrs)
        else:
            rows = tl.load(x_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
        if descs.weight is None:
            columns = tl.load(
                weight_ptrs, mask=(offs_k[:, None] < K - k) & spot.mask_n[None, :], other=0.0
            )
        elif TILE.K_UNIT:
            columns = descs.weight.load([spot.e, 0, spot.n0, k]).reshape(TILE.N, TILE.K).trans()
        else:
            columns = descs.weight.load([spot.e, k, spot.n0]).reshape(TILE.K, TILE.N)
        # [M, K] @ [K, N] -> [M, N]
        acc = tl.dot(rows, columns, acc, input_precision=TILE.PRECISION)
        x_ptrs += TILE.K * stride_xk
        weight_ptrs += TILE.K * weight.stride_k
    return acc


@triton.jit
def tile_product(inputs, spot, TILE, FORMAT):
    """acc [BLOCK_M, BLOCK_N] in fp32: the formula of this file."""
    descs, x, weight, codes, bias, low_rank, drop, shape = inputs
    # int64: an expert index times a stride passes 2**31
    e = spot.e.to(tl.int64)
    acc = tl.zeros((TILE.M, TILE.N), dtype=tl.float32)
    # factors of rank 16 are loaded before the K loop and used after it: the loop hides the latency
    LATE: tl.constexpr = low_rank.xa.ptr is not None and TILE.P == 0 and TILE.R == 16
    BLOCK_R: tl.constexpr = TILE.R if TILE.R < 32 else 32
    if LATE:
        xa, lora_B, mask_r = _low_rank_factors(low_rank, spot, e, 0, shape.r, BLOCK_R)
    elif low_rank.xa.ptr is not None:
        # not unrolled: the compiler would load all ranks at once and spill registers
        for r0 in tl.range(0, TILE.R, BLOCK_R, num_stages=2):
            xa, lora_B, mask_r = _low_rank_factors(low_rank, spot, e, r0, shape.r, BLOCK_R)
            acc = _add_low_rank(acc, xa, lora_B, mask_r, TILE.PRECISION)
        if TILE.P > 0:
            hashes = row_hash(tl.load(drop.seed), tl.load(drop.row_slot + spot.rows))
            acc = dropped(acc, hashes[:, None], spot.cols[None, :], TILE.P)
    if bias.ptr is not None:
        bias_ptrs = bias.ptr + e * bias.stride_e + spot.cols * bias.stride_n
        acc += tl.load(bias_ptrs, mask=spot.mask_n, other=0.0).to(tl.float32)[None, :]

    offs_k = tl.arange(0, TILE.K)
    x_ptrs = x.ptr + spot.x_rows.to(tl.int64)[:, None] * x.stride_m + offs_k[None, :] * x.stride_k
    if codes.scales is not None:
        acc = add_product_4bit(
            acc, x_ptrs, x.stride_k, weight, codes, e, spot.cols, spot.mask_n, shape.K, TILE, FORMAT
        )
    else:
        acc = _add_product(acc, descs, x_ptrs, x.stride_k, weight, spot, e, shape.K, TILE)
    if LATE:
        acc = _add_low_rank(acc, xa, lora_B, mask_r, TILE.PRECISION)
    return acc


@cache
def _blocks(
    op: str, arch: int, itemsize: int, block_m: int, K: int, k_unit: bool, size: int
) -> tuple[int, bool, dict] | None:
    """(programs a multiprocessor, whether by descriptor, constexprs) of a linear kernel.

    "By descriptor" means that the weight is loaded by a tensor descriptor.

    Args:
        size: 0, 1 or 2 for small, middle-sized or large experts (`EXPERT_BYTES`).
    Returns: None if the table has no row for this K and these experts.
    """
    row = lookup(op, arch, itemsize, block_m)
    if row is None or K > row.get("MAX_K", K) or row["GROUP"][size] is None:
        return None
    blocks = {name: value for name, value in row.items() if name != "MAX_K"}
    per_sm = blocks.pop("PER_SM")
    by_descriptor = blocks.pop("DESCRIPTOR")
    blocks |= {"BLOCK_M": block_m, "GROUP": blocks["GROUP"][size], "K_UNIT": k_unit}
    if "TAIL" in blocks:
        blocks |= {"TAIL": blocks["TAIL"] and K <= TAIL_MAX_K, "EVEN_K": K % blocks["BLOCK_K"] == 0}
    return per_sm, by_descriptor, blocks


def linear_blocks(
    op: str, x: torch.Tensor, weight: torch.Tensor | QuantizedWeight, block_m: int
) -> tuple[int, bool, dict] | None:
    """(programs, whether by descriptor, constexprs) of a linear kernel over x and weight [E, N, K].

    "By descriptor" means that the weight is loaded by a tensor descriptor.

    Returns: None if the table has no row for them.
    """
    arch, multiprocessors = device_facts(x.device)
    stride_e, _, stride_k = weight.stride()
    expert_bytes = stride_e * weight.dtype.itemsize
    size = sum(expert_bytes > bound for bound in EXPERT_BYTES)
    found = _blocks(op, arch, x.element_size(), block_m, weight.shape[2], stride_k == 1, size)
    if found is None:
        return None
    per_sm, by_descriptor, blocks = found
    return multiprocessors * per_sm, by_descriptor, blocks


def launch_facts(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    block_m: int,
    halves: int = 1,
) -> tuple[int, dict, Any | None]:
    """(programs, constexprs, weight descriptor or None) of a linear kernel over x and weight."""
    found = linear_blocks(op, x, weight, block_m)
    assert found is not None, f"the table has no row for {op} on this GPU with this dtype"
    programs, by_descriptor, blocks = found
    descriptor = None
    if by_descriptor:
        descriptor = weight_descriptor(
            weight, blocks["K_UNIT"], halves, blocks["BLOCK_N"], blocks["BLOCK_K"]
        )
    return programs, blocks, descriptor
