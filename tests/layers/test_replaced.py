"""Experts whose forward another library has replaced: the adapter works, or an error says why."""

import logging
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from types import MethodType

import pytest
import torch
from torch import nn
from transformers.integrations import liger

from helpers import (
    GPT_OSS,
    QWEN3_MOE,
    SAME,
    Holder,
    assert_close,
    assert_share_of_order_one,
    build_experts,
    moe_lora,
    random_rows,
    tiny_model,
    token_ids,
    wrap,
)
from peft_moe_lora.experts.stored import UnsupportedExperts
from peft_moe_lora.layers import replaced


def ligers_forward(self, hidden_states, top_k_index, top_k_weights):
    """As in liger-kernel 0.8: it reads the weights of the module."""
    return hidden_states @ self.gate_up_proj[0].T @ self.gate_up_proj[0]


ligers_forward.__module__ = "liger_kernel.transformers.swiglu"


def bind(module, forward=ligers_forward):
    """As liger-kernel binds it."""
    module.__dict__["forward"] = MethodType(forward, module)
    module.__dict__["_get_name"] = MethodType(lambda self: "LigerExperts", module)


@pytest.mark.parametrize("mode", [True, False])
def test_ligers_forward_is_taken_back_from_the_layer(mode, caplog):
    model = wrap(build_experts(*QWEN3_MOE))
    layer = model.base_model.model.experts
    expected = model(*random_rows())
    bind(layer)
    replaced._log_once.cache_clear()
    with caplog.at_level(logging.INFO):
        model.train(mode)
    assert "liger-kernel" in caplog.text
    assert torch.equal(model(*random_rows()), expected)
    assert "LigerExperts" not in repr(model)


@pytest.mark.parametrize("family", [QWEN3_MOE, GPT_OSS])
def test_ligers_forward_is_taken_back_from_the_base_module(family):
    experts = build_experts(*family)
    expected = wrap(build_experts(*family))(*random_rows())
    bind(experts)
    model = wrap(experts)
    assert_close(model(*random_rows()), expected, SAME)
    with model.disable_adapter():
        assert_share_of_order_one(expected, model(*random_rows()))


def test_use_liger_kernel_of_a_trainer_leaves_the_experts_alone(monkeypatch):
    """The package is a stand-in that binds forwards as liger-kernel does."""
    package = types.ModuleType("liger_kernel")
    package.transformers = types.ModuleType("liger_kernel.transformers")

    def apply_to_instance(model, **kwargs):
        for layer in model.model.layers:
            bind(layer.mlp.experts)

    package.transformers._apply_liger_kernel_to_instance = apply_to_instance
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package.transformers)
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    model = moe_lora(tiny_model()).train()
    ids = token_ids()
    expected = model(input_ids=ids, labels=ids).loss
    liger.apply_liger_kernel(model, None)
    # a Trainer does so before every step
    model.train()
    loss = model(input_ids=ids, labels=ids).loss
    assert torch.equal(loss, expected)
    loss.backward()
    trained = [p for n, p in model.named_parameters() if "experts.lora_" in n]
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained)


def test_ligers_class_of_experts_is_refused_by_name():
    LigerExperts = type(
        "LigerExperts", (nn.Module,), {"__module__": "liger_kernel.transformers.swiglu"}
    )
    module = LigerExperts()
    module.gate_up_proj = nn.Parameter(torch.randn(5, 8, 16))
    module.down_proj = nn.Parameter(torch.randn(5, 16, 4))
    with pytest.raises(UnsupportedExperts, match=r"LigerExperts .*swiglu=False"):
        moe_lora(Holder(module))


def another_forward(self, hidden_states, top_k_index, top_k_weights):
    return torch.zeros_like(hidden_states)


def wrapping_forward(self, *args, **kwargs):
    """As accelerate and parallelism plans do."""
    return type(self).forward(self, *args, **kwargs)


def test_a_forward_that_drops_the_adapter_raises():
    model = wrap(build_experts(*QWEN3_MOE))
    expected = model(*random_rows())
    base = model.base_model.model.experts.base_layer
    bind(base, another_forward)
    with pytest.raises(UnsupportedExperts, match="another_forward"):
        model(*random_rows())
    with model.disable_adapter():
        assert not model(*random_rows()).any()
    bind(base, wrapping_forward)
    assert torch.equal(model(*random_rows()), expected)
    del base.forward
    assert torch.equal(model(*random_rows()), expected)


@pytest.mark.parametrize("before", [True, False])
def test_a_forward_of_the_class_that_drops_the_adapter_raises(before, monkeypatch):
    """As libraries replace it, for all modules of the class."""
    experts = build_experts(*QWEN3_MOE)
    expected = wrap(build_experts(*QWEN3_MOE))(*random_rows())

    def patch():
        monkeypatch.setattr(type(experts), "forward", another_forward)

    if before:
        patch()
    model = wrap(experts)
    patch()
    for run in (model, torch.compile(model, backend="aot_eager")):
        with pytest.raises(UnsupportedExperts, match="another_forward"):
            run(*random_rows())
    with model.disable_adapter():
        assert not model(*random_rows()).any()
    monkeypatch.undo()
    assert torch.equal(model(*random_rows()), expected)


def test_a_config_that_was_put_over_the_adapters_raises():
    model = wrap(build_experts(*QWEN3_MOE))
    base = model.base_model.model.experts.base_layer
    base.config = base.config._shared
    with pytest.raises(UnsupportedExperts, match=r"module\.config"):
        model(*random_rows())


def test_two_threads_in_one_layer_do_not_take_each_others_calls_for_missing_ones():
    model = wrap(build_experts(*QWEN3_MOE))
    expected = model(*random_rows())

    def call(_):
        return [torch.equal(model(*random_rows()), expected) for _ in range(30)]

    with ThreadPoolExecutor(4) as pool:
        assert all(all(found) for found in pool.map(call, range(4)))


def test_a_bound_forward_is_compiled():
    model = wrap(build_experts(*QWEN3_MOE))
    expected = model(*random_rows())
    base = model.base_model.model.experts.base_layer
    bind(base, wrapping_forward)
    compiled = torch.compile(model, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(compiled(*random_rows()), expected)
    bind(base, another_forward)
    with pytest.raises(UnsupportedExperts, match="another_forward"):
        compiled(*random_rows())


def breaking_forward(self, *args, **kwargs):
    """As hooks that no graph can hold, which run around the module's own forward."""
    torch._dynamo.graph_break()
    return type(self).forward(self, *args, **kwargs)


@pytest.mark.parametrize("function", ["call_base", "note_computed"])
def test_a_graph_may_hold_one_of_two_functions_that_wait_for_each_other(function, monkeypatch):
    model = wrap(build_experts(*QWEN3_MOE))
    expected = model(*random_rows())
    bind(model.base_model.model.experts.base_layer, breaking_forward)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(compiled(*random_rows()), expected)
    torch._dynamo.reset()
    disabled = torch.compiler.disable(getattr(replaced, function), recursive=False)
    monkeypatch.setattr(f"peft_moe_lora.layers.layer.{function}", disabled)
    compiled = torch.compile(model, backend="aot_eager")
    assert torch.equal(compiled(*random_rows()), expected)


def test_forwards_of_others_stay():
    experts = build_experts(*QWEN3_MOE)
    bind(experts, wrapping_forward)
    model = wrap(experts)
    layer = model.base_model.model.experts
    bind(layer, wrapping_forward)
    model.train()
    assert layer.forward.__func__ is wrapping_forward
    assert experts.forward.__func__ is wrapping_forward
