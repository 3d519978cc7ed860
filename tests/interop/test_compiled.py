"""`apply_to_peft` under torch.compile: what is part of a graph, and what runs outside of one.

Whole models with PEFT's adapters in one graph: tests/tuner/test_compiled_models.py.
"""

import json

import pytest
import torch
from torch import nn

from helpers import assert_close, assert_share_of_order_one, grads_of, outputs, tiny_model
from helpers.graphs import Graphs, own_operators
from interop.models import with_peft_lora
from interop.test_left_to_peft import one_layer
from peft_moe_lora import apply_to_peft
from peft_moe_lora.interop import counting

# fp32, two orders of summation
TOLERANCE = 1e-5


def numbers(call, layer, rows):
    """The output of a call, and the gradients of what the layer trains."""
    out, gradients = grads_of(lambda: call(*rows), [p for p in layer.parameters() if trained(p)])
    return [out, *gradients]


def trained(parameter):
    return parameter.requires_grad


def assert_all_close(found, right):
    for number, expected in zip(found, right, strict=True):
        assert expected.abs().max() > 0
        assert_close(number, expected, TOLERANCE)


def test_a_call_is_part_of_the_graph_before_any_eager_call():
    layer, _, rows = one_layer()
    right = numbers(layer, layer, rows)
    graphs = Graphs()
    compiled = graphs.compile(layer, fullgraph=True)
    with apply_to_peft():
        for _ in range(2):
            assert_all_close(numbers(compiled, layer, rows), right)
    assert own_operators(*graphs.forward) == {"experts": 1}
    assert own_operators(*graphs.backward) == {"experts_backward": 1}


def test_layers_that_are_compiled_one_by_one_share_their_graphs_after_one_call():
    model = with_peft_lora(tiny_model(num_hidden_layers=3))
    right = outputs(model)
    graphs = Graphs()
    backend = graphs.backend()
    with apply_to_peft():
        outputs(model)
        for layer in model.base_model.model.model.layers:
            layer.compile(backend=backend, fullgraph=True)
        assert_close(outputs(model), right, TOLERANCE)
    # one of the first layer, whose input needs no gradient
    assert len(graphs.forward) == 2


def merged(layer):
    layer.merge()
    layer.base_layer.merge()


def disabled(layer):
    layer.enable_adapters(False)
    layer.base_layer.enable_adapters(False)


@pytest.mark.parametrize("change", [merged, disabled])
@torch.no_grad()
def test_adapters_that_are_not_at_work_break_no_graph(change):
    layer, _, rows = one_layer()
    with apply_to_peft():
        change(layer)
        compiled = Graphs().compile(layer, fullgraph=True)
        assert_close(compiled(*rows), layer(*rows), TOLERANCE)


@torch.no_grad()
def test_merged_adapters_that_are_disabled_are_unmerged_outside_of_the_graph():
    layer, experts, rows = one_layer()
    right = experts(*rows)
    with apply_to_peft():
        assert_share_of_order_one(layer(*rows), right)
        merged(layer)
        disabled(layer)
        assert_close(Graphs().compile(layer)(*rows), right, TOLERANCE)


def train_a_weight(experts):
    experts.down_proj.requires_grad_(True)


def bind_a_forward(experts):
    experts.forward = type(experts).forward.__wrapped__.__get__(experts)


@pytest.mark.parametrize("change", [train_a_weight, bind_a_forward])
def test_what_is_left_to_peft_is_not_compiled_again_in_each_step(change):
    """PEFT's own code makes new classes in each call, on which a graph of it would depend."""
    layer, experts, rows = one_layer()
    change(experts)
    right = numbers(layer, layer, rows)
    graphs = Graphs()
    compiled = graphs.compile(layer)
    with apply_to_peft():
        for _ in range(3):
            assert_all_close(numbers(compiled, layer, rows), right)
    assert not graphs.forward


def test_hooks_of_the_experts_are_part_of_the_graph():
    layer, experts, rows = one_layer()
    experts.register_forward_hook(lambda module, rows, out: 1.5 * out)
    right = layer(*rows)
    with apply_to_peft():
        assert_close(Graphs().compile(layer, fullgraph=True)(*rows), right, TOLERANCE)


def test_experts_of_a_graph_are_counted_once(monkeypatch, tmp_path):
    """The first call is outside of the graph, and counted there."""
    monkeypatch.setattr(counting, "_counting", counting._Counting(tmp_path))
    layer, _, rows = one_layer()
    compiled = Graphs().compile(layer)
    with apply_to_peft():
        for _ in range(2):
            compiled(*rows)
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text()) == {"torch": 1}


def test_an_activation_that_was_replaced():
    layer, experts, rows = one_layer()
    before = layer(*rows)
    compiled = Graphs().compile(layer)
    with apply_to_peft():
        compiled(*rows)
        experts.act_fn = nn.Softplus()
        eager = layer(*rows)
        found = compiled(*rows)
    right = layer(*rows)
    assert_share_of_order_one(right, before, low=0.1)
    assert_close(eager, right, TOLERANCE)
    assert_close(found, right, TOLERANCE)
