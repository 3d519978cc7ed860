"""The ends of the ranges that numbers in a file may have."""

import pytest

from peft_moe_lora.files.config_fields import HIGHEST_RANK, is_count, is_rank


@pytest.mark.parametrize("value", [1, 2, HIGHEST_RANK])
def test_ranks_and_counts_within_their_range(value):
    assert is_rank(value)
    assert is_count(value)


@pytest.mark.parametrize("value", [-1, HIGHEST_RANK + 1, 1.0, "1", True, None])
def test_what_is_neither(value):
    assert not is_rank(value)
    assert not is_count(value)


def test_a_count_may_be_zero_and_a_rank_may_not():
    assert is_count(0)
    assert not is_rank(0)
