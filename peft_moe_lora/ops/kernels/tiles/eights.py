"""Rows whose width is a multiple of 8 but not of 16, read 16 bytes at a time.

Triton knows of an integer argument whether it is a multiple of 16, and of no smaller number. So it
would read such rows element by element, because neither their beginnings nor the ends of their
masks seem to be aligned. With BY_8 the numbers are written in a form in which it sees eights.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def as_eights(n, BY_8: tl.constexpr):
    """n, which is a multiple of 8 if BY_8."""
    if BY_8:
        return n // 8 * 8
    else:
        return n


def by_8(*rows: torch.Tensor) -> bool:
    """BY_8 of rows [M, K]; False if they need no such form, or cannot have it."""
    sizes = [n for t in rows for n in (t.shape[1], t.stride(0))]
    if any(t.stride(1) != 1 for t in rows) or any(n % 8 for n in sizes):
        return False
    return any(n % 16 for n in sizes)
