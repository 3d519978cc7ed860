"""acc[m, n] = mask * (B[e] xa[m]) + bias[e] + W[e] x[row]: one output tile of one expert.

`linear` and `linear_act` share this code. The other linear kernels use only its tile table and its
order of tiles.

Legend, of one tile:
    e: the tile's expert
    rows [BLOCK_M]: rows of xa and of the output; past the expert's last row, that row is repeated
    x_rows [BLOCK_M]: rows of x: tokens if x is gathered, else the same as rows
    cols [BLOCK_N]: columns of weight, bias and lora_B
    HALVES: 2 if a tile holds BLOCK_N / 2 columns of the gate half and as many of the up half
    width: columns of a half       n0: the tile's first column within a half
    weight_desc: descriptor [E, HALVES, width, K] if K_UNIT, else [E, K, N]; None if the weight is
        loaded by pointers
    codes, FORMAT: as in `decode_4bit`; weight_ptr then points to packed bytes. For a dense weight
        codes[0] is None.
With dropout the low-rank term is computed first, and the accumulator is multiplied by the mask.
Then the bias is added, and the K loop adds W[e] x[row].
"""

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from ...quantized import QuantizedWeight
from ...ranks import stored_rank
from ..codes.product_4bit import add_product_4bit
from ..launching.table import device_facts, lookup
from .descriptors import weight_descriptor
from .dropout import dropout_mask

