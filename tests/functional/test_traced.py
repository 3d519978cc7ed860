"""torch.jit.trace records experts as one operator, and not what they did for the example."""

import pytest
import torch
from torch import nn

from helpers import (
    FUSED_KINDS,
    QWEN3_MOE,
    UNFUSED_KINDS,
    assert_close,
    build_experts,
    moe_lora,
    random_rows,
    tiny_model,
    token_ids,
    wrap,
)
from peft_moe_lora import quantize_experts

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"
)


def check(model, example, other):
    """A trace of one example gives the output of another one, which goes to other experts."""
    with torch.no_grad():
        traced = torch.jit.trace(model, example)
        assert (model(*other) - model(*example)).norm() > 0.1 * model(*other).norm()
        assert_close(traced(*other), model(*other))


@pytest.mark.parametrize("case", [*FUSED_KINDS, *UNFUSED_KINDS], ids=lambda case: case[1])
def test_experts_of_every_kind(case):
    check(wrap(build_experts(*case)).eval(), random_rows(seed=2), random_rows(seed=3))


def test_experts_without_an_adapter_and_in_four_bits():
    experts = build_experts(*QWEN3_MOE)
    model = wrap(experts).eval()
    with model.disable_adapter():
        check(model, random_rows(seed=2), random_rows(seed=3))
    quantized = quantize_experts(nn.ModuleDict({"experts": build_experts(*QWEN3_MOE)}), "nf4")
    check(wrap(quantized["experts"]).eval(), random_rows(seed=2), random_rows(seed=3))


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids, use_cache=False).logits


def test_a_model_with_its_router_and_attention():
    model = moe_lora(tiny_model(), target_modules=["experts", "gate", "q_proj"]).eval()
    check(Logits(model), (token_ids(),), (token_ids(seed=9),))


@pytest.mark.parametrize("enabled", [True, False])
def test_a_trace_has_gradients(enabled):
    model = wrap(build_experts(*QWEN3_MOE)).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.set_grad_enabled(enabled):
        traced = torch.jit.trace(model, random_rows(seed=2))
    found = torch.autograd.grad(traced(*random_rows(seed=3)).square().sum(), parameters)
    right = torch.autograd.grad(model(*random_rows(seed=3)).square().sum(), parameters)
    for gradient, expected in zip(found, right, strict=True):
        assert_close(gradient, expected)
