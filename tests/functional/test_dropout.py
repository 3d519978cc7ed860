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
        kept = [lowbias32(k ^ start) >= int(p * 2**32) for k in range(width)]
        assert row == [pytest.approx(1 / (1 - p)) if keep else 0 for keep in kept]
