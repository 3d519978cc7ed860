"""Hooks that code registers on an experts module, or on its activation, run with an adapter too.

The right numbers are those of the merged module: its own forward, with the same hooks.
"""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

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


def doubled_input(module):
    module.register_forward_pre_hook(lambda _, args: (args[0] * 2, *args[1:]))


def doubled_output(module):
    module.register_forward_hook(lambda _, args, out: out * 2)


def doubled_gradient(module):
    def double(_, grad_inputs, grad_outputs):
        return tuple(None if g is None else 2 * g for g in grad_inputs)

    module.register_full_backward_hook(double)


HOOKS = [doubled_input, doubled_output, doubled_gradient]


def experts_and_call(kind):
    """An experts module, the tensors that its call differentiates, and the call."""
    if kind in BUILD:
        return BUILD[kind](), *leaves(kind)
    x, index, weights = random_rows()
    module = fill(HandWrittenExperts())
    if kind != "hand-written":
        module = build_experts(*kind)
    return module, (x, weights), lambda module, x, weights: module(x, index, weights)


def check(model, floats, call, through=lambda model, *args: model(*args)):
    """The output and the gradients of the call's tensors are those of the merged module."""
    merged = copy.deepcopy(model).merge_and_unload()
    floats = [t.detach().requires_grad_() for t in floats]
    inputs = [*floats, *adapter_parameters(model).values()]
    out, gradients = grads_of(lambda: call(lambda *args: through(model, *args), *floats), inputs)
    right, right_gradients = grads_of(lambda: call(merged, *floats), floats)
    assert_close(out, right)
    for gradient, expected in zip(gradients, right_gradients, strict=False):
        assert_close(gradient, expected)
    assert all(gradient.abs().max() > 0 for gradient in gradients)


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
@pytest.mark.parametrize("kind", [QWEN3_MOE, GPT_OSS, "hand-written", *BUILD], ids=str)
def test_hooks_on_experts_run_whenever_they_were_registered(kind, hook):
    experts, floats, call = experts_and_call(kind)
    hook(experts)
    model = wrap(experts)
    check(model, floats, call)
    hook(experts)
    check(model, floats, call)


def test_they_run_in_a_recomputed_forward_too():
    experts, floats, call = experts_and_call("llama4")
    doubled_output(experts)

    def through(model, *args):
        return checkpoint(model, *args, use_reentrant=False)

    check(wrap(experts), floats, call, through)


def test_hooks_may_be_removed_and_are_compiled():
    experts, floats, call = experts_and_call("llama4")
    handle = experts.register_forward_hook(lambda _, args, out: out * 2)
    model = wrap(experts)
    compiled = torch.compile(model, backend="aot_eager")
    twice = call(compiled, *floats)
    assert_close(twice, call(model, *floats))
    handle.remove()
    assert_close(2 * call(model, *floats), twice)
    assert_close(2 * call(compiled, *floats), twice)


@pytest.mark.parametrize("kind", [QWEN3_MOE, NEMOTRON_H, "llama4"], ids=str)
def test_hooks_on_the_activation_run(kind):
    experts, floats, call = experts_and_call(kind)
    model = wrap(experts)
    before = call(model, *floats)
    calls = []
    experts.act_fn.register_forward_hook(lambda _, args, out: calls.append(out.shape) or out * 2)
    check(model, floats, call)
    assert calls
    assert (call(model, *floats) - before).norm() > 0.1 * before.norm()


@pytest.mark.parametrize("kind", ["hand-written", *BUILD])
def test_another_forward_of_a_module_off_the_interface_is_refused(kind):
    experts, floats, call = experts_and_call(kind)
    model = wrap(experts)
    right = call(model, *floats)
    own = experts.forward
    experts.forward = lambda *args: own(*args) * 2
    with pytest.raises(UnsupportedExperts, match=r"forward of \w+ was replaced"):
        call(model, *floats)
    with model.disable_adapter():
        twice = call(model, *floats)
    experts.forward = own
    assert torch.equal(call(model, *floats), right)
    with model.disable_adapter():
        assert_close(twice, 2 * call(model, *floats))
