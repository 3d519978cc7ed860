"""Tensor descriptors of a linear kernel's operands: x [M, K], xa [M, R], W [E, N, K], B [E, N, r].

A descriptor lets the GPU's copy engine (TMA) load a box of a tensor. The address and the strides
must be multiples of 16 bytes, and the last stride must be 1. For other operands no descriptor is
made.
"""

from collections.abc import Callable
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .cast import cast_as_weight

# (tensor, shape, strides, box) -> descriptor; Triton and Gluon each have a class of their own
Make = Callable[[torch.Tensor, list[int], list[int], list[int]], Any]


def make_descriptor(
    t: torch.Tensor, shape: list[int], strides: list[int], box: list[int], make: Make
) -> Any | None:
    """make(t, shape, strides, box), or None if the address or the strides do not allow it."""
    if strides[-1] != 1 or t.data_ptr() % 16:
        return None
    if any(stride <= 0 or stride * t.element_size() % 16 for stride in strides[:-1]):
        return None
    return make(t, shape, strides, box)


def weight_descriptor(
    weight: torch.Tensor,
    k_unit: bool,
    halves: int,
    block_n: int,
    block_k: int,
    make: Make = TensorDescriptor,
) -> Any | None:
    """A descriptor of the weight [E, N, K] whose box is one tile, or None if impossible.

    Args:
        k_unit: whether the weight has stride 1 along K. If so, the descriptor is 4-D,
            [E, halves, N / halves, K], and a tile is [block_n, block_k]. If not, the descriptor is
            3-D, [E, K, N], a tile is [block_k, block_n], and halves must be 1.
        halves: 2 if a tile has block_n / 2 columns of the gate half and as many of the up half,
            else 1.
        make: the class of the descriptor, or a function that makes one.
    """
    E, N, K = weight.shape
    stride_e, stride_n, stride_k = weight.stride()
    if k_unit:
        shape = [E, halves, N // halves, K]
        strides = [stride_e, N // halves * stride_n, stride_n, stride_k]
        box = [1, halves, block_n // halves, block_k]
        return make_descriptor(weight, shape, strides, box, make)
    if halves == 1:
        strides = [stride_e, stride_k, stride_n]
        return make_descriptor(weight, [E, K, N], strides, [1, block_k, block_n], make)
    return None


def row_descriptor(
    x: torch.Tensor, block_m: int, block_k: int, make: Make = TensorDescriptor
) -> Any | None:
    """A descriptor of rows x [M, K] whose box is [block_m, block_k], or None if impossible."""
    return make_descriptor(x, list(x.shape), list(x.stride()), [block_m, block_k], make)


def operand_descriptors(
    x: torch.Tensor | None,
    weight: torch.Tensor,
    xa: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    k_unit: bool,
    halves: int,
    rows: int,
    block_n: int,
    block_k: int,
    make: Make = TensorDescriptor,
) -> tuple | None:
    """Descriptors (x, weight, xa, B), or None if one of them cannot be made.

    An operand that is None has None as its descriptor. B is cast to the dtype of xa, in the memory
    order of the weight (`cast_as_weight`).

    Args:
        x: None if rows are gathered.
        halves: as for `weight_descriptor`.
        rows: rows of a box of x and xa.
        make: as for `weight_descriptor`.
    """
    tile = k_unit, halves, block_n, block_k, make
    x_desc = None
    if x is not None:
        x_desc = row_descriptor(x, rows, block_k, make)
        if x_desc is None:
            return None
    weight_desc = weight_descriptor(weight, *tile)
    if weight_desc is None:
        return None
    if xa is None or xa.shape[1] == 0:
        return x_desc, weight_desc, None, None
    xa_desc = row_descriptor(xa, rows, block_k, make)
    if xa_desc is None:
        return None
    lora_B_desc = weight_descriptor(cast_as_weight(lora_B, xa.shape[1], xa.dtype, k_unit), *tile)
    if lora_B_desc is None:
        return None
    return x_desc, weight_desc, xa_desc, lora_B_desc
