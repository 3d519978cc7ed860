"""value[i] = code[q[i]] * scale[i // blocksize], gathered and decoded for the experts that have rows, in one pass.

Legend: an expert is R * C values in the order of its bytes, in groups of GROUP that share a block whichever expert
they belong to; a byte holds two codes; block = flat index of a group / PER_BLOCK, over the whole stack.
"""

import torch
import triton
import triton.language as tl

from ..quantized import Codes4bit
from .config import ceil_div, device_facts, find
from .launch import launch


@triton.jit
def _block_scales(
    scales_ptr, nested_code_ptr, nested_scales_ptr, offset_ptr, block, mask, NESTED: tl.constexpr,
    EXPONENTS: tl.constexpr,
):  # fmt: skip
    """fp32 scales of blocks."""
    stored = tl.load(scales_ptr + block, mask=mask, other=0)
    if NESTED > 0:
        nested = tl.load(nested_scales_ptr + block // NESTED, mask=mask, other=0.0)
        # two roundings, as bitsandbytes has: launched without fused multiply-add
        scales = tl.load(nested_code_ptr + stored.to(tl.int32)) * nested + tl.load(offset_ptr)
    elif EXPONENTS:
        # the exponent in an fp32's place; 2**-127 has no exponent there
        scales = tl.maximum(stored.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)
    else:
        scales = stored
    return scales


@triton.jit(do_not_specialize=["first"])
def _dequantize_4bit_kernel(
    packed_ptr, out_ptr, code_ptr, scales_ptr, nested_code_ptr, nested_scales_ptr, offset_ptr, expert_offsets_ptr,
    first, groups,
    GROUP: tl.constexpr, PER_BLOCK: tl.constexpr, NESTED: tl.constexpr, EXPONENTS: tl.constexpr,
    LOW_FIRST: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Grid [tiles of an expert, experts]: GROUPS groups each; an expert without rows is left as it was."""
    e = first + tl.program_id(1)
    if tl.load(expert_offsets_ptr + e + 1) == tl.load(expert_offsets_ptr + e):
        return
    HALF: tl.constexpr = GROUP // 2
    g = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    mask = g < groups
    # int64: groups of all experts pass 2**31 in values
    flat = e.to(tl.int64) * groups + g
    packed = tl.load(packed_ptr + flat[:, None] * HALF + tl.arange(0, HALF)[None, :], mask=mask[:, None], other=0)
    high = tl.load(code_ptr + (packed >> 4).to(tl.int32))
    low = tl.load(code_ptr + (packed & 15).to(tl.int32))
    values = tl.interleave(low, high) if LOW_FIRST else tl.interleave(high, low)
    scales = _block_scales(
        scales_ptr, nested_code_ptr, nested_scales_ptr, offset_ptr, flat // PER_BLOCK, mask, NESTED, EXPONENTS
    )
    out_ptrs = out_ptr + (tl.program_id(1).to(tl.int64) * groups + g)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(out_ptrs, (values * scales[:, None]).to(out_ptr.dtype.element_ty), mask=mask[:, None])


def dequantize_4bit(weight: Codes4bit, expert_offsets: torch.Tensor, first: int, out: torch.Tensor) -> torch.Tensor:
    """`dequantize` of two codes a byte.

    Raises:
        ValueError: if an expert has an odd number of values, so that two experts share a byte.
    """
    _, R, C = weight.stored_shape
    if R * C % 2:
        raise ValueError(
            f"experts of {R} x {C} values share bytes in {weight.format}, which the kernels do not read; use "
            'backend="torch".'
        )
    group, nested = weight.group, weight.nested_code is not None
    groups = R * C // group
    blocks = dict(find("dequantize", device_facts(out.device)[0], out.element_size(), 16))
    per_program = max(1, blocks.pop("BLOCK") // group)

    def rest():
        constants = {
            "GROUP": group, "PER_BLOCK": weight.blocksize // group, "NESTED": nested * weight.nested_blocksize,
            "EXPONENTS": not nested and weight.scales.dtype == torch.uint8, "LOW_FIRST": weight.low_first,
            "GROUPS": per_program, "enable_fp_fusion": False, **blocks,
        }  # fmt: skip
        return (groups,), constants

    key = (
        "dequantize_4bit", out.dtype, weight.scales.dtype, group, groups, weight.blocksize, nested,
        weight.nested_blocksize, weight.low_first,
    )  # fmt: skip
    tensors = (
        weight.packed, out, weight.code, weight.scales, weight.nested_code, weight.nested_scales, weight.offset,
        expert_offsets,
    )  # fmt: skip
    grid = ceil_div(groups, per_program), out.shape[0], 1
    launch(key, _dequantize_4bit_kernel, grid, tensors, rest, (first,))
    return out
