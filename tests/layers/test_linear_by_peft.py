"""Linear layers whose adapter is more than `y = W x + s B (A x)` run PEFT's own forward."""

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from torch import nn
from torch.autograd import forward_ad

from helpers import FP32, R, assert_close, fill_adapter, relative_error
from layers.linear_layers import (
    B,
    H,
    Projections,
    T,
    adapted,
    assert_steps_agree,
    batch,
    layers_of,
    slow,
    step,
)
from peft_moe_lora import MoELoraConfig


def _change_config(model, **changes):
    for name in "qkvo":
        layer = getattr(model.base_model.model, name)
        config = LoraConfig(r=R, lora_alpha=2 * R, **changes)
        layer.update_layer("default", r=R, lora_alpha=2 * R, config=config)
    fill_adapter(model)


def _hook(model):
    model.base_model.model.q.lora_A["default"].register_forward_hook(lambda m, a, out: out * 2)


def _own_factor(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.base_model.model.k.lora_B["default"].__class__ = Doubled


def _own_dropout(model):
    model.base_model.model.k.lora_dropout["default"] = nn.Hardtanh()


UNUSUAL = {
    "DoRA": lambda model: _change_config(model, use_dora=True),
    "bias on B": lambda model: _change_config(model, lora_bias=True),
    "a hook on A": _hook,
    "another class of B": _own_factor,
    "another dropout": _own_dropout,
}


@pytest.mark.parametrize("change", UNUSUAL.values(), ids=UNUSUAL)
def test_more_than_the_formula_is_left_to_peft(change):
    model = adapted(Projections(bias=True))
    plain = model(batch())
    change(model)
    found = step(model, batch())
    assert relative_error(found["y"], plain) > 1e-3
    expected = step(slow(model), batch())
    if change in (_hook, _own_factor, _own_dropout):
        # the other three layers are as before
        assert_steps_agree(found, expected, FP32)
    else:
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_learnt_scaling_gets_its_gradient(by_peft):
    model = adapted()
    scaling = model.base_model.model.v.scaling["default"] = torch.ones((), requires_grad=True)
    model(batch()).sum().backward()
    assert len(by_peft) == 1
    assert scaling.grad


class Subclass(torch.Tensor):
    """As a DTensor, a quantized or a logging tensor."""


def test_subclasses_of_tensors_are_left_to_peft(by_peft):
    model = adapted()
    expected = model(batch())
    found = model(batch().detach().as_subclass(Subclass))
    assert type(found) is Subclass
    assert_close(found.as_subclass(torch.Tensor), expected, FP32)
    assert len(by_peft) == 4
    layer = model.base_model.model.q
    weight = layer.lora_A["default"].weight
    layer.lora_A["default"].weight = nn.Parameter(weight.detach().as_subclass(Subclass))
    layer(batch())
    assert len(by_peft) == 5
    layer = model.base_model.model.k
    layer.base_layer.register_forward_hook(lambda m, a, out: out.as_subclass(Subclass))
    assert type(layer(batch())) is Subclass
    assert len(by_peft) == 6
    layer = model.base_model.model.v
    weight = layer.base_layer.weight.as_subclass(Subclass)
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)
    assert type(layer(batch())) is Subclass
    assert len(by_peft) == 7


def test_complex_layers_are_left_to_peft(by_peft):
    model = adapted(dtype=torch.complex64)
    x = torch.randn(B, T, H, dtype=torch.complex64, requires_grad=True)
    model(x).abs().sum().backward()
    assert len(by_peft) == 4


def test_offloaded_factors_are_left_to_peft(by_peft):
    model = adapted()
    with torch.no_grad():
        expected = model(batch())
        for layer in layers_of(model):
            cpu_offload(layer.lora_B, execution_device="cpu")
        assert layer.lora_B["default"].weight.is_meta
        assert_close(model(batch()), expected, FP32)
    assert len(by_peft) == 4


def test_adapters_by_sample_are_left_to_peft(by_peft):
    model = adapted()
    model.add_adapter("second", MoELoraConfig(r=2, target_modules=["q", "o"]))
    fill_adapter(model, "second", seed=2)
    model.eval()
    with torch.no_grad():
        mixed = model(batch(), adapter_names=["second", "__base__"])
        assert len(by_peft) == 4
        model.set_adapter("second")
        assert_close(mixed[0], model(batch())[0], FP32)
        with model.disable_adapter():
            assert torch.equal(mixed[1], model(batch())[1])


def test_disabled_and_merged_adapters_are_left_to_peft(by_peft):
    model = adapted()
    out = model(batch())
    with model.disable_adapter():
        assert relative_error(model(batch()), out) > 0.3
    assert len(by_peft) == 4
    model.merge_adapter()
    assert_close(model(batch()), out, FP32)
    assert len(by_peft) == 8
    model.unmerge_adapter()
    assert_close(model(batch()), out, FP32)
    assert len(by_peft) == 8
    assert_close(model.merge_and_unload()(batch()), out, FP32)


def test_disabled_casting_is_left_to_peft(by_peft):
    model = adapted()
    with disable_input_dtype_casting(model):
        model(batch())
    assert len(by_peft) == 4


def test_transformations_of_functions_are_left_to_peft(by_peft):
    model = adapted()
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    by_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, batch().detach())
    assert len(by_peft) == 4
    model(batch()).square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert_close(by_sample[name].sum(0), parameter.grad, FP32, name)
    x = batch().detach()
    torch.func.jvp(model, (x,), (x,))
    with forward_ad.dual_level():
        model(forward_ad.make_dual(x, x))
    torch.jit.trace(model, x, check_trace=False)
    assert len(by_peft) == 16


def test_hooks_on_all_modules_see_what_they_see_in_peft(by_peft):
    model = adapted()
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    model(batch())
    hook.remove()
    assert seen.count(nn.Linear) == 12
    assert len(by_peft) == 4
