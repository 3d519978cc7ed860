"""Which gradients are asked for changes none of the others, and a backward runs once.

A frozen adapter still has its term in the gradient of x; a frozen A leaves B its gradient.
"""

import itertools

import pytest
import torch

from helpers import assert_close
from peft_moe_lora.functional import Projection, experts, rows_linear
from peft_moe_lora.ops import Activation

T, E, TOP_K, H, INNER, R = 9, 3, 2, 8, 6, 2
SCALING = 1.5
NAMES = ["x", "top_k_weights", "up A", "up B", "down A", "down B"]


def own_activation(pre):
    """Steps of their own for each projection: no kernel has this activation."""
    gate, up = pre.chunk(2, -1)
    return torch.tanh(gate) * up


def layer(activation):
    """(leaves, ours, the same written out): functions without arguments."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    leaves = [draw(T, H), draw(T, TOP_K)]
    leaves += [draw(R * E, H), draw(2 * INNER, R * E), draw(R * E, INNER), draw(H, R * E)]
    x, weights, up_A, up_B, down_A, down_B = leaves
    up, down = draw(E, 2 * INNER, H), draw(E, H, INNER)
    index = torch.randint(E, (T, TOP_K), generator=generator)

    def ours():
        return experts(
            x,
            index,
            weights,
            Projection(up, None, up_A, up_B, SCALING),
            Projection(down, None, down_A, down_B, SCALING),
            activation,
        )

    def updated(weight, A, B, e):
        own = slice(e * R, (e + 1) * R)
        return weight[e] + SCALING * B[:, own] @ A[own]

    def written_out():
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(index == e)
            act = activation(x[token] @ updated(up, up_A, up_B, e).T)
            y = act @ updated(down, down_A, down_B, e).T
            out = out.index_add(0, token, y * weights[token, slot, None])
        return out

    return leaves, ours, written_out


PATHS = pytest.mark.parametrize(
    "activation", [Activation(), own_activation], ids=["whole", "steps"]
)
# every single gradient, every pair of them, and all but one
ASKED = [
    *itertools.combinations(range(6), 1),
    *itertools.combinations(range(6), 2),
    *itertools.combinations(range(6), 5),
]


@PATHS
@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: ", ".join(NAMES[i] for i in asked))
def test_a_gradient_is_the_same_whatever_else_is_frozen(activation, asked):
    leaves, ours, written_out = layer(activation)
    for i in asked:
        leaves[i].requires_grad_()
    wanted = [leaves[i] for i in asked]
    expected = torch.autograd.grad(written_out().square().sum(), wanted)
    found = torch.autograd.grad(ours().square().sum(), wanted)
    for i, gradient, right in zip(asked, found, expected, strict=True):
        assert_close(gradient, right, 1e-10, NAMES[i])


@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)], ids=str)
def test_the_same_of_rows_of_one_projection(asked):
    x = torch.randn(T, H, dtype=torch.float64)
    A = torch.randn(R * E, H, dtype=torch.float64)
    B = torch.randn(INNER, R * E, dtype=torch.float64)
    weight = torch.randn(E, INNER, H, dtype=torch.float64)
    sizes = [4, 0, T - 4]
    leaves = [x, A, B]
    wanted = [leaves[i].requires_grad_() for i in asked]
    rows = []
    for e, part in enumerate(x.split(sizes)):
        own = slice(e * R, (e + 1) * R)
        rows.append(part @ (weight[e] + SCALING * B[:, own] @ A[own]).T)
    expected = torch.autograd.grad(torch.cat(rows).square().sum(), wanted)
    y = rows_linear(x, sizes, Projection(weight, None, A, B, SCALING))
    found = torch.autograd.grad(y.square().sum(), wanted)
    for gradient, right in zip(found, expected, strict=True):
        assert_close(gradient, right, 1e-10)


@PATHS
def test_a_gradient_of_a_gradient_is_refused(activation):
    """Backward is written by hand; a second derivative through it would be wrong in silence."""
    leaves, ours, _ = layer(activation)
    for leaf in leaves:
        leaf.requires_grad_()
    gradients = torch.autograd.grad(ours().square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(gradient.square().sum() for gradient in gradients).backward()
