"""mask[m, k] = 0 or 1 / (1 - p), a function of (seed, slot of row m, column k) alone: nothing is stored.

Source: the 32-bit integer hash "lowbias32" of Wellons 2018, applied to k ^ hash(slot ^ seed).
Twin: `reference.dropout_mask`.
"""

import triton
import triton.language as tl


@triton.jit
def _mix(h):
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def dropout_mask(seed_ptr, slots, columns, P: tl.constexpr):
    """[M, K] fp32 of 0 and 1 / (1 - P) for slots [M] and columns [K]."""
    seed = tl.load(seed_ptr).to(tl.uint32)
    row_hash = _mix(slots.to(tl.uint32) ^ seed)
    h = _mix(columns.to(tl.uint32)[None, :] ^ row_hash[:, None])
    # through int64: as a literal the threshold's type would change with its size
    keep = h.to(tl.int64) >= tl.full((), P * 4294967296.0, tl.float64).to(tl.int64)
    scale: tl.constexpr = 1.0 / (1.0 - P)
    return tl.where(keep, scale, 0.0)
