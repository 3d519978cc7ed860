"""Named tuples of what belongs together: a tensor with its strides, and the constants of a kernel.

The host makes them, `Weight.of(lora_A)`. A kernel takes them as arguments and hands them to its
helper functions, which read `lora_A.stride_k` and `TILE.M`. In all versions of Triton that are
supported, these rules hold:
    A parameter of a helper function always takes the same tuple. Triton compiles a helper once for
        equal types of members; given a second tuple of the same types, it would run the code of
        the first without a word.
    A tuple has either members of its own or tuples, never both. Beside a member, Triton 3.6 loses
        the constants inside a tuple after an `if`; drop when the floor is 3.9.
    A tuple of constants has a name in capitals. Its members are the `tl.constexpr`s, not the tuple,
        so its parameter has no annotation (`launching.nested.as_constexprs`). It is never assigned
        to another name, because it would become a tuple of values.
    Other tuples hold values. Only None decides there what is compiled.
    A number that changes with the batch is an argument of its own: `do_not_specialize` has no
        effect on members of tuples. So is a descriptor: the launcher of Triton 3.6 finds none in a
        tuple; drop when the floor is 3.9.
"""

from typing import Any, NamedTuple

import torch

from ..activation import Activation
from ..quantized import Codes4bit


class Operand(NamedTuple):
    """Rows [M, K] or tokens [T, K]; all members are None if there are none."""

    ptr: Any
    stride_m: Any
    stride_k: Any

    @classmethod
    def of(cls, x: torch.Tensor | None) -> "Operand":
        """x [M, K], which may be None."""
        if x is None:
            return cls(None, None, None)
        return cls(x, *x.stride())


class Weight(NamedTuple):
    """A matrix [N, K] of each expert, or its factor A [r, K] or B [N, r]; None as in `Operand`."""

    ptr: Any
    stride_e: Any
    stride_n: Any
    stride_k: Any

    @classmethod
    def of(cls, weight: torch.Tensor | None) -> "Weight":
        """weight [E, N, K], which may be None."""
        if weight is None:
            return cls(None, None, None, None)
        return cls(weight, *weight.stride())


class Bias(NamedTuple):
    """A vector [N] of each expert; None as in `Operand`."""

    ptr: Any
    stride_e: Any
    stride_n: Any

    @classmethod
    def of(cls, bias: torch.Tensor | None) -> "Bias":
        """bias [E, N], which may be None."""
        if bias is None:
            return cls(None, None, None)
        return cls(bias, *bias.stride())


class LowRank(NamedTuple):
    """The factors of B[e] xa[m]: xa [M, R] and B [E, N, r]."""

    xa: Any
    B: Any

    @classmethod
    def of(cls, xa: torch.Tensor | None, lora_B: torch.Tensor | None) -> "LowRank":
        """xa [M, R] and lora_B [E, N, r]; both may be None."""
        return cls(Operand.of(xa), Weight.of(lora_B))


class Shape(NamedTuple):
    """Columns and depth of a product, and the rank of its low-rank term or of its factor."""

    N: Any
    K: Any
    r: Any


class Drop(NamedTuple):
    """Pointers of the seed and of each row's slot, which give the mask; None without dropout."""

    seed: Any
    row_slot: Any


class Routes(NamedTuple):
    """Pointers of the tile table, and of each row's token."""

    tiles: Any
    row_token: Any


class Output(NamedTuple):
    """Pointers of y [M, N] and act [M, I], contiguous; one of them may be None."""

    y: Any
    act: Any


class Act(NamedTuple):
    """Constants of an activation, the fields of `Activation`. KIND is None if there is none.

    HALVES: 2 if the columns of the pre-activation are a gate half and an up half, else 1.
    """

    KIND: Any
    GATED: Any
    INTERLEAVED: Any
    LIMIT: Any
    ALPHA: Any
    UP_SHIFT: Any
    HALVES: Any

    @classmethod
    def of(cls, activation: Activation | None) -> "Act":
        """The constants of an activation, or of none."""
        if activation is None:
            return cls(None, False, False, None, 1.0, 0.0, 1)
        fields = activation.kind, activation.gated, activation.interleaved, activation.limit
        return cls(*fields, activation.alpha, activation.up_shift, activation.halves)


class Codes(NamedTuple):
    """Pointers of a weight in 4-bit codes, except the packed bytes; all None for a dense weight."""

    scales: Any
    code: Any
    nested_code: Any
    nested_scales: Any
    offset: Any

    @classmethod
    def of(cls, weight: Codes4bit) -> "Codes":
        """The tensors of a weight."""
        nested = weight.nested_code, weight.nested_scales, weight.offset
        return cls(weight.scales, weight.code, *nested)


class Format(NamedTuple):
    """Constants of 4-bit codes.

    Attributes:
        BLOCKSIZE: values that share a scale.
        SPAN: values that are adjacent in memory and share a scale, and are loaded together.
        NESTED: number of scales that share a second-level scale; 0 if scales are not quantized.
        EXPONENTS: whether a scale is stored as an exponent of 2 in 8 bits.
        LOW_FIRST: whether the low four bits of a byte are the first of its two codes.
    """

    BLOCKSIZE: Any
    SPAN: Any
    NESTED: Any
    EXPONENTS: Any
    LOW_FIRST: Any

    @classmethod
    def of(cls, weight: Codes4bit, span: int) -> "Format":
        """The constants of a weight.

        Args:
            span: number of values that the kernel loads together. It is even, and the values are
                adjacent and in one block.
        """
        nested = 0
        if weight.nested_code is not None:
            nested = weight.nested_blocksize
        exponents = not nested and weight.scales.dtype == torch.uint8
        return cls(weight.blocksize, span, nested, exponents, weight.low_first)
