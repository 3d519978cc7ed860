"""value[i] = code[q[i]] * scale[i // blocksize], gathered and decoded for the experts that have rows, in one pass.

Legend: an expert is R * C values in the order of its bytes, in groups of SPAN that share a block whichever expert
they belong to; a byte holds two codes; blocks run over the whole stack. codes: as `codes_4bit` says.
"""

import torch
import triton
import triton.language as tl

from ...quantized import Codes4bit
from ..launching.launch import launch
from ..launching.table import ceil_div, device_facts, find
from .codes_4bit import code_operands, decoded_scales, decoded_values, load_scales


@triton.jit(do_not_specialize=["first"])
def _dequantize_4bit_kernel(
    packed_ptr, scales_ptr, code_ptr, nested_code_ptr, nested_scales_ptr, offset_ptr, out_ptr, expert_offsets_ptr,
    first, groups,
    BLOCKSIZE: tl.constexpr, SPAN: tl.constexpr, NESTED: tl.constexpr, EXPONENTS: tl.constexpr,
    LOW_FIRST: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Grid [tiles of an expert, experts]: GROUPS groups each; an expert without rows is left as it was."""
    e = first + tl.program_id(1)
    if tl.load(expert_offsets_ptr + e + 1) == tl.load(expert_offsets_ptr + e):
        return
    codes = (scales_ptr, code_ptr, nested_code_ptr, nested_scales_ptr, offset_ptr)
    FORMAT: tl.constexpr = (BLOCKSIZE, SPAN, NESTED, EXPONENTS, LOW_FIRST)
    HALF: tl.constexpr = SPAN // 2
    g = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    mask = g < groups
    # int64: groups of all experts pass 2**31 in values
    flat = e.to(tl.int64) * groups + g
    packed = tl.load(
        packed_ptr + flat[:, None] * HALF + tl.arange(0, HALF)[None, :], mask=mask[:, None], other=0
    )
    stored, nested = load_scales(codes, flat // (BLOCKSIZE // SPAN), mask, FORMAT)
    scales = decoded_scales(codes, stored, nested, FORMAT)[:, None]
    values = decoded_values(codes, packed, scales, out_ptr.dtype.element_ty, FORMAT)
    out_ptrs = (
        out_ptr
        + (tl.program_id(1).to(tl.int64) * groups + g)[:, None] * SPAN
        + tl.arange(0, SPAN)[None, :]
    )
    tl.store(out_ptrs, values, mask=mask[:, None])


def dequantize_4bit(
    weight: Codes4bit, expert_offsets: torch.Tensor, first: int, out: torch.Tensor
) -> torch.Tensor:
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
    group = weight.group
    groups = R * C // group
    blocks = dict(find("dequantize", device_facts(out.device)[0], out.element_size(), 16))
    per_program = max(1, blocks.pop("BLOCK") // group)
    pointers, codes = code_operands(weight, group)

    def rest():
        return (groups,), {"GROUPS": per_program, **codes, **blocks}

    key = "dequantize_4bit", out.dtype, weight.scales.dtype, groups, *codes.values()
    tensors = *pointers, out, expert_offsets
    grid = ceil_div(groups, per_program), out.shape[0], 1
    launch(key, _dequantize_4bit_kernel, grid, tensors, rest, (first,))
    return out
