"""The mask of dropout is the documented hash, for every seed, slot and column."""

import pytest
import torch

from peft_moe_lora.ops import Dropout
from peft_moe_lora.ops.dropout import dropout_mask


def lowbias32(h):
    """Wellons' hash on a Python integer."""
    h ^= h >> 16
    h = h * 0x7FEB352D % 2**32
    h ^= h >> 15
    h = h * 0x846CA68B % 2**32
    return h ^ h >> 16


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
# the low 32 bits of the last ones are those of 5 and of 2**32 - 1
@pytest.mark.parametrize("seed", [0, 1, 0x9E3779B9, 2**32 - 1, 2**40 + 5, -1])
def test_the_mask_is_the_hash_of_column_slot_and_seed(p, seed):
    slots, width = [0, 1, 2, 7, 1000, 2**31 - 1], 50
    mask = dropout_mask(Dropout(p, torch.tensor([seed])), torch.tensor(slots).int(), width)
    for row, slot in zip(mask.tolist(), slots, strict=True):
        start = lowbias32(slot ^ seed % 2**32)
        # two columns share a hash: an even one has its low half, the odd one after it the high half
        bits = [lowbias32(k // 2 ^ start) >> 16 * (k % 2) & 0xFFFF for k in range(width)]
        below = round(p * 2**16)
        scale = pytest.approx(2**16 / (2**16 - below))
        assert row == [scale if b >= below else 0 for b in bits]


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_elements_are_dropped_as_often_as_p_says_and_independently(p):
    mask = dropout_mask(Dropout(p, torch.tensor([7])), torch.arange(2000).int(), 512)
    dropped = mask == 0
    assert dropped.float().mean() == pytest.approx(p, abs=2e-3)
    assert mask.mean() == pytest.approx(1, abs=4e-3)
    # neighbours: two columns of one hash, two hashes of one row, two rows
    pairs = dropped[:, 0::2] & dropped[:, 1::2], dropped[:, 1:-1:2] & dropped[:, 2::2]
    for both in (*pairs, dropped[1:] & dropped[:-1]):
        assert both.float().mean() == pytest.approx(p * p, abs=2e-3)
