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
_DROPPED = """{
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


@triton.constexpr_function
def _instructions(below, scale):
    """`_DROPPED` with its constants."""
    return _DROPPED % (below << 16, scale)


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
    BELOW: tl.constexpr = _threshold(P)
    SCALE: tl.constexpr = 65536.0 / (65536 - BELOW)
    h = hashes ^ (columns >> 1)
    # an odd column compares the high half of a hash. The last step of the hash, h ^ (h >> 16),
    # leaves it as it is. An even column compares the low half, which it shifts to the high half
    shift = 16 + (columns & 1) * 16
    if not INTERPRETED:
        return tl.inline_asm_elementwise(
            _instructions(BELOW, SCALE), "=f,f,r,r", [x, h, shift], tl.float32, True, 1
        )
    h = h.to(tl.uint32) * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    h = tl.where(shift == 16, h ^ (h << 16), h)
    return x * tl.where(h >= BELOW << 16, SCALE, 0.0)


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
