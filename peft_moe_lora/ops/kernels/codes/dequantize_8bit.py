"""value[r, c] = code[r, c] * scale of its tile * unit, for every expert that has rows.

Legend:
    code: int8, or float8 e4m3 whose bits are passed as uint8
    scale: fp32, or a uint8 e that means 2**(e - 127); one for each tile of TILE_R x TILE_C values
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...quantized import Codes8bit
from ..launching.launch import launch
from ..launching.table import ceil_div, device_facts, find, options_of


class _Sizes(NamedTuple):
    """Rows and columns of an expert, and tiles along each of them."""

    R: Any
    C: Any
    tiles_r: Any
    tiles_c: Any


class _Tile(NamedTuple):
    """Constants of the kernel.

    Attributes:
        R, C: rows and columns that share a scale.
        BLOCK_R, BLOCK_C: rows and columns of a program.
        FLOATS: whether codes are e4m3.
        EXPONENTS: whether a scale is stored as an exponent of 2 in 8 bits.
        UNIT: the unit.
    """

    R: Any
    C: Any
    BLOCK_R: Any
    BLOCK_C: Any
    FLOATS: Any
    EXPONENTS: Any
    UNIT: Any


@triton.jit(do_not_specialize=["first"])
def _dequantize_8bit_kernel(codes_ptr, out_ptr, scales_ptr, expert_offsets_ptr, first, sizes, TILE):
    """Grid [blocks of an expert, experts]. An expert without rows is not written."""
    e = first + tl.program_id(1)
    if tl.load(expert_offsets_ptr + e + 1) == tl.load(expert_offsets_ptr + e):
        return
    R = sizes.R
    C = sizes.C
    num_c = tl.cdiv(C, TILE.BLOCK_C)
    r = (tl.program_id(0) // num_c * TILE.BLOCK_R + tl.arange(0, TILE.BLOCK_R))[:, None]
    c = (tl.program_id(0) % num_c * TILE.BLOCK_C + tl.arange(0, TILE.BLOCK_C))[None, :]
    mask = (r < R) & (c < C)
    within = r.to(tl.int64) * C + c
    # int64: an expert index times its size passes 2**31
    codes = tl.load(codes_ptr + e.to(tl.int64) * R * C + within, mask=mask, other=0)
    if TILE.FLOATS:
        # e4m3 is decoded by bit operations, because compute capability 8.0 has no such type. Its
        # bits are those of an fp16 with another exponent bias, and without infinity
        bits = codes.to(tl.int16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        values = tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    else:
        values = codes.to(tl.float32)
    scale_ptrs = scales_ptr + e.to(tl.int64) * sizes.tiles_r * sizes.tiles_c
    scale_ptrs += r // TILE.R * sizes.tiles_c
    scale_ptrs += c // TILE.C
    scales = tl.load(scale_ptrs, mask=mask, other=0)
    if TILE.EXPONENTS:
        # e becomes the exponent bits of an fp32. e = 0 means 2**-127, a denormal with bits 1 << 22
        scales = tl.maximum(scales.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)
    values *= scales
    if TILE.UNIT != 1.0:
        values *= TILE.UNIT
    out_ptrs = out_ptr + tl.program_id(1).to(tl.int64) * R * C + within
    tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_8bit(
    weight: Codes8bit, expert_offsets: torch.Tensor, first: int, out: torch.Tensor
) -> torch.Tensor:
    """`dequantize` of a weight that has one code in a byte."""
    _, R, C = weight.stored_shape
    tile_r, tile_c = weight.tile
    floats = weight.codes.dtype != torch.int8
    arch, _ = device_facts(out.device)
    blocks = find("dequantize", arch, out.element_size(), 16)
    block = blocks["BLOCK"]
    block_c = min(block, 256)

    def arguments() -> tuple[tuple, tuple, dict]:
        tile = _Tile(
            R=tile_r,
            C=tile_c,
            BLOCK_R=block // block_c,
            BLOCK_C=block_c,
            FLOATS=floats,
            EXPONENTS=scales.dtype == torch.uint8,
            UNIT=weight.unit,
        )
        sizes = _Sizes(R, C, *scales.shape[1:])
        return (codes, out, scales, expert_offsets), (sizes,), {"TILE": tile, **options_of(blocks)}

    scales = weight.scales
    key = (
        "dequantize_8bit", out.dtype, scales.dtype, scales.shape, R, C, floats, weight.tile,
    )  # fmt: skip
    codes = weight.codes
    if floats:
        # passed as uint8: older devices do not know float8 types
        codes = codes.view(torch.uint8)
    grid = ceil_div(R, block // block_c) * ceil_div(C, block_c), out.shape[0], 1
    tensors = codes, out, scales, expert_offsets
    launch(key, _dequantize_8bit_kernel, grid, tensors, arguments, (first,))
    return out
