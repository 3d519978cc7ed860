"""out[m] = x[m] @ weight[e] for the rows m of each expert e, in plain PyTorch.

On CUDA, `torch.nn.functional.grouped_mm` computes this without reading the offsets on the host, if
dtypes and strides allow it. Otherwise a loop over the experts calls `torch.mm`. On a CPU the loop
is faster: 17 ms against 29 ms (M=4096, K=N=512, E=32, fp32, two cores, 2026-11-21).
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F

from .quantized import QuantizedWeight


def grouped_mm(
    x: torch.Tensor, weight: torch.Tensor | QuantizedWeight, expert_offsets: torch.Tensor
) -> torch.Tensor:
    """out[m] = x[m] @ weight[e] for every row m of expert e.

    Args:
        x: [M, K] float rows in expert order.
        weight: [E, K, N] dtype of x, any strides. A quantized weight is decoded one expert at a
            time, and only for experts that have rows.
        expert_offsets: [E + 1] int32.
    Returns: [M, N], dtype of x; rows from expert_offsets[E] on are undefined.
    """
    if isinstance(weight, torch.Tensor) and _grouped_mm_runs(x, weight):
        return F.grouped_mm(x, weight, offs=expert_offsets[1:])
    out = x.new_empty(x.shape[0], weight.shape[2])
    for e, start, end in _segments(expert_offsets):
        torch.mm(x[start:end], weight[e], out=out[start:end])
    return out


def grouped_addmm_(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, expert_offsets: torch.Tensor
) -> torch.Tensor:
    """out[m] += x[m] @ weight[e], in place; shapes as in `grouped_mm`."""
    if _grouped_mm_runs(x, weight):
        return out.add_(F.grouped_mm(x, weight, offs=expert_offsets[1:]))
    for e, start, end in _segments(expert_offsets):
        out[start:end].addmm_(x[start:end], weight[e])
    return out


def grouped_outer(
    left: torch.Tensor, right: torch.Tensor, expert_offsets: torch.Tensor, out: torch.Tensor
) -> torch.Tensor:
    """out[e] = left[rows of e]^T @ right[rows of e].

    Args:
        left: [M, P] float rows in expert order.
        right: [M, Q] float, the same rows.
        expert_offsets: [E + 1] int32.
        out: [E, P, Q], any strides; the products are computed in its dtype. An expert without rows
            gets zeros.
    Returns: out.
    """
    out.zero_()
    for e, start, end in _segments(expert_offsets):
        out[e].copy_(left[start:end].t().to(out.dtype) @ right[start:end].to(out.dtype))
    return out


def _grouped_mm_runs(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `F.grouped_mm` supports these operands."""
    if not x.is_cuda or x.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    if 1 not in weight.stride()[1:] or not (_is_aligned(x) and _is_aligned(weight)):
        return False
    # the result has rows of N elements, whose size must be a multiple of 16 bytes too
    return all(n % 8 == 0 for n in weight.shape[1:])


def _is_aligned(t: torch.Tensor) -> bool:
    """Whether the address and all strides other than 1 are multiples of 16 bytes."""
    if t.data_ptr() % 16:
        return False
    return all(s == 1 or s * t.element_size() % 16 == 0 for s in t.stride())


def _segments(expert_offsets: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """(e, start, end) of every expert that has rows; reads the offsets on the host."""
    bounds = expert_offsets.tolist()
    return ((e, start, end) for e, (start, end) in enumerate(pairwise(bounds)) if end > start)
