"""PEFT's own adapters on experts, computed on a CUDA device with `apply_to_peft`."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from gpu.layers import ATOL, FAMILIES, E, H, I, R, inputs, no_wait_for_the_device, step
from helpers import Holder, build_experts
from interop.models import STACKS
from peft_moe_lora import apply_to_peft
from peft_moe_lora.interop import wrappers

pytestmark = pytest.mark.gpu


def with_peft_lora(family, name, dtype):
    """An experts module on the GPU with PEFT's LoRA, of random A and B, on both projections."""
    experts = build_experts(family, name, H, I, E).to("cuda", dtype)
    targets = [f"experts.{stack}" for stack in STACKS if hasattr(experts, stack)]
    config = LoraConfig(r=R, lora_alpha=R, target_modules=[], target_parameters=targets)
    model = get_peft_model(Holder(experts), config)
    layer = model.base_model.model.experts
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            if ".lora_" in f".{key}":
                fan_in = R if "lora_B" in key else parameter.shape[1]
                parameter.copy_(torch.randn_like(parameter) * fan_in**-0.5)
    return model, layer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("family", "name"), FAMILIES)
def test_kernels_are_as_exact_as_pefts_own_code(family, name, dtype, monkeypatch):
    devices = []
    compute = wrappers.own.compute

    def counted(module, layout, rows, *others, **options):
        devices.append(rows[0].device.type)
        return compute(module, layout, rows, *others, **options)

    monkeypatch.setattr(wrappers.own, "compute", counted)
    model, layer = with_peft_lora(family, name, dtype)
    args = inputs(dtype)
    own = step(model, layer, *args)
    double = copy.deepcopy(model).double()
    exact = step(
        double,
        double.base_model.model.experts,
        *(t.double() if t.is_floating_point() else t for t in args),
    )
    assert not devices
    with apply_to_peft():
        ours = step(model, layer, *args)
        with no_wait_for_the_device():
            again = step(model, layer, *args)
    assert devices == ["cuda", "cuda"]
    assert all(torch.equal(ours[key], again[key]) for key in ours)
    assert ours.keys() == own.keys()
    for key, expected in exact.items():
        error, twin = (
            (found[key].double() - expected).norm() / expected.norm() for found in (ours, own)
        )
        assert error <= 2 * twin + ATOL[dtype], f"{key}: {error:.2e} against {twin:.2e} in PEFT"
