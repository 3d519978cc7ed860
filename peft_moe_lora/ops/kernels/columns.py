"""out[n, j * a + i] = matrix[n, i * b + j]: every row is an [a, b] matrix, and is transposed."""

import torch
import triton
import triton.language as tl

from .launching.launch import facts, launch
from .launching.table import ceil_div, power_of_2

# elements of a program's tile
ELEMENTS = 2048


@triton.jit
def _transpose_columns_kernel(
    matrix_ptr, out_ptr, a, b, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr
):
    """Grid [N, tiles of a * tiles of b]."""
    tiles_b = tl.cdiv(b, BLOCK_B)
    # int64: a row times its columns passes 2**31
    row = tl.program_id(0).to(tl.int64) * a * b
    offs_a = tl.program_id(1) // tiles_b * BLOCK_A + tl.arange(0, BLOCK_A)
    offs_b = tl.program_id(1) % tiles_b * BLOCK_B + tl.arange(0, BLOCK_B)
    mask = (offs_a < a)[:, None] & (offs_b < b)[None, :]
    tile = tl.load(matrix_ptr + row + offs_a[:, None] * b + offs_b[None, :], mask=mask)
    tile = tl.trans(tile.to(out_ptr.dtype.element_ty))
    tl.store(out_ptr + row + offs_b[:, None] * a + offs_a[None, :], tile, mask=tl.trans(mask))


def transpose_columns(matrix: torch.Tensor, a: int, dtype: torch.dtype) -> torch.Tensor:
    """Every row [a * b] as a matrix [a, b], transposed.

    Args:
        matrix: [N, a * b] float, contiguous.
        a: how many groups of columns a row has.
        dtype: float dtype of the result.
    Returns: [N, b * a], contiguous.
    Twin: `reference.transpose_columns`.
    """
    assert matrix.is_contiguous(), "a row is a * b elements after the row before it"
    N, columns = matrix.shape
    assert columns % a == 0, f"{columns} columns are not {a} groups"
    b = columns // a
    out = torch.empty(N, columns, dtype=dtype, device=matrix.device)
    if out.numel() == 0:
        return out
    # both sides of a tile are read or written in runs of adjacent elements
    block_b = min(power_of_2(b), max(ELEMENTS // power_of_2(a), 32))
    block_a = min(power_of_2(a), ELEMENTS // block_b)

    def arguments() -> tuple[tuple, tuple, dict]:
        blocks = {"BLOCK_A": block_a, "BLOCK_B": block_b, "num_warps": 4, "num_stages": 1}
        return (matrix, out), (a, b), blocks

    key = "transpose_columns", facts(matrix, out), a, b
    grid = N, ceil_div(a, block_a) * ceil_div(b, block_b), 1
    launch(key, _transpose_columns_kernel, grid, (matrix, out), arguments)
    return out
