"""Tensors that something has divided among processes never pass for whole ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import moe_lora, outputs, tiny_model, token_ids
from peft_moe_lora.layers.router import UnsupportedRouter


@pytest.fixture
def model():
    return moe_lora(tiny_model("qwen3_moe"), target_modules=["experts", "gate"])


@pytest.mark.parametrize("several", [False, True])
def test_weights_of_half_of_the_experts_are_refused(model, several):
    """r * E rows of A fit half of the experts with twice the rank."""
    if several:
        model.add_adapter("second", model.peft_config["default"])
        model.base_model.set_adapter(["default", "second"])
    experts = model.base_model.model.model.layers[0].mlp.experts
    half = slice(0, experts.layout.num_experts // 2)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(experts.base_layer, name)
        setattr(experts.base_layer, name, nn.Parameter(weight[half], requires_grad=False))
    rows = torch.zeros(3, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="Something has divided them among processes"):
        experts.compute(experts.base_layer, torch.ones(3, experts.in_features), rows, rows + 1.0)


@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_a_part_of_a_pair_is_refused(model, side):
    experts = model.base_model.model.model.layers[0].mlp.experts
    sides = getattr(experts, side)["default"]
    dim = 0 if side == "lora_A" else 1
    # one expert's share less
    part = sides["down"].data.narrow(dim, 0, sides["down"].shape[dim] - experts.r["default"])
    sides["down"] = nn.Parameter(part)
    with pytest.raises(ValueError, match="this process holds lora_A"):
        outputs(model)


class _Linear(torch.autograd.Function):
    """A replacement of F.linear that multiplies within an autograd function, as ZeRO-3's does."""

    @staticmethod
    def forward(ctx, x, weight, bias=None):
        return torch.matmul(x, weight.t())

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None, None


def test_a_router_that_multiplies_within_an_autograd_function_is_refused(model, monkeypatch):
    monkeypatch.setattr(F, "linear", _Linear.apply)
    with pytest.raises(UnsupportedRouter, match="inside an autograd function"):
        model(input_ids=token_ids(), use_cache=False)