# an expert is small up to the first number of bytes, and large above the second. L2 can hold
# several small experts. A large expert leaves L2 before all of its row tiles have read it. The
# table has one GROUP each for small, middle-sized and large experts
EXPERT_BYTES = 12 * 2**20, 32 * 2**20
# half tiles (TAIL) are used up to this K; with K=7168 they took 7.1 ms instead of 6.5 (NVIDIA H200,
# 2026-11-21)
TAIL_MAX_K = 5120


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
def _low_rank_factors(
    xa_ptr, lora_B_ptr, e, rows, cols, mask_n, r0, r, stride_xam, stride_xar, stride_be, stride_bn,
    stride_br, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """xa [M, BLOCK_R], B [BLOCK_R, N] and the mask [BLOCK_R] of ranks r0 up to r0 + BLOCK_R.

    The mask is false from rank r on; there the values of xa and B are undefined.
    """
    offs_r = r0 + tl.arange(0, BLOCK_R)
    xa_ptrs = xa_ptr + rows.to(tl.int64)[:, None] * stride_xam + offs_r[None, :] * stride_xar
    # int64: a column times r * E passes 2**31
    lora_B_ptrs = lora_B_ptr + e * stride_be + cols.to(tl.int64)[None, :] * stride_bn
    lora_B_ptrs += offs_r.to(tl.int64)[:, None] * stride_br
    xa = tl.load(xa_ptrs, mask=offs_r[None, :] < r)
    lora_B = tl.load(lora_B_ptrs, mask=(offs_r[:, None] < r) & mask_n[None, :])
    return xa, lora_B, offs_r < r


@triton.jit
def _add_low_rank(acc, xa, lora_B, mask_r, PRECISION: tl.constexpr):
    """acc + B xa over the ranks of mask_r.  [M, R] @ [R, N] -> [M, N]"""
    xa = tl.where(mask_r[None, :], xa, 0.0)
    lora_B = tl.where(mask_r[:, None], lora_B.to(xa.dtype), 0.0)
    return tl.dot(xa, lora_B, acc, input_precision=PRECISION)


@triton.jit
def tile_product(
    x_ptr, x_desc, weight_ptr, weight_desc, codes, bias_ptr, xa_ptr, lora_B_ptr, seed_ptr,
    row_slot_ptr, e, rows, x_rows, first_row, n0, cols, mask_n, K, r,
    stride_xm, stride_xk, stride_we, stride_wn, stride_wk, stride_xam, stride_xar, stride_be,
    stride_bn, stride_br, stride_biase, stride_biasn,
    P: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, K_UNIT: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] in fp32: the formula of this file."""
    expert = e
    # int64: an expert index times a stride passes 2**31
    e = e.to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # factors of rank 16 are loaded before the K loop and used after it: the loop hides the latency
    LATE: tl.constexpr = xa_ptr is not None and P == 0 and R == 16
    BLOCK_R: tl.constexpr = R if R < 32 else 32
    if LATE:
        xa, lora_B, mask_r = _low_rank_factors(
            xa_ptr, lora_B_ptr, e, rows, cols, mask_n, 0, r, stride_xam, stride_xar, stride_be,
            stride_bn, stride_br, BLOCK_R,
        )  # fmt: skip
    elif xa_ptr is not None:
        # not unrolled: the compiler would load all ranks at once and spill registers
        for r0 in tl.range(0, R, BLOCK_R, num_stages=2):
            xa, lora_B, mask_r = _low_rank_factors(
                xa_ptr, lora_B_ptr, e, rows, cols, mask_n, r0, r, stride_xam, stride_xar,
                stride_be, stride_bn, stride_br, BLOCK_R,
            )  # fmt: skip
            acc = _add_low_rank(acc, xa, lora_B, mask_r, PRECISION)
        if P > 0:
            slots = tl.load(row_slot_ptr + rows)
            acc *= dropout_mask(seed_ptr, slots[:, None], cols[None, :], P)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + e * stride_biase + cols * stride_biasn, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]

    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + x_rows.to(tl.int64)[:, None] * stride_xm + offs_k[None, :] * stride_xk
    if codes[0] is not None:
        acc = add_product_4bit(
            acc, x_ptrs, weight_ptr, codes, e, cols, mask_n, K, stride_xk, stride_we, stride_wn,
            stride_wk, PRECISION, BLOCK_N, BLOCK_K, K_UNIT, FORMAT,
        )  # fmt: skip
    else:
        weight_ptrs = weight_ptr + e * stride_we + cols.to(tl.int64)[None, :] * stride_wn
        weight_ptrs += offs_k.to(tl.int64)[:, None] * stride_wk
        for k in range(0, K, BLOCK_K):
            if x_desc is not None:
                x = x_desc.load([first_row, k])
            elif EVEN_K:
                x = tl.load(x_ptrs)
            else:
                x = tl.load(x_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
            if weight_desc is None:
                weight = tl.load(
                    weight_ptrs, mask=(offs_k[:, None] < K - k) & mask_n[None, :], other=0.0
                )
            elif K_UNIT:
                weight = weight_desc.load([expert, 0, n0, k]).reshape(BLOCK_N, BLOCK_K).trans()
            else:
                weight = weight_desc.load([expert, k, n0]).reshape(BLOCK_K, BLOCK_N)
            acc = tl.dot(x, weight, acc, input_precision=PRECISION)  # [M, K] @ [K, N] -> [M, N]
            x_ptrs += BLOCK_K * stride_xk
            weight_ptrs += BLOCK_K * stride_wk
    if LATE:
        acc = _add_low_rank(acc, xa, lora_B, mask_r, PRECISION)
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


def strides_or_zeros(t: torch.Tensor | None, ndim: int) -> tuple[int, ...]:
    """The strides of an argument that may be None; zeros for None."""
    if t is None:
        return (0,) * ndim
    return t.stride()


def rank_of(xa: torch.Tensor | None, lora_B: torch.Tensor | None) -> int:
    """r of rows xa [M, R] and of lora_B [E, N, r]; 0 without a low-rank term.

    Raises:
        AssertionError: if the two are not of one rank.
    """
    if xa is None or lora_B is None:
        return 0
    r = lora_B.shape[2]
    assert xa.shape[1] == stored_rank(r), f"B of rank {r} and rows of {xa.shape[1]} columns"
    return r
