"""Tensor descriptors of what a linear kernel reads: rows x and xa, the weight, and B laid out as the weight."""

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .cast import cast_as_weight


def make_descriptor(t: torch.Tensor, shape, strides, box, make):
    """make(t, shape, strides, box), or None where the copy engine does not take these strides or this address."""
    size = t.element_size()
    if strides[-1] != 1 or t.data_ptr() % 16 or any(s <= 0 or s * size % 16 for s in strides[:-1]):
        return None
    return make(t, shape, strides, box)


def weight_descriptor(
    weight: torch.Tensor,
    k_unit: bool,
    halves: int,
    block_n: int,
    block_k: int,
    make=TensorDescriptor,
):
    """A descriptor of weight [E, N, K] that loads one tile, or None where its strides, alignment or halves forbid.

    Args:
        k_unit: whether a tile comes as [block_n, block_k], which asks for a K stride of 1, or as [block_k, block_n].
        make: gives the descriptor of (tensor, shape, strides, box) that the kernel's language takes.
    """
    (E, N, K), (stride_e, stride_n, stride_k) = weight.shape, weight.stride()
    if k_unit:
        strides = [stride_e, N // halves * stride_n, stride_n, stride_k]
        box = [1, halves, block_n // halves, block_k]
        return make_descriptor(weight, [E, halves, N // halves, K], strides, box, make)
    if halves == 1:
        return make_descriptor(
            weight, [E, K, N], [stride_e, stride_k, stride_n], [1, block_k, block_n], make
        )
    return None


def row_descriptor(x: torch.Tensor, block_m: int, block_k: int, make=TensorDescriptor):
    """A descriptor of rows x [M, K] that loads one tile, or None where strides or alignment forbid."""
    return make_descriptor(x, list(x.shape), list(x.stride()), [block_m, block_k], make)


def operand_descriptors(
    x, weight, xa, lora_B, k_unit, halves, rows, block_n, block_k, make=TensorDescriptor
) -> tuple | None:
    """Descriptors of x, weight, xa and B, or None: one cannot be made. None in place of what there is not.

    Args:
        x: None where rows are gathered.
        halves: of the columns of a tile, as for `weight_descriptor`.
        rows: of a box of x and xa.
        make: as for `weight_descriptor`.
    """
    rank = xa is not None and xa.shape[1] > 0
    columns = k_unit, halves, block_n, block_k, make
    found = [
        None if x is None else row_descriptor(x, rows, block_k, make),
        weight_descriptor(weight, *columns),
    ]
    if (found[0] is None and x is not None) or found[1] is None:
        return None
    if not rank:
        return *found, None, None
    xa_desc = row_descriptor(xa, rows, block_k, make)
    factor = xa_desc and weight_descriptor(cast_as_weight(lora_B, xa.dtype, k_unit), *columns)
    return factor and (*found, xa_desc, factor)
