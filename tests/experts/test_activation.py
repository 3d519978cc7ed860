"""An activation is fused only if it is what the module computes, everywhere and after training."""

import copy

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from helpers import (
    NEMOTRON_H,
    QWEN3_MOE,
    HandWrittenExperts,
    assert_close,
    build_experts,
    fill,
    random_rows,
    wrap,
)
from peft_moe_lora.experts.activation import fused_activation
from peft_moe_lora.ops import Activation


class Swish(nn.Module):
    """x * sigmoid(beta x); with beta = 1, where it starts, this is SiLU."""

    def __init__(self):
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


@pytest.mark.parametrize(
    "build", [lambda: build_experts(*QWEN3_MOE), lambda: fill(HandWrittenExperts())]
)
def test_an_activation_that_can_train_is_not_replaced_by_what_it_equals_at_first(build):
    experts = build()
    assert fused_activation(experts, gated=True) == Activation("silu")
    experts.act_fn = Swish()
    assert fused_activation(experts, gated=True) is None
    rows = random_rows()
    model = wrap(experts)
    as_silu = model(*rows)
    with torch.no_grad():
        experts.act_fn.beta.fill_(3.0)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(model(*rows), merged(*rows))
    assert (model(*rows) - as_silu).norm() > 0.1 * as_silu.norm()


def test_an_activation_with_dropout_drops_in_training():
    experts = build_experts(*QWEN3_MOE)
    experts.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    model, rows = wrap(experts.eval()), random_rows()
    assert torch.equal(model.eval()(*rows), model(*rows))
    model.train()
    assert not torch.equal(model(*rows), model(*rows)), "dropout draws anew"


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("limit", [10.0, 100.0, 1000.0, 10000.0])
@pytest.mark.parametrize("case", [QWEN3_MOE, NEMOTRON_H], ids=lambda case: case[1])
def test_a_clamp_that_no_attribute_names_is_seen(case, limit):
    experts = build_experts(*case)
    gated = experts.has_gate
    fused = fused_activation(experts, gated)
    own = experts.act_fn
    experts.act_fn = Function(lambda x: own(x).clamp(-limit, limit))
    assert fused is not None
    assert fused_activation(experts, gated) is None


def test_gelu_clipped_at_ten_clips():
    """`hidden_act="gelu_10"` of transformers."""
    experts = build_experts(*QWEN3_MOE)
    experts.act_fn = ACT2FN["gelu_10"]
    x, index, weights = random_rows()
    model = wrap(experts)
    merged = copy.deepcopy(model).merge_and_unload()
    assert_close(model(20 * x, index, weights), merged(20 * x, index, weights))


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_pytorch_tanh", "relu2"])
@pytest.mark.parametrize("case", [QWEN3_MOE, NEMOTRON_H], ids=lambda case: case[1])
def test_an_activation_that_computes_in_fp32_is_fused_too(case, name):
    experts = build_experts(*case)
    own = ACT2FN[name]
    experts.act_fn = Function(lambda x: own(x.float()).to(x.dtype))
    assert fused_activation(experts, experts.has_gate) is not None


def test_hooks_of_deepspeed_on_an_activation_change_nothing():
    """ZeRO-3 hooks every module; an activation has no parameters that it would fetch."""

    def fetch(module, args):
        assert not list(module.parameters())

    experts = build_experts(*QWEN3_MOE)
    fetch.__module__ = "deepspeed.runtime.zero.parameter_offload"
    experts.act_fn.register_forward_pre_hook(fetch)
    assert fused_activation(experts, gated=True) == Activation("silu")
    experts.act_fn.register_forward_hook(lambda module, args, out: out * 2)
    assert fused_activation(experts, gated=True) is None
