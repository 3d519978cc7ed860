"""What `apply_to_peft` cannot compute gives PEFT's own numbers, and the log says why, once."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers import (
    E,
    HandWrittenExperts,
    Holder,
    R,
    build_experts,
    experts_paths,
    fill,
    fill_adapter,
    grads_of,
    outputs,
    random_rows,
    tiny_model,
)
from interop.models import peft_model, with_peft_lora, wrapped
from peft_moe_lora import apply_to_peft
from peft_moe_lora.interop.left import LeftToPeft
from peft_moe_lora.interop.wrappers import read_call
from peft_moe_lora.layers.dispatch import AdaptedExpertsConfig


def trained_bias():
    model = peft_model("gpt_oss")
    for path in experts_paths(model):
        model.get_submodule(path).down_proj_bias.requires_grad_(True)
    return model


def trained_weight():
    model = peft_model()
    for path in experts_paths(model):
        model.get_submodule(path).down_proj.requires_grad_(True)
    return model


def a_bias_adapted():
    return peft_model("gpt_oss", stacks=["gate_up_proj", "gate_up_proj_bias"])


def a_module_whose_forward_was_replaced():
    model = peft_model()
    for path in experts_paths(model):
        experts = model.get_submodule(path)
        own = type(experts).forward.__wrapped__
        experts.forward = own.__get__(experts)
    return model


def nothing_of_the_experts():
    base = tiny_model()
    config = LoraConfig(r=R, target_modules=[], target_parameters=["mlp.gate.weight"])
    model = get_peft_model(base, config)
    fill_adapter(model)
    return model


def merged():
    model = peft_model()
    model.merge_adapter()
    return model


def disabled():
    model = peft_model()
    model.base_model.disable_adapter_layers()
    return model


def dropout():
    model = peft_model()
    for module in model.modules():
        if hasattr(module, "lora_variant"):
            module.lora_dropout["default"] = nn.Dropout(0.0)
    return model


def one_expert():
    return with_peft_lora(tiny_model(num_experts=1, num_experts_per_tok=1))


def a_lora_variant():
    model = peft_model()
    for wrapper in wrapped(model).values():
        wrapper.lora_variant["default"] = object()
    return model


REASONS = [
    (trained_bias, logging.WARNING, "trained itself"),
    (trained_weight, logging.WARNING, "trained itself"),
    (a_bias_adapted, logging.WARNING, "is no projection's weight"),
    (a_module_whose_forward_was_replaced, logging.WARNING, "forward was replaced"),
    (dropout, logging.WARNING, "more than B A"),
    (a_lora_variant, logging.WARNING, "more than B A"),
    (one_expert, logging.WARNING, "a single expert"),
    (nothing_of_the_experts, logging.INFO, "Qwen3MoeTopKRouter is no experts module"),
    (merged, logging.INFO, "merged"),
    (disabled, logging.INFO, "disabled"),
]


@pytest.mark.parametrize(("build", "level", "reason"), REASONS)
def test_peft_computes_it_and_the_log_says_why_once(build, level, reason, computed, caplog):
    model = build()
    inputs = [p for p in model.parameters() if p.requires_grad]
    calls = build not in (merged, disabled)

    def numbers():
        if not calls:
            return [outputs(model).detach()]
        out, gradients = grads_of(lambda: outputs(model), inputs)
        return [out, *gradients]

    right = numbers()
    caplog.set_level(logging.INFO, "peft_moe_lora.interop")
    with apply_to_peft():
        found = numbers()
        numbers()
    assert not computed
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    lines = [r for r in caplog.records if r.name == "peft_moe_lora.interop.apply"]
    assert [line.levelno for line in lines] == [level]
    assert reason in lines[0].getMessage()


def test_a_class_off_the_interface(computed, caplog):
    model = Holder(fill(HandWrittenExperts()))
    names = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(model, LoraConfig(r=R, target_modules=[], target_parameters=names))
    fill_adapter(model)
    rows = random_rows()
    right = model(*rows)
    with apply_to_peft():
        assert torch.equal(model(*rows), right)
    assert not computed
    assert "not on transformers' experts interface" in caplog.text


def test_a_call_with_keywords_or_other_dtypes(computed, caplog):
    model = Holder(build_experts("qwen3_moe", "Qwen3MoeExperts"))
    names = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(model, LoraConfig(r=R, target_modules=[], target_parameters=names))
    fill_adapter(model)
    x, index, weights = random_rows()
    wrapper = model.base_model.model.experts
    right = wrapper(x, index, weights)
    with apply_to_peft():
        assert torch.equal(wrapper(x, index, top_k_weights=weights), right)
        assert not computed
        assert "was not called as" in caplog.text
        with pytest.raises(RuntimeError):
            wrapper(x.double(), index, weights)
        assert "torch.float32, its input torch.float64" in caplog.text
        assert not computed
        wrapper(x, index, weights)
    assert computed


def test_adapters_of_a_batch_are_refused_as_by_peft():
    model = peft_model().eval()
    call = {"input_ids": torch.ones(1, 2, dtype=torch.long), "adapter_names": ["default"]}
    message = "lora.ParamWrapper does not support mixed adapter batches yet"
    with pytest.raises(ValueError, match=message):
        model(**call)
    with apply_to_peft(), pytest.raises(ValueError, match=message):
        model(**call)


def one_layer():
    """Experts in their wrappers, and rows for them."""
    base = tiny_model(num_hidden_layers=1)
    model = with_peft_lora(base)
    layer = model.base_model.model.model.layers[0].mlp.experts
    return layer, layer.get_base_layer(), random_rows()


def reason_of(layer, *rows):
    with pytest.raises(LeftToPeft) as left:
        read_call(layer, *rows)
    return str(left.value)


def test_weights_that_are_parts_or_elsewhere():
    layer, experts, rows = one_layer()
    read_call(layer, *rows)
    whole = experts.gate_up_proj
    for part in (whole[:2], whole[:, :, :5], whole.new_empty(0)):
        experts.gate_up_proj = nn.Parameter(part.detach(), requires_grad=False)
        # as DeepSpeed's ZeRO-3 leaves it
        experts.gate_up_proj.ds_shape = whole.shape
        assert "which several processes share" in reason_of(layer, *rows)
    experts.gate_up_proj = nn.Parameter(whole.to("meta"), requires_grad=False)
    assert "is on meta, its input on cpu" in reason_of(layer, *rows)
    subclass = whole.detach().as_subclass(type("Sharded", (torch.Tensor,), {}))
    experts._parameters["gate_up_proj"] = subclass
    assert "is a Sharded" in reason_of(layer, *rows)


def test_weights_that_a_hook_changes():
    layer, experts, rows = one_layer()
    call = read_call(layer, *rows)
    experts.down_proj = nn.Parameter(experts.down_proj.detach().clone(), requires_grad=False)
    with pytest.raises(LeftToPeft, match="a hook changes the weights"):
        call.run(*rows)
    assert not isinstance(experts.config, AdaptedExpertsConfig)
    assert read_call(layer, *rows).run(*rows).shape == rows[0].shape


def test_a_and_b_that_do_not_fit_or_are_elsewhere():
    layer, _, rows = one_layer()
    B = layer.lora_B["default"]
    whole = B.weight
    B.weight = nn.Parameter(whole[:, :-E].detach())
    assert "are not those of" in reason_of(layer, *rows)
    B.weight = nn.Parameter(whole.to("meta"))
    assert "on meta, the experts are on cpu" in reason_of(layer, *rows)
    B.weight = whole
    read_call(layer, *rows)
    # earlier releases of PEFT exchange the two sides of [E, N, K]
    layer._did_swap_in_out_features = False
    assert "are not those of" in reason_of(layer, *rows)


def test_fp8_codes_are_left_to_peft():
    layer, experts, rows = one_layer()
    codes = experts.gate_up_proj.detach().to(torch.float8_e4m3fn)
    experts.gate_up_proj = nn.Parameter(codes, requires_grad=False)
    assert "without scales in a known place" in reason_of(layer, *rows)
    experts.gate_up_proj_scale_inv = nn.Parameter(torch.ones(E, 1, 1), requires_grad=False)
    assert "holds fp8 codes" in reason_of(layer, *rows)


def test_experts_with_an_adapter_of_another_kind_too():
    layer, experts, rows = one_layer()
    inner = layer.base_layer
    inner.base_layer = Between(experts)
    assert "another adapter too, in a Between" in reason_of(layer, *rows)


class Between(nn.Module):
    """A layer of another tuner, as PEFT nests them."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer


def test_without_an_active_adapter():
    layer, _, rows = one_layer()
    for wrapper in (layer, layer.base_layer):
        wrapper._active_adapter = ["another"]
    assert "no adapter of these experts is active" in reason_of(layer, *rows)
