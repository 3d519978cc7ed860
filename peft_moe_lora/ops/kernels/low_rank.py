"""xa = scaling * x A^T and out = y + xa B^T: the update of a linear layer, added to its output.

In backward the same kernel computes yb = scaling * dy B and dx = dy W + yb A. It reads and writes
what two products of cuBLAS would, in one launch.

A program computes xa for a tile of rows, and adds to a part of the columns of y. With few rows the
columns have several parts, so that more programs load y; each of them computes xa anew.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..ranks import stored_rank
from .launching.launch import facts, launch
from .launching.table import ceil_div, device_facts, dot_precision, find, options_of, padded_rank
from .operands import Operand
from .tiles.cast import cast_as_weight

# programs on each multiprocessor that a call shall have at least
PER_SM = 2
# bytes of a program's tile of A or of B in the dtype of x
FACTOR_BYTES = 16 * 1024
# past this rank A and B are cast to the dtype of x before: so every program loads half the bytes,
# and 16 at a time
CAST_FROM = 16
# past this rank the bytes of A and B that programs load outweigh those of their rows
FEW_RANKS = 32


class _Sizes(NamedTuple):
    """Numbers of the products.

    Attributes:
        K, N: columns of x and of y.
        r: the rank; from it on, xa has zeros.
        in_A, in_xa: ranks of A and B, and of xa, in memory, zeros included.
        columns: columns of a part of y.
    """

    K: Any
    N: Any
    r: Any
    in_A: Any
    in_xa: Any
    columns: Any


class _Tile(NamedTuple):
    """Constants of the kernel.

    Attributes:
        M: rows of a program.
        K, N: columns of x and of y in a step of a loop.
        R: columns of xa, padded for `tl.dot`.
        EVEN_K, EVEN_N: whether all tiles of K and of N are whole.
        PRECISION: input_precision of the products.
    """

    M: Any
    K: Any
    N: Any
    R: Any
    EVEN_K: Any
    EVEN_N: Any
    PRECISION: Any


@triton.jit(do_not_specialize=["T"])
def _add_low_rank_kernel(x, lora_A, lora_B, xa_ptr, y, out_ptr, T, sizes, scaling, TILE):
    """Grid [tiles of rows, parts of the columns of y]."""
    dtype: tl.constexpr = x.ptr.dtype.element_ty
    offs_m = tl.program_id(0) * TILE.M + tl.arange(0, TILE.M)
    # past the last row, that row is repeated: loads need no mask. Copies are not stored
    rows = tl.minimum(offs_m, T - 1).to(tl.int64)
    stored = (offs_m < T)[:, None]
    offs_r = tl.arange(0, TILE.R)
    ranks = offs_r < sizes.in_A
    offs_k = tl.arange(0, TILE.K)
    x_ptrs = x.ptr + rows[:, None] * x.stride_m + offs_k[None, :] * x.stride_k
    A_ptrs = lora_A.ptr + offs_r[None, :] * lora_A.stride_m + offs_k[:, None] * lora_A.stride_k
    acc = tl.zeros((TILE.M, TILE.R), dtype=tl.float32)
    for k in range(0, sizes.K, TILE.K):
        if TILE.EVEN_K:
            x_tile = tl.load(x_ptrs)
            A_tile = tl.load(A_ptrs, mask=ranks[None, :], other=0.0)
        else:
            mask_k = offs_k < sizes.K - k
            x_tile = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            A_tile = tl.load(A_ptrs, mask=mask_k[:, None] & ranks[None, :], other=0.0)
        # [M, K] @ [K, R] -> [M, R]
        acc = tl.dot(x_tile, A_tile.to(dtype), acc, input_precision=TILE.PRECISION)
        x_ptrs += TILE.K * x.stride_k
        A_ptrs += TILE.K * lora_A.stride_k
    # zeros past rank r, also in a row that is not finite
    xa = tl.where((offs_r < sizes.r)[None, :], acc * scaling, 0.0).to(dtype)
    if tl.program_id(1) == 0:
        xa_ptrs = xa_ptr + offs_m.to(tl.int64)[:, None] * sizes.in_xa + offs_r[None, :]
        tl.store(xa_ptrs, xa, mask=stored & (offs_r < sizes.in_xa)[None, :])

    first = tl.program_id(1) * sizes.columns
    offs_n = first + tl.arange(0, TILE.N)
    if y.ptr is not None:
        y_rows = y.ptr + rows[:, None] * y.stride_m
    out_rows = out_ptr + rows[:, None] * sizes.N
    for _ in range(first, tl.minimum(first + sizes.columns, sizes.N), TILE.N):
        columns = offs_n[None, :]
        B_ptrs = lora_B.ptr + offs_r[:, None] * lora_B.stride_k + columns * lora_B.stride_m
        if TILE.EVEN_N:
            B_tile = tl.load(B_ptrs, mask=ranks[:, None], other=0.0)
        else:
            B_tile = tl.load(B_ptrs, mask=ranks[:, None] & (columns < sizes.N), other=0.0)
        total = tl.zeros((TILE.M, TILE.N), dtype=tl.float32)
        if y.ptr is not None:
            y_ptrs = y_rows + columns * y.stride_k
            if TILE.EVEN_N:
                total = tl.load(y_ptrs).to(tl.float32)
            else:
                total = tl.load(y_ptrs, mask=columns < sizes.N, other=0.0).to(tl.float32)
        # [M, R] @ [R, N] -> [M, N]
        total = tl.dot(xa, B_tile.to(dtype), total, input_precision=TILE.PRECISION)
        total = total.to(out_ptr.dtype.element_ty)
        if TILE.EVEN_N:
            tl.store(out_rows + columns, total, mask=stored)
        else:
            tl.store(out_rows + columns, total, mask=stored & (columns < sizes.N))
        offs_n += TILE.N


def add_low_rank(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    y: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Write y + xa B^T to `out`, and return xa = scaling * x A^T.

    Args:
        x: [T, K]; bf16, fp16 or fp32.
        lora_A: [r, K], any strides and float dtype; it is cast to the dtype of x.
        lora_B: [N, r], as lora_A.
        scaling: lora_alpha / r.
        y: [T, N], dtype of x, any strides; None for zeros.
        out: [T, N], dtype of x, contiguous; may be y itself.
    Returns: [T, R], dtype of x, with R of `ranks.stored_rank`; zeros past rank r.
    Twin: `reference.add_low_rank`.
    """
    T, K = x.shape
    N, r = lora_B.shape
    assert lora_A.shape == (r, K), f"A of rank {r} is {(r, K)}, got {tuple(lora_A.shape)}"
    for t in (out,) if y is None else (y, out):
        assert t.shape == (T, N), f"y and out are {(T, N)}, got {tuple(t.shape)}"
        assert t.dtype == x.dtype, f"y and out are {x.dtype}, got {t.dtype}"
    assert out.is_contiguous(), "a row of out is N elements after the row before it"
    R = stored_rank(r)
    xa = torch.empty(T, R, dtype=x.dtype, device=x.device)
    if T == 0:
        return xa
    if r > CAST_FROM:
        lora_A = _cast(lora_A.mT, R, x.dtype).mT
        lora_B = _cast(lora_B, R, x.dtype)
    in_A = lora_A.shape[0]
    arch, multiprocessors = device_facts(x.device)
    blocks = find("add_low_rank", arch, x.element_size(), _block_m(T, r, multiprocessors))
    ranks = padded_rank(r)
    block_m = blocks["BLOCK_M"]
    most = FACTOR_BYTES // x.element_size() // ranks
    block_k = min(blocks["BLOCK_K"], most)
    block_n = min(blocks["BLOCK_N"], most)
    tiles = ceil_div(T, block_m)
    tiles_n = ceil_div(N, block_n)
    parts = min(tiles_n, ceil_div(PER_SM * multiprocessors, tiles))
    columns = ceil_div(tiles_n, parts) * block_n
    precision = dot_precision(x.dtype)

    def arguments() -> tuple[tuple, tuple, dict]:
        tile = _Tile(
            M=block_m,
            K=block_k,
            N=block_n,
            R=ranks,
            EVEN_K=K % block_k == 0,
            EVEN_N=N % block_n == 0,
            PRECISION=precision,
        )
        operands = Operand.of(x), Operand.of(lora_A), Operand.of(lora_B), xa, Operand.of(y), out
        numbers = _Sizes(K, N, r, in_A, R, columns), scaling
        return operands, numbers, {"TILE": tile, **options_of(blocks)}

    key = (
        "add_low_rank", facts(x, lora_A, lora_B, y), K, N, r, columns, scaling, precision, block_m,
    )  # fmt: skip
    tensors = x, lora_A, lora_B, xa, y, out
    grid = tiles, ceil_div(N, columns), 1
    launch(key, _add_low_rank_kernel, grid, tensors, arguments, (T,))
    return xa


def _cast(factor: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """A factor [N, r] in `dtype` with zeros up to rank `width`, in its own order in memory."""
    ranks_adjacent = factor.stride(1) == 1
    return cast_as_weight(factor[None], width, dtype, ranks_adjacent)[0]


def _block_m(T: int, r: int, multiprocessors: int) -> int:
    """Rows of a tile: with more rows fewer programs load all of A and B, and fewer run at once."""
    if r > FEW_RANKS and T >= 8 * multiprocessors:
        return 64
    return 32 if T >= 8 * multiprocessors else 16
