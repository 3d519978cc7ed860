"""Experts without an adapter on a GPU, by the name "moe_lora": as exact as plain PyTorch."""

import copy

import pytest
import torch

from gpu.layers import ATOL, FAMILIES, E, H, I, inputs, no_wait_for_the_device
from helpers import build_experts

pytestmark = pytest.mark.gpu


def frozen(family, name, dtype, implementation="moe_lora"):
    experts = build_experts(family, name, H, I, E).to("cuda", dtype).requires_grad_(False)
    experts.config._experts_implementation = implementation
    return experts


def step(experts, x, index, weights):
    x = x.detach().requires_grad_()
    weights = weights.detach().requires_grad_()
    out = experts(x, index, weights)
    torch.manual_seed(7)
    out.backward(torch.randn_like(out))
    return {"output": out.detach(), "x": x.grad, "top_k_weights": weights.grad}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_as_exact_as_transformers_own_code(family, name, dtype):
    args = inputs(dtype)
    ours = step(frozen(family, name, dtype), *args)
    own = step(frozen(family, name, dtype, "eager"), *args)
    double = frozen(family, name, dtype, "eager").double()
    exact = step(double, *(t.double() if t.is_floating_point() else t for t in args))
    for key, expected in exact.items():
        error, twin = ((t[key].double() - expected).norm() / expected.norm() for t in (ours, own))
        assert error <= 2 * twin + ATOL[dtype], f"{key}: {error:.2e} against {twin:.2e}"


@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_nothing_waits_for_the_device(family, name):
    experts = frozen(family, name, torch.bfloat16)
    args = inputs(torch.bfloat16)
    for _ in range(3):
        step(experts, *args)
    with no_wait_for_the_device():
        step(experts, *args)


def test_inference_keeps_its_numbers_when_calls_are_replayed():
    experts = frozen("qwen3_moe", "Qwen3MoeExperts", torch.bfloat16)
    args = inputs(torch.bfloat16)
    with torch.no_grad():
        first = experts(*args)
        for _ in range(5):
            assert torch.equal(experts(*args), first)
        changed = copy.deepcopy(experts)
        experts.down_proj.data.neg_()
        # bf16 sums in one order: the sign alone changes
        assert torch.equal(experts(*args), -first)
    assert not torch.equal(changed.down_proj, experts.down_proj)
