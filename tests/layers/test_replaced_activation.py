"""Experts whose activation code replaces after an adapter was added: the adapter follows it."""

import copy
from types import MethodType

import pytest
import torch
from torch import nn

from families.off_interface import BUILD, leaves
from helpers import (
    GPT_OSS,
    NEMOTRON_H,
    QWEN3_MOE,
    HandWrittenExperts,
    adapter_parameters,
    assert_close,
    build_experts,
    fill,
    grads_of,
    random_rows,
    wrap,
)
from peft_moe_lora.experts.stored import UnsupportedExperts


def softplus(experts):
    experts.act_fn = nn.Softplus()


def a_function(experts):
    del experts.act_fn
    experts.act_fn = nn.functional.softplus


def lower_limit(experts):
    experts.limit = 0.2


def gate_of_its_own(experts):
    def apply_gate(self, pre):
        gate, up = pre.chunk(2, dim=-1)
        return torch.tanh(gate) * up

    experts._apply_gate = MethodType(apply_gate, experts)


def call_stacks(module, x, weights):
    return module(x, random_rows()[1], weights)


def off_interface(family):
    floats, call = leaves(family)
    return BUILD[family], softplus, floats, call


x, _, weights = random_rows()
CASES = {
    "a module": (lambda: build_experts(*QWEN3_MOE), softplus, (x, weights), call_stacks),
    "a function": (lambda: build_experts(*QWEN3_MOE), a_function, (x, weights), call_stacks),
    "a gate": (lambda: build_experts(*GPT_OSS), gate_of_its_own, (x, weights), call_stacks),
    "a constant": (lambda: build_experts(*GPT_OSS), lower_limit, (x, weights), call_stacks),
    "no gate": (lambda: build_experts(*NEMOTRON_H), softplus, (x, weights), call_stacks),
    "hand-written": (lambda: fill(HandWrittenExperts()), softplus, (x, weights), call_stacks),
    # rows of zeros are skipped as long as the activation maps 0 to 0
    "llama4": off_interface("llama4"),
    "longcat_flash": off_interface("longcat_flash"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_adapter_is_computed_with_the_new_activation(case):
    build, replace, floats, call = CASES[case]
    model = wrap(build())
    floats = [t.detach().requires_grad_() for t in floats]
    before = call(model, *floats).detach()
    replace(model.base_model.model.experts.base_layer)
    merged = copy.deepcopy(model).merge_and_unload()
    plain = copy.deepcopy(model).unload()
    parameters = [*floats, *adapter_parameters(model).values()]
    found, gradients = grads_of(lambda: call(model, *floats), parameters)
    expected, of_floats = grads_of(lambda: call(merged, *floats), floats)
    assert (expected - before).norm() > 0.05 * expected.norm()
    assert_close(found, expected)
    for gradient, right in zip(gradients, of_floats, strict=False):
        assert_close(gradient, right)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    with model.disable_adapter():
        assert_close(call(model, *floats), call(plain, *floats))


def test_a_compiled_model_follows_too():
    model = wrap(build_experts(*QWEN3_MOE))
    compiled = torch.compile(model, backend="aot_eager")
    before = compiled(*random_rows())
    softplus(model.base_model.model.experts.base_layer)
    expected = copy.deepcopy(model).merge_and_unload()(*random_rows())
    assert (expected - before).norm() > 0.05 * expected.norm()
    for _ in range(2):
        assert_close(compiled(*random_rows()), expected)


def test_a_module_off_the_interface_is_compared_again():
    experts = fill(HandWrittenExperts())
    model = wrap(experts)
    model(*random_rows())
    # a gate that the forward of the class does not run
    gate_of_its_own(experts)
    with pytest.raises(UnsupportedExperts, match="does not compute the sum"):
        model(*random_rows())
