"""mask[m, k] = 0 or 1 / (1 - p), computed from (seed, slot of row m, column k), never stored.

Source: the 32-bit integer hash "lowbias32" of Wellons 2018, applied to k // 2 ^ hash(slot ^ seed).
Twin: `ops.dropout.dropout_mask`.
"""

import torch
import triton
import triton.language as tl

from ...dropout import Dropout, threshold
from ...routing import Routing
from ..operands import Drop

NO_DROPOUT = Drop(None, None)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_threshold = triton.constexpr_function(threshold)

# $0 = x * mask, from x, h and a shift: 16 in an even column, 32, which gives 0, in an odd one. As
# operations on tiles, the masks of a whole tile would be computed before one of them is used. That
# takes more registers than there are
_MASKED = """{
.reg .b32 h, shifted;
.reg .f32 mask;
.reg .pred kept;
mul.lo.u32 h, $2, 0x7FEB352D;
shr.u32 shifted, h, 15;
xor.b32 h, h, shifted;
mul.lo.u32 h, h, 0x846CA68B;
shl.b32 shifted, h, $3;
xor.b32 h, h, shifted;
setp.ge.u32 kept, h, %d;
selp.f32 mask, %.17f, 0.0, kept;
mul.f32 $0, $1, mask;
}"""

# h: the bits of two columns, from x, the input of their hash. Each half of the register has the 15
# bits of a column plus 2^15 - threshold: bit 15 is set if the column is kept
_BITS = """mul.lo.u32 %(h)s, %(x)s, 0x7FEB352D;
shr.u32 shifted, %(h)s, 15;
xor.b32 %(h)s, %(h)s, shifted;
mul.lo.u32 %(h)s, %(h)s, 0x846CA68B;
shr.u32 shifted, %(h)s, 17;
shr.u32 %(h)s, %(h)s, 1;
xor.b32 %(h)s, %(h)s, shifted;
and.b32 %(h)s, %(h)s, 0x7FFF7FFF;
add.u32 %(h)s, %(h)s, %(above)d;
"""

# $0: the two elements of 16 bits of $1, each set to 0 if it is dropped. $2 and $3 are the inputs of
# their hashes; they differ if the elements are no neighbours. $4 and $5 say which half of a hash
# belongs to an element: 0x99 the low one, 0xBB the high one. prmt copies bit 15 of that half to all
# bits of the element
_KEPT = """{
.reg .b32 first, second, shifted;
%s%sshl.b32 shifted, $5, 8;
add.u32 shifted, shifted, $4;
add.u32 shifted, shifted, 0x4400;
prmt.b32 first, first, second, shifted;
and.b32 $0, $1, first;
}"""


@triton.constexpr_function
def scale_of_kept(p):
    """`ops.dropout.kept_scale`, which Triton refuses: it calls a function of plain Python."""
    return 2**15 / (2**15 - _threshold(p))


@triton.constexpr_function
def _masking(below, scale):
    """`_MASKED` with its constants."""
    return _MASKED % (below << 17, scale)


@triton.constexpr_function
def _keeping(below):
    """`_KEPT` with its constants."""
    above = (2**15 - below) * 0x10001
    first = _BITS % {"h": "first", "x": "$2", "above": above}
    second = _BITS % {"h": "second", "x": "$3", "above": above}
    return _KEPT % (first, second)


@triton.jit
def row_hash(seed, slots):
    """The part of a row's hashes that all of its columns share, in int32.

    seed: the element of `Dropout.seed`. slots: int32 of any shape.
    """
    h = slots.to(tl.uint32) ^ seed.to(tl.uint32)
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    h = h ^ (h >> 16)
    # the first step of the second hash. It adds no bits of k // 2 to others, because k < 2**17
    return (h ^ (h >> 16)).to(tl.int32)


@triton.jit
def dropped(x, hashes, columns, P: tl.constexpr):
    """x times the mask, in fp32, for x in fp32.

    hashes: row hashes [M, 1] and columns [1, K]; or [1, M] and [K, 1] for a transposed x. A block
    of columns may also be counted from its first one: its hashes are then hashes ^ (first // 2), if
    first is a multiple of a power of 2 above all of them.
    Two columns share a hash. A thread that has both computes it once, because the compiler sees
    that.
    """
    return _masked(x, hashes, columns, P, scale_of_kept(P))


@triton.jit
def kept(x, hashes, columns, P: tl.constexpr):
    """x where the mask is not 0, else 0, in the dtype of x; the rest as in `dropped`.

    Sums of such elements must be multiplied by `scale_of_kept`. In 16 bits this takes half as many
    instructions as `dropped`.
    """
    if x.dtype.primitive_bitwidth == 32:
        return _masked(x, hashes, columns, P, 1.0)
    if INTERPRETED:
        return _masked(x.to(tl.float32), hashes, columns, P, 1.0).to(x.dtype)
    h = hashes ^ (columns >> 1)
    half = 0x99 + (columns & 1) * 0x22
    return tl.inline_asm_elementwise(
        _keeping(_threshold(P)), "=r,r,r,r,r,r", [x, h, half], x.dtype, True, 2
    )


@triton.jit
def _masked(x, hashes, columns, P: tl.constexpr, SCALE: tl.constexpr):
    """x * SCALE where the mask is not 0, else 0; fp32, as x is. The rest as in `dropped`."""
    BELOW: tl.constexpr = _threshold(P)
    h = hashes ^ (columns >> 1)
    # an odd column compares the high half of a hash. The last step of the hash, h ^ (h >> 16),
    # leaves it as it is. An even column compares the low half, which it shifts to the high half
    shift = 16 + (columns & 1) * 16
    if not INTERPRETED:
        return tl.inline_asm_elementwise(
            _masking(BELOW, SCALE), "=f,f,r,r", [x, h, shift], tl.float32, True, 1
        )
    h = h.to(tl.uint32) * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    h = tl.where(shift == 16, h ^ (h << 16), h)
    return x * tl.where(h >= BELOW << 17, SCALE, 0.0)


def probability_and_seed(dropout: Dropout | None) -> tuple[float, torch.Tensor | None]:
    """(P, the tensor for seed_ptr); (0.0, None) if dropout is None."""
    if dropout is None:
        return 0.0, None
    return dropout.p, dropout.seed


def probability_and_drop(dropout: Dropout | None, routing: Routing) -> tuple[float, Drop]:
    """(P, what the mask is computed from); P is 0 if dropout is None."""
    if dropout is None:
        return 0.0, NO_DROPOUT
    return dropout.p, Drop(dropout.seed, routing.row_slot)
