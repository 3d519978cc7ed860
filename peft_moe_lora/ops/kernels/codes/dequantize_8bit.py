"""value[n, k] = code[n, k] * scale of its tile (* unit), for the experts that have rows, in one pass."""

import torch
import triton
import triton.language as tl

from ...quantized import Codes8bit
from ..launching.launch import launch
from ..launching.table import ceil_div, device_facts, find


@triton.jit(do_not_specialize=["first"])
def _dequantize_8bit_kernel(
    codes_ptr, out_ptr, scales_ptr, expert_offsets_ptr, first, R, C, tiles_r, tiles_c,
    TILE_R: tl.constexpr, TILE_C: tl.constexpr, FLOATS: tl.constexpr, UNIT: tl.constexpr, EXPONENTS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid [tiles of an expert, experts]; an expert without rows is left as it was."""
    e = first + tl.program_id(1)
    if tl.load(expert_offsets_ptr + e + 1) == tl.load(expert_offsets_ptr + e):
        return
    num_c = tl.cdiv(C, BLOCK_C)
    r = (tl.program_id(0) // num_c * BLOCK_R + tl.arange(0, BLOCK_R))[:, None]
    c = (tl.program_id(0) % num_c * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    mask = (r < R) & (c < C)
    within = r.to(tl.int64) * C + c
    # int64: an expert index times its size passes 2**31
    codes = tl.load(codes_ptr + e.to(tl.int64) * R * C + within, mask=mask, other=0)
    if FLOATS:
        # e4m3 is fp16 with another bias and no infinity; compute capability 8.0 knows none of its own
        bits = codes.to(tl.int16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        values = tl.where((bits & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    else:
        values = codes.to(tl.float32)
    scale_ptrs = (
        scales_ptr + e.to(tl.int64) * tiles_r * tiles_c + r // TILE_R * tiles_c + c // TILE_C
    )
    scales = tl.load(scale_ptrs, mask=mask, other=0)
    if EXPONENTS:
        scales = tl.maximum(scales.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)
    values *= scales
    if UNIT != 1.0:
        values *= UNIT
    out_ptrs = out_ptr + tl.program_id(1).to(tl.int64) * R * C + within
    tl.store(out_ptrs, values.to(out_ptr.dtype.element_ty), mask=mask)


def dequantize_8bit(
    weight: Codes8bit, expert_offsets: torch.Tensor, first: int, out: torch.Tensor
) -> torch.Tensor:
    """`dequantize` of a code a byte."""
    _, R, C = weight.stored_shape
    floats = weight.codes.dtype != torch.int8
    blocks = dict(find("dequantize", device_facts(out.device)[0], out.element_size(), 16))
    block = blocks.pop("BLOCK")
    block_c = min(block, 256)
    blocks |= {"BLOCK_R": block // block_c, "BLOCK_C": block_c}

    def rest():
        constants = {
            "TILE_R": weight.tile[0], "TILE_C": weight.tile[1], "FLOATS": floats, "UNIT": weight.unit,
            "EXPONENTS": weight.scales.dtype == torch.uint8, **blocks,
        }  # fmt: skip
        return (R, C, *weight.scales.shape[1:]), constants

    key = (
        "dequantize_8bit",
        out.dtype,
        weight.scales.dtype,
        weight.scales.shape,
        R,
        C,
        floats,
        weight.tile,
    )
    # the launcher's key knows no float8, nor do older devices
    codes = weight.codes.view(torch.uint8) if floats else weight.codes
    grid = ceil_div(R, blocks["BLOCK_R"]) * ceil_div(C, block_c), out.shape[0], 1
    launch(
        key,
        _dequantize_8bit_kernel,
        grid,
        (codes, out, weight.scales, expert_offsets),
        rest,
        (first,),
    )
    return out
