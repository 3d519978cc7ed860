"""The model's own code sees zeros in the rows that nobody routed, forward and backward.

A row of a sentinel is computed by nobody. Code between or after the products may still add up all
rows: the gradient of a norm's weight is such a sum. Memory that nobody wrote holds NaN here.
"""

import pytest
import torch
from torch import nn

from helpers import assert_close
from peft_moe_lora.functional import Projection, experts
from peft_moe_lora.ops import Activation, reference

T, E, TOP_K, H, INNER, R = 12, 3, 2, 32, 16, 4

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


class OwnCode(nn.Module):
    """Code with a weight of its own; keeps the rows that it reads and the gradients it is given."""

    def __init__(self, function, width):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(0.5 + torch.rand(width))
        self.seen = []

    def forward(self, rows):
        out = self.function(rows) * self.weight
        self.seen.append(rows.detach().clone())
        if out.requires_grad:
            out.register_hook(lambda gradient: self.seen.append(gradient.clone()))
        return out


def gate(pre):
    first, second = pre.chunk(2, -1)
    return torch.tanh(first) * second


def norm(y):
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)


def layer(device, own_gate, own_norm, compiled=False):
    """(out, rows that own code saw, gradients, number of routed rows), then the right gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        tensor = torch.randn(*shape, generator=generator) * shape[-1] ** -0.5
        return tensor.to(device)

    up = Projection(draw(E, 2 * INNER, H), None, draw(R * E, H), draw(2 * INNER, R * E), 2.0)
    down = Projection(draw(E, H, INNER), None, draw(R * E, INNER), draw(H, R * E), 2.0)
    x = draw(T, H)
    weights = draw(T, TOP_K)
    leaves = [x, weights, up.lora_A, up.lora_B, down.lora_A, down.lora_B]
    for leaf in leaves:
        leaf.requires_grad_()
    index = torch.randint(E, (T, TOP_K), generator=generator)
    index[0, 0] = index[5, 1] = E
    index[7] = -1
    index[9] = E + 3
    index = index.to(device)
    activation = OwnCode(gate, INNER).to(device) if own_gate else Activation()
    post_norm = OwnCode(norm, H).to(device) if own_norm else None
    own = [code for code in (activation, post_norm) if isinstance(code, nn.Module)]
    leaves += [code.weight for code in own]

    def ours():
        return experts(x, index, weights, up, down, activation, post_norm=post_norm)

    def written_out():
        out = torch.zeros_like(x)
        for e in range(E):
            token, slot = torch.where(index == e)
            columns = slice(e * R, (e + 1) * R)
            W1 = up.weight[e] + 2.0 * up.lora_B[:, columns] @ up.lora_A[columns]
            W2 = down.weight[e] + 2.0 * down.lora_B[:, columns] @ down.lora_A[columns]
            y = activation(x[token] @ W1.T) @ W2.T
            if post_norm is not None:
                y = post_norm(y)
            out = out.index_add(0, token, y * weights[token, slot, None])
        return out

    return leaves, own, ours, written_out, int((index < E).logical_and(index >= 0).sum())


CODE = {"gate": (True, False), "norm": (False, True), "both": (True, True)}


@pytest.mark.parametrize("code", CODE)
def test_own_code_reads_zeros_and_is_given_zeros(code, device):
    leaves, own, ours, _, routed = layer(device, *CODE[code])
    torch.autograd.grad(ours().square().sum(), leaves)
    for module in own:
        rows, gradient = module.seen
        for tensor in (rows, gradient):
            assert tensor[:routed].ne(0).any(1).all()
            assert tensor[routed:].eq(0).all()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("code", CODE)
def test_every_gradient_is_that_of_the_routed_rows(code, compiled, device):
    leaves, own, ours, written_out, _ = layer(device, *CODE[code])
    expected = torch.autograd.grad(written_out().square().sum(), leaves)
    if compiled:
        # hooks and lists are not for Dynamo
        for module in own:
            module.forward = lambda rows, m=module: m.function(rows) * m.weight
        torch.compiler.reset()
        ours = torch.compile(ours, backend="aot_eager", fullgraph=True)
    found = torch.autograd.grad(ours().square().sum(), leaves)
    for i, (gradient, wanted) in enumerate(zip(found, expected, strict=True)):
        assert wanted.abs().max() > 0
        assert_close(gradient, wanted, what=f"gradient of input {i}")


def test_rows_are_sorted_by_expert_and_sentinels_come_last():
    top_k_index = torch.tensor([[2, 0], [0, -1], [5, 2]])
    expected = {
        "expert_offsets": [0, 2, 2, 4],
        "row_slot": [1, 2, 0, 5, 3, 4],
        "row_token": [0, 1, 0, 2, 1, 2],
        "slot_row": [2, 0, 1, -1, -1, 3],
    }
    routing = reference.route(top_k_index, 3)
    for name, values in expected.items():
        found = getattr(routing, name)
        assert found.dtype == torch.int32, name
        assert found.tolist() == values, name
