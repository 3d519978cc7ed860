"""The operators that torch.compile sees: one routing and one table of tiles for each layer.

The kernels are fakes of a Hopper GPU's, so no GPU is needed.
"""

import pytest
import torch

from helpers.graphs import Graphs, own_operators
from peft_moe_lora.functional import Projection, experts
from peft_moe_lora.ops import Activation, table_memory
from peft_moe_lora.ops.kernels.launching.table import block_m_for
from peft_moe_lora.ops.kernels.routing import _lines
from peft_moe_lora.ops.quantize import quantize
from peft_moe_lora.ops.quantized import described, from_description

E, H, I, TOP_K, RANK = 8, 128, 128, 2, 16  # noqa: E741 I is the glossary's letter
# tokens for which a Hopper GPU chooses tiles of 16, 64 and 128 rows
LENGTHS = (17, 33, 64, 256, 2048)


def own_activation(pre):
    """An activation that no kernel has."""
    gate, up = pre.chunk(2, -1)
    return torch.tanh(gate) * up


# the operators of one layer, forward and backward
OPERATORS = {
    Activation(): ({"experts": 1}, {"experts_backward": 1}),
    own_activation: (
        {"route": 1, "expert_linear": 2, "combine": 1},
        {"expert_linear_backward": 2, "combine_backward": 1},
    ),
}
ways = pytest.mark.parametrize("activation", OPERATORS, ids=["fused", "unfused"])
stores = pytest.mark.parametrize(
    "store", [lambda w: w, lambda w: quantize(w, "nf4")], ids=["bf16", "nf4"]
)


def layer(activation, store=lambda weight: weight):
    """A layer of random weights as a function of x, top_k_index and top_k_weights."""

    def projection(N, K):
        lora_A = torch.randn(RANK * E, K, requires_grad=True)
        lora_B = torch.randn(N, RANK * E, requires_grad=True)
        weight = store(torch.randn(E, N, K, dtype=torch.bfloat16))
        return Projection(weight, None, lora_A, lora_B)

    up = projection(2 * I, H)
    down = projection(H, I)
    return lambda x, index, weights: experts(x, index, weights, up, down, activation)


def rows(T):
    x = torch.randn(T, H, dtype=torch.bfloat16, requires_grad=True)
    index = torch.randint(E, (T, TOP_K))
    return x, index, torch.rand(T, TOP_K, requires_grad=True)


@ways
@stores
def test_a_compiled_layer_makes_its_routing_and_its_table_once(activation, store, launches):
    graphs = Graphs()
    compiled = graphs.compile(layer(activation, store), fullgraph=True)
    out = compiled(*rows(2048))
    out.backward(torch.ones_like(out))
    forward, backward = OPERATORS[activation]
    assert own_operators(*graphs.forward) == forward
    assert own_operators(*graphs.backward) == backward
    launched = [*launches.at_launch, *(name for name, *_ in launches)]
    # the same kernel writes the rows and the table
    assert launched.count("_place_kernel") == 1
    assert "_tiles_kernel" not in launched, "the table is made again"


@ways
@stores
def test_a_call_of_an_operator_is_one_line_of_text(activation, store, launches):
    graphs = Graphs()
    compiled = graphs.compile(layer(activation, store), fullgraph=True)
    out = compiled(*rows(17))
    out.backward(torch.ones_like(out))
    # inductor writes this text into a comment of a kernel's code; a second line would be code
    texts = [
        n.format_node() or "" for g in (*graphs.forward, *graphs.backward) for n in g.graph.nodes
    ]
    assert sum("peft_moe_lora" in text for text in texts) >= 2
    assert not [text for text in texts if "\n" in text]


@ways
def test_lengths_with_other_tiles_share_one_graph(activation, launches):
    graphs = Graphs()
    compiled = graphs.compile(layer(activation), fullgraph=True)
    for T in LENGTHS:
        out = compiled(*rows(T))
        out.backward(torch.ones_like(out))
    # one for the first length, and one for any length
    assert len(graphs.forward) == len(graphs.backward) == 2


def test_the_memory_for_a_table_holds_that_of_any_device():
    for num_experts in (1, 8, 60, 512):
        for T in (0, 1, 7, 63, 64, 1000, 8192):
            index = torch.zeros(T, TOP_K, dtype=torch.int64)
            memory = table_memory(index, num_experts)
            for arch in (0, 80, 89, 90, 100, 120):
                block_m = block_m_for(index.numel(), num_experts, arch)
                assert _lines(index.numel(), num_experts, block_m) <= len(memory)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("format", "options"),
    [("nf4", {}), ("nf4", {"double_quant": False}), ("fp4", {"blocksize": 128}), ("int8", {})],
    ids=str,
)
def test_a_quantized_weight_is_what_it_was_described_as(format, options, transposed):
    weight = quantize(torch.randn(3, 12, 64, dtype=torch.float16), format, **options)
    if transposed:
        weight = weight.transpose(1, 2)
    again = from_description(described(weight), weight.tensors())
    assert again.facts() == weight.facts()
    assert all(a is b for a, b in zip(again.tensors(), weight.tensors(), strict=True))
    assert torch.equal(again[1], weight[1])
