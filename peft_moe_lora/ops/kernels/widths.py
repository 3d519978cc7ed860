"""The widths of rows for which kernels have fast ways."""

import torch


def fast_widths(widths: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """Multiples of 16, if a width of 16-bit numbers is no multiple of 8; else the widths.

    Rows that do not begin at multiples of 16 bytes have no tensor descriptor, and are loaded number
    by number: a layer takes 4 to 18 times as long (H200, 2026-11-30). Of rows that do, those of
    multiples of 16 take least: the compiler knows more about their addresses. That alone is not
    worth a copy. Rows of 32-bit numbers were not measured.

    Args:
        widths: all widths of a layer.
        dtype: dtype of the rows and the weights.
    Twin: `reference.fast_widths`.
    """
    if dtype.itemsize != 2 or all(width % 8 == 0 for width in widths):
        return widths
    return tuple(-(-width // 16) * 16 for width in widths)
