"""The operations in plain PyTorch round bf16 once, at the end: each against fp64 of the same input.

A product or a sum that is rounded on the way is wrong by a hundredfold of the tolerance here.
"""

import pytest
import torch

from helpers import assert_close
from peft_moe_lora.ops import Activation, reference
from peft_moe_lora.ops.grouped import grouped_addmm_, grouped_outer

# tokens enough that a sum in bf16 loses most of its digits
T, E, TOP_K, H, INNER, R = 600, 3, 2, 40, 24, 4
# sums in fp32 of products of bf16 numbers, which fp32 holds exactly
SUMS = 1e-5
# one rounding to bf16
ROUNDED = 2**-8

lows = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@pytest.fixture
def routing():
    return reference.route(torch.randint(E, (T, TOP_K)), E)


def draw(*shape, dtype):
    return torch.randn(*shape).to(dtype)


@lows
def test_outer_products_are_summed_in_the_dtype_of_the_gradient(routing, dtype):
    left, right = draw(T * TOP_K, R, dtype=dtype), draw(T * TOP_K, H, dtype=dtype)
    found, exact = (
        grouped_outer(a, b, routing.expert_offsets, torch.empty(E, R, H, dtype=out))
        for a, b, out in (
            (left, right, torch.float32),
            (left.double(), right.double(), torch.float64),
        )
    )
    assert_close(found, exact, SUMS)


@lows
def test_gradients_of_routing_weights_are_sums_in_fp32(routing, dtype):
    """positive numbers: their sum is far larger than what one more of them adds."""
    draw_, pre = draw(T * TOP_K, INNER, dtype=dtype).abs(), draw(T * TOP_K, 2 * INNER, dtype=dtype)
    dout, bias = draw(T, H, dtype=dtype).abs(), draw(E, H, dtype=dtype).abs()
    weights = torch.rand(T, TOP_K)
    act = Activation()(pre)
    *_, found = reference.expert_act_backward(
        draw_, pre, routing, Activation(), weights, dout=dout, bias=bias
    )
    assert found.dtype == torch.float32
    expert = torch.repeat_interleave(torch.arange(E), routing.expert_offsets.diff())
    rows = (act.double() * draw_.double()).sum(-1)
    rows += (bias.double()[expert] * dout.double()[routing.row_token]).sum(-1)
    assert_close(found.flatten()[routing.row_slot], rows, SUMS)


@lows
def test_rows_are_combined_in_fp32(routing, dtype):
    y, weights = draw(T * TOP_K, H, dtype=dtype), torch.rand(T, TOP_K)
    exact = reference.combine(y.double(), routing, weights.double())
    assert_close(reference.combine(y, routing, weights, dtype=torch.float32), exact, SUMS)
    found = reference.combine(y, routing, weights)
    assert found.dtype == dtype
    assert_close(found, exact, ROUNDED)


@lows
def test_gradients_of_combine_are_sums_in_fp32(routing, dtype):
    y, weights = draw(T * TOP_K, H, dtype=dtype).abs(), torch.rand(T, TOP_K)
    dout = draw(T, H, dtype=dtype).abs()
    dy, dweights = reference.combine_backward(dout, y, routing, weights)
    exact = reference.combine_backward(dout.double(), y.double(), routing, weights.double())
    assert dy.dtype == dtype
    assert dweights.dtype == torch.float32
    row_weights = weights.flatten()[routing.row_slot.long()]
    # both factors in fp32, and one rounding
    expected = row_weights[:, None] * dout.float()[routing.row_token.long()]
    assert torch.equal(dy, expected.to(dtype))
    assert_close(dweights, exact[1], SUMS)


@lows
def test_fp32_pairs_meet_low_rows(routing, dtype):
    """A and B are fp32 parameters beside a model in 16 bits: they are cast, not the rows."""
    x, A, B = draw(T, H, dtype=dtype), torch.randn(E, R, H), torch.randn(E, INNER, R)
    weight = draw(E, INNER, H, dtype=dtype)
    xa = reference.expert_shrink(x, A, routing, 0.5, gather=True)
    y = reference.expert_linear(x, weight, routing, xa=xa, lora_B=B, gather=True)
    assert xa.dtype == y.dtype == dtype
    exact_xa = reference.expert_shrink(x.double(), A.to(dtype).double(), routing, 0.5, gather=True)
    assert_close(xa, exact_xa, 2 * ROUNDED)
    product = x.double()[routing.row_token]
    exact = reference.expert_linear(
        product, weight.double(), routing, xa=xa.double(), lora_B=B.to(dtype).double()
    )
    assert_close(y, exact, 2 * ROUNDED)


@lows
def test_a_product_is_added_in_place(routing, dtype):
    x, weight = draw(T * TOP_K, R, dtype=dtype), draw(E, R, H, dtype=dtype)
    base = draw(T * TOP_K, H, dtype=dtype)
    exact = grouped_addmm_(base.double(), x.double(), weight.double(), routing.expert_offsets)
    out = base.clone()
    assert grouped_addmm_(out, x, weight, routing.expert_offsets) is out
    assert_close(out, exact, ROUNDED)
