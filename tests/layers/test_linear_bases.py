"""Linear layers whose base is trained, hooked, offloaded, quantized, or of another class."""

import pytest
import torch
from accelerate import cpu_offload
from peft.tuners import lora
from transformers.pytorch_utils import Conv1D

from helpers import FP32, moe_lora
from layers.linear_layers import (
    Projections,
    adapted,
    assert_steps_agree,
    batch,
    layers_of,
    slow,
    step,
)


def _hooked(linear):
    linear.register_forward_hook(lambda m, a, out: out * 2)


def _wrapped(linear):
    own = linear.forward
    linear.forward = lambda x: own(x) * 2


@pytest.mark.parametrize("change", [_hooked, _wrapped])
def test_what_is_around_a_base_layer_runs(change, by_peft):
    model = adapted()
    for layer in layers_of(model):
        change(layer.base_layer)
    found = step(model, batch())
    assert not by_peft
    assert_steps_agree(found, step(slow(model), batch()), FP32)


def test_an_offloaded_base_layer_is_fetched(by_peft):
    model = adapted()
    expected = step(model, batch())
    for layer in layers_of(model):
        cpu_offload(layer.base_layer, execution_device="cpu")
    assert layer.base_layer.weight.is_meta
    found = step(model, batch())
    assert not by_peft
    assert_steps_agree(found, expected, FP32)


def test_a_trained_bias_gets_its_gradient(by_peft):
    model = adapted(Projections(bias=True), bias="all")
    found = step(model, batch())
    assert not by_peft
    assert any(name.endswith("base_layer.bias") for name in found)
    assert_steps_agree(found, step(slow(model), batch()), FP32)


def test_a_trained_weight_gets_its_gradient(by_peft):
    model = adapted()
    for layer in layers_of(model):
        layer.base_layer.weight.requires_grad_()
    found = step(model, batch())
    assert not by_peft
    assert_steps_agree(found, step(slow(model), batch()), FP32)


def test_weights_may_be_tensors_that_are_no_parameters(by_peft):
    """As under FSDP, whose parameters are flat: weights are views of them."""
    model = adapted()
    expected = step(model, batch())
    model.zero_grad()
    layers = layers_of(model)
    modules = [m for layer in layers for m in layer.modules() if type(m) is torch.nn.Linear]
    parameters = [module.weight for module in modules]
    for module, parameter in zip(modules, parameters, strict=True):
        del module.weight
        module.weight = parameter.view(parameter.shape)
    found = model(batch())
    assert not by_peft
    assert torch.equal(found, expected["y"])
    found.square().sum().backward()
    assert all(p.grad is not None for p in parameters if p.requires_grad)


def test_conv1d_of_transformers(by_peft):
    model = adapted(Projections(linear=lambda K, N, bias: Conv1D(N, K)), fan_in_fan_out=True)
    found = step(model, batch())
    assert not by_peft
    assert_steps_agree(found, step(slow(model), batch()), FP32)


def _in_four_bits(linear):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    four = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, quant_type="nf4"
    )
    four.weight = bitsandbytes.nn.Params4bit(linear.weight.data, False, quant_type="nf4")
    return four.to("cpu")


def _in_eight_bits(linear):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    eight = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False
    )
    eight.weight = bitsandbytes.nn.Int8Params(linear.weight.data, False, has_fp16_weights=False)
    return eight.to("cpu")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_base_layers(bits, dtype, autocast, monkeypatch):
    base = Projections()
    for name in "qkvo":
        quantized = {4: _in_four_bits, 8: _in_eight_bits}[bits](getattr(base, name))
        setattr(base, name, quantized)
    setattr(base, f"is_loaded_in_{bits}bit", True)
    model = moe_lora(base, target_modules=["q", "k", "v", "o"])
    twin = slow(model)
    peft_class = {4: lora.Linear4bit, 8: lora.Linear8bitLt}[bits]
    assert isinstance(model.base_model.model.q, peft_class)
    assert type(model.base_model.model.q).__name__ == peft_class.__name__
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = step(twin, batch(dtype))
        monkeypatch.delattr(peft_class, "forward")
        found = step(model, batch(dtype))
    narrow = autocast or dtype == torch.bfloat16
    # PEFT's products are in fp32 without autocast; those in bf16 are rounded at other places
    assert_steps_agree(found, expected, 3e-2 if narrow else FP32)
