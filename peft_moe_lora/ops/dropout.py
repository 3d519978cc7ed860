"""mask[m, k] = 0 or 1 / (1 - p), computed only from the seed, the slot of row m and the column k.

No mask is stored: backward computes it again. One hash serves two columns: each takes 15 bits of
one half, and is dropped if they are below p * 2^15. So p is rounded to a multiple of 2^-15, and the
scale belongs to the rounded p.

Source: the 32-bit integer hash "lowbias32" of Wellons 2018, applied to k // 2 ^ hash(slot ^ seed).
"""

from dataclasses import dataclass

import torch

# values that the bits of a column may have
STEPS = 2**15


@dataclass(frozen=True)
class Dropout:
    """Inverted dropout whose mask can be computed again from a seed, in any order of the rows.

    Attributes:
        p: probability that an element is dropped, in (0, 1).
        seed: [1] int64 on the device of the rows; only its low 32 bits are used.
    """

    p: float
    seed: torch.Tensor


def threshold(p: float) -> int:
    """p * 2^15, rounded; an element is dropped if its bits are below it."""
    return min(max(round(p * STEPS), 1), STEPS - 1)


def kept_scale(p: float) -> float:
    """1 / (1 - p), of the rounded p."""
    return STEPS / (STEPS - threshold(p))


def dropout_mask(dropout: Dropout, row_slot: torch.Tensor, width: int) -> torch.Tensor:
    """The mask of some rows.

    Args:
        row_slot: [M] int32, the flat (token, slot) of each row.
        width: number of columns.
    Returns: [M, width] fp32 of 0 and 1 / (1 - p).
    """
    slot_hash = _mix(row_slot.long() ^ (dropout.seed & 0xFFFFFFFF))
    columns = torch.arange(width, device=row_slot.device)
    pair_hash = _mix(columns[None, :] // 2 ^ slot_hash[:, None])
    # the upper 15 bits of a half
    bits = pair_hash >> 16 * (columns % 2) + 1 & 0x7FFF
    return (bits >= threshold(dropout.p)).float() * kept_scale(dropout.p)


def _mix(h: torch.Tensor) -> torch.Tensor:
    """lowbias32 in int64: a product may overflow, but its low 32 bits are correct."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
    return h ^ (h >> 16)
