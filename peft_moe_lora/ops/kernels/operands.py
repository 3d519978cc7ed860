"""Named tuples of what belongs together in a kernel: a tensor with its strides, and constants.

A kernel's own arguments are flat, as its launcher passes them. Its first lines make these tuples,
and its helper functions take them: `weight.stride_n`, `TILE.M`. A tuple of constants is made as a
`tl.constexpr`. In all versions of Triton that are supported, three rules hold:
    A parameter of a helper function always takes the same tuple. Triton compiles a helper once for
        equal types of members; given a second tuple of the same types, it would run the code of
        the first without a word.
    A tuple has either members of its own or tuples, never both. Beside a member, Triton 3.6 loses
        the constants inside a tuple after an `if`; drop when the floor is 3.9.
    A tuple without `tl.constexpr` holds values. A number that decides what is compiled belongs into
        a tuple of constants; only None decides there, too.
"""

from typing import Any, NamedTuple


class Operand(NamedTuple):
    """Rows [M, K] or tokens [T, K]; ptr is None if there are none."""

    ptr: Any
    stride_m: Any
    stride_k: Any


class Weight(NamedTuple):
    """A matrix [N, K] of each expert, or a factor B [N, r]; ptr is None if there is none."""

    ptr: Any
    stride_e: Any
    stride_n: Any
    stride_k: Any


class Bias(NamedTuple):
    """A vector [N] of each expert; ptr is None if there is none."""

    ptr: Any
    stride_e: Any
    stride_n: Any


class LowRank(NamedTuple):
    """The factors of B[e] xa[m]: xa [M, R] and B [E, N, r]."""

    xa: Any
    B: Any


class Shape(NamedTuple):
    """Columns and depth of a product, and the rank of its low-rank term."""

    N: Any
    K: Any
    r: Any


class Drop(NamedTuple):
    """What a dropout mask is computed from: pointers of the seed and of each row's slot."""

    seed: Any
    row_slot: Any


class Act(NamedTuple):
    """Constants of an activation, the fields of `Activation`. KIND is None if there is none."""

    KIND: Any
    GATED: Any
    INTERLEAVED: Any
    LIMIT: Any
    ALPHA: Any
    UP_SHIFT: Any


class Codes(NamedTuple):
    """Pointers of a weight in 4-bit codes, except the packed bytes; all None for a dense weight."""

    scales: Any
    code: Any
    nested_code: Any
    nested_scales: Any
    offset: Any


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
