"""out[e, n, j] = scaling * lora_B[e, n, j] in the dtype of x, in the memory order of the weight W.

As in the rows of rank r that it is multiplied with, zeros follow the r columns.
"""

import torch
import triton
import triton.language as tl

from ..launching.launch import facts, launch
from ..launching.table import ceil_div, power_of_2
from ..operands import Weight

# elements of a tile, for any rank
ELEMENTS = 4096


@triton.jit
def _cast_kernel(lora_B, out, N, r, width, scaling, R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Grid [tiles of N, E]."""
    # int64: an expert index times a stride, and a column times r * E, pass 2**31
    e = tl.program_id(1).to(tl.int64)
    offs_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]
    offs_r = tl.arange(0, R).to(tl.int64)[None, :]
    exists = offs_n < N
    lora_B_ptrs = lora_B.ptr + e * lora_B.stride_e + offs_n * lora_B.stride_n
    lora_B_ptrs += offs_r * lora_B.stride_k
    values = tl.load(lora_B_ptrs, mask=exists & (offs_r < r), other=0.0)
    out_ptrs = out.ptr + e * out.stride_e + offs_n * out.stride_n + offs_r * out.stride_k
    values = (values.to(tl.float32) * scaling).to(out.ptr.dtype.element_ty)
    tl.store(out_ptrs, values, mask=exists & (offs_r < width))


def cast_as_weight(
    lora_B: torch.Tensor, width: int, dtype: torch.dtype, k_unit: bool, scaling: float = 1.0
) -> torch.Tensor:
    """scaling * lora_B, [E, N, width] in `dtype`.

    Its ranks have stride 1 if k_unit, else N has. If lora_B already has this dtype, width and
    stride, and scaling is 1, it is returned itself. B is cast in every call, which moves about 2 %
    of the bytes of the product. A copy that is kept until the parameter's version changes could be
    out of date: paged and 8-bit optimizers write through a raw pointer, which does not change the
    version.

    Args:
        lora_B: [E, N, r], any strides and float dtype.
        width: at least r; past rank r the result has zeros.
        k_unit: whether the weight [E, N, K] of the same product has stride 1 along K.
        scaling: a factor, applied before rounding.
    """
    E, N, r = lora_B.shape
    contiguous = 1
    if k_unit:
        contiguous = 2
    same = lora_B.dtype == dtype and r == width and scaling == 1
    if same and lora_B.stride(contiguous) == 1:
        return lora_B
    if k_unit:
        out = torch.empty(E, N, width, dtype=dtype, device=lora_B.device)
    else:
        out = torch.empty(E, width, N, dtype=dtype, device=lora_B.device).transpose(1, 2)
    R = power_of_2(width)
    block_n = max(1, ELEMENTS // R)

    def arguments() -> tuple[tuple, tuple, dict]:
        constants = {"R": R, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1}
        return (Weight.of(lora_B), Weight.of(out)), (N, r, width, scaling), constants

    key = "cast", facts(lora_B, out), N, r, scaling
    launch(key, _cast_kernel, (ceil_div(N, block_n), E, 1), (lora_B, out), arguments)
    return out
