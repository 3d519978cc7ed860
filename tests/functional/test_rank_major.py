"""B in PEFT's order of columns gives the numbers of B in ours, and its gradient has that order."""

import pytest
import torch

from peft_moe_lora.functional import Projection, experts, rows_linear
from peft_moe_lora.ops import Activation

# all sizes differ, so that no wrong order of columns fits by chance
E, T, TOP_K, H, INNER, R = 6, 7, 2, 16, 32, 3


def own_activation(pre):
    gate, up = pre.chunk(2, -1)
    return torch.tanh(gate) * up


def rank_major(lora_B, num_experts=E):
    """[N, r*E] expert-major -> rank-major."""
    return lora_B.detach().view(len(lora_B), num_experts, R).transpose(1, 2).reshape(lora_B.shape)


def draw(*shape, dtype):
    return torch.randn(*shape, dtype=dtype)


def problem(dtype, chosen=None):
    """x, index, weights, and for up and down: the weight, A and B, expert-major."""
    torch.manual_seed(0)
    S = E if chosen is None else len(chosen)
    parts = []
    for N, K in ((2 * INNER, H), (H, INNER)):
        A = draw(R * S, K, dtype=dtype).requires_grad_()
        B = draw(N, R * S, dtype=dtype).requires_grad_()
        parts.append((draw(E, N, K, dtype=dtype), A, B))
    index = torch.randint(E + 1, (T, TOP_K))
    return draw(T, H, dtype=dtype), index, torch.rand(T, TOP_K, dtype=dtype), parts


WAYS = {
    "fused": (Activation(), None, {}),
    "recompute": (Activation(), None, {"recompute": True}),
    "unfused": (own_activation, None, {}),
    "some experts": (Activation(), (0, 2, 3, 5), {}),
}


@pytest.mark.parametrize("which", ["up", "down", "both"])
@pytest.mark.parametrize("way", WAYS)
def test_numbers_and_gradients_are_those_of_the_other_order(way, which):
    activation, chosen, options = WAYS[way]
    x, index, weights, parts = problem(torch.float64, chosen)
    S = E if chosen is None else len(chosen)
    ours, theirs, leaves = [], [], []
    for name, (W, A, B) in zip(("up", "down"), parts, strict=True):
        ours.append(Projection(W, None, A, B, 0.7, experts=chosen))
        turned = which in (name, "both")
        A2 = A.detach().clone().requires_grad_()
        B2 = (rank_major(B, S) if turned else B.detach().clone()).requires_grad_()
        theirs.append(Projection(W, None, A2, B2, 0.7, experts=chosen, rank_major=turned))
        leaves += [(A, A2, False), (B, B2, turned)]
    expected = experts(x, index, weights, *ours, activation, backend="torch", **options)
    actual = experts(x, index, weights, *theirs, activation, backend="torch", **options)
    torch.testing.assert_close(actual, expected)
    for out in (expected, actual):
        out.square().sum().backward()
    for right, found, turned in leaves:
        gradient = rank_major(right.grad, S) if turned else right.grad
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found.grad, gradient)


def test_rows_in_order_take_it_too():
    _, _, _, ((W, A, B), _) = problem(torch.float64)
    rows = draw(9, H, dtype=torch.float64)
    sizes = [2, 0, 3, 1, 2, 1]
    expected = rows_linear(rows, sizes, Projection(W, None, A, B), backend="torch")
    turned = Projection(W, None, A, rank_major(B), rank_major=True)
    torch.testing.assert_close(rows_linear(rows, sizes, turned, backend="torch"), expected)


def test_a_view_that_is_not_contiguous_is_copied():
    x, index, weights, parts = problem(torch.float64)
    (W, A, B), (W2, A2, B2) = parts
    wide = torch.zeros(len(B), 2 * R * E, dtype=torch.float64)
    wide[:, ::2] = rank_major(B)
    down = Projection(W2, None, A2, B2)
    expected = experts(x, index, weights, Projection(W, None, A, B), down, Activation())
    turned = Projection(W, None, A, wide[:, ::2], rank_major=True)
    torch.testing.assert_close(experts(x, index, weights, turned, down, Activation()), expected)
