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
_threshold = triton.constexpr_function(threshold)


@triton.jit
def _mix(h):
    """lowbias32 of uint32 h."""
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def dropout_mask(seed_ptr, slots, columns, P: tl.constexpr):
    """0 and 1 / (1 - P) in fp32, for slots and columns [M, 1] and [1, K], or [1, M] and [K, 1].

    A thread that has two columns of one hash computes it once, because the compiler sees that.
    """
    BELOW: tl.constexpr = _threshold(P)
    SCALE: tl.constexpr = 65536.0 / (65536 - BELOW)
    seed = tl.load(seed_ptr).to(tl.uint32)
    h = _mix((columns >> 1).to(tl.uint32) ^ _mix(slots.to(tl.uint32) ^ seed))
    bits = (h >> ((columns & 1) * 16).to(tl.uint32)) & 0xFFFF
    return tl.where(bits.to(tl.int32) >= BELOW, SCALE, 0.0)


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
