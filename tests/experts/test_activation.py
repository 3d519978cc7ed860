"""An activation with parameters stays the module's own, whatever it computes at first."""

import copy

import pytest
import torch
from torch import nn

from helpers import (
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
