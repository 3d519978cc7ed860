"""A layer of the kernels under torch.compile computes what it computes without."""

import pytest
import torch

from ops.problems import DEVICE
from peft_moe_lora.functional import Projection, experts
from peft_moe_lora.ops import Activation, kernels, table_memory

E, H, I, TOP_K, RANK = 4, 32, 16, 2, 4  # noqa: E741 I is the glossary's letter


def own_activation(pre):
    """An activation that no kernel has."""
    gate, up = pre.chunk(2, -1)
    return torch.tanh(gate) * up


@pytest.mark.parametrize(
    "activation",
    [Activation(), pytest.param(own_activation, marks=pytest.mark.long)],
    ids=["fused", "unfused"],
)
def test_a_compiled_layer_gives_the_same_numbers_at_every_length(activation):
    def pair(N, K):
        lora_A = torch.randn(RANK * E, K, device=DEVICE)
        lora_B = torch.randn(N, RANK * E, device=DEVICE)
        return [lora_A.requires_grad_(), lora_B.requires_grad_()]

    pairs = [pair(2 * I, H), pair(H, I)]
    weights = [torch.randn(E, 2 * I, H, device=DEVICE), torch.randn(E, H, I, device=DEVICE)]

    def layer(x, index, top_k_weights):
        up, down = (
            Projection(weight, None, *factors)
            for weight, factors in zip(weights, pairs, strict=True)
        )
        return experts(x, index, top_k_weights, up, down, activation, backend="triton")

    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    # tiles of 32 and of 16 rows in the interpreter; a graph for one length, and for any
    for T in (33, 5):
        x = torch.randn(T, H, device=DEVICE, requires_grad=True)
        index = torch.randint(E, (T, TOP_K), device=DEVICE)
        top_k_weights = torch.rand(T, TOP_K, device=DEVICE, requires_grad=True)
        leaves = [x, top_k_weights, *pairs[0], *pairs[1]]
        results = []
        for call in (compiled, layer):
            out = call(x, index, top_k_weights)
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)


def test_memory_that_is_too_short_for_the_table_is_refused():
    index = torch.randint(E, (5, TOP_K), device=DEVICE)
    table = table_memory(index, E)
    whole = kernels.route(index, E, table)
    short = table[: len(whole.tiles) - 1]
    with pytest.raises(AssertionError, match="are needed"):
        kernels.route(index, E, short)
    with pytest.raises(AssertionError, match="are needed"):
        kernels.with_tiles(whole._replace(tiles=short, block_m=0))
