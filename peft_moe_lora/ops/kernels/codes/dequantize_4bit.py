"""value[i] = code[q[i]] * scale[i // blocksize] for every expert that has rows.

Legend:
    expert: R * C values in the order of their bytes; a byte holds the codes of two values
    block: BLOCKSIZE values that share a scale. The flat stack of all experts is cut into blocks, so
        two experts may share a block.
    group: SPAN adjacent values with one scale; SPAN divides the size of a block and of an expert
    codes, FORMAT: as in `decode_4bit`
"""

import torch
import triton
import triton.language as tl

from ...quantized import Codes4bit
from ..launching.launch import launch
from ..launching.table import ceil_div, device_facts, find
from ..operands import Codes, Format
from .decode_4bit import ROUNDED, decoded_scales, decoded_values, load_scales


@triton.jit(do_not_specialize=["first"])
def _dequantize_4bit_kernel(
    packed_ptr, codes, out_ptr, expert_offsets_ptr, first, groups, FORMAT, GROUPS: tl.constexpr
):
    """Grid [groups of an expert / GROUPS, experts]. An expert without rows is not written."""
    e = first + tl.program_id(1)
    if tl.load(expert_offsets_ptr + e + 1) == tl.load(expert_offsets_ptr + e):
        return
    SPAN: tl.constexpr = FORMAT.SPAN
    HALF: tl.constexpr = SPAN // 2
    g = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    mask = g < groups
    # int64: the index of a value in the stack passes 2**31
    flat = e.to(tl.int64) * groups + g
    packed = tl.load(
        packed_ptr + flat[:, None] * HALF + tl.arange(0, HALF)[None, :], mask=mask[:, None], other=0
    )
    stored, nested = load_scales(codes, flat // (FORMAT.BLOCKSIZE // SPAN), mask, FORMAT)
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
    """`dequantize` of a weight that has two codes in a byte.

    Raises:
        ValueError: if an expert has an odd number of values, so that two experts share a byte.
    """
    _, R, C = weight.stored_shape
    if R * C % 2:
        raise ValueError(
            f"experts of {R} x {C} values share bytes in {weight.format}, but the kernels need "
            'an even number of values in an expert; use backend="torch".'
        )
    group = weight.group
    groups = R * C // group
    arch, _ = device_facts(out.device)
    blocks = dict(find("dequantize", arch, out.element_size(), 16))
    per_program = max(1, blocks.pop("BLOCK") // group)
    codes = Codes.of(weight)
    form = Format.of(weight, group)

    def arguments() -> tuple[tuple, tuple, dict]:
        operands = weight.packed, codes, out, expert_offsets
        return operands, (groups,), {"FORMAT": form, "GROUPS": per_program, **blocks, **ROUNDED}

    key = "dequantize_4bit", out.dtype, weight.scales.dtype, groups, form
    grid = ceil_div(groups, per_program), out.shape[0], 1
    tensors = weight.packed, *codes, out, expert_offsets
    launch(key, _dequantize_4bit_kernel, grid, tensors, arguments, (first,))
    return out
