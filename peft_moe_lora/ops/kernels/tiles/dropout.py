"""mask[m, k] = 0 or 1 / (1 - p), computed from (seed, slot of row m, column k), never stored.

Source: the 32-bit integer hash "lowbias32" of Wellons 2018, applied to k ^ hash(slot ^ seed).
Twin: `ops.dropout.dropout_mask`.
"""

import torch
import triton
import triton.language as tl

from ...dropout import Dropout


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
    """[M, K] fp32 of 0 and 1 / (1 - P) for slots [M] and columns [K]."""
    seed = tl.load(seed_ptr).to(tl.uint32)
    row_hash = _mix(slots.to(tl.uint32) ^ seed)
    h = _mix(columns.to(tl.uint32)[None, :] ^ row_hash[:, None])
    # compared as int64: Triton would choose the type of a literal threshold by its value
    keep = h.to(tl.int64) >= tl.full((), P * 4294967296.0, tl.float64).to(tl.int64)
    scale: tl.constexpr = 1.0 / (1.0 - P)
    return tl.where(keep, scale, 0.0)


def probability_and_seed(dropout: Dropout | None) -> tuple[float, torch.Tensor | None]:
    """(P, the tensor for seed_ptr); (0.0, None) if dropout is None."""
    if dropout is None:
        return 0.0, None
    return dropout.p, dropout.seed
