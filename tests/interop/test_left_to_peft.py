"""What `apply_to_peft` cannot compute gives PEFT's own numbers, and the log says why, once."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from helpers import (
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
from interop.models import peft_model
from peft_moe_lora import apply_to_peft


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


def a_variant():
    model = peft_model()
    for module in model.modules():
        if hasattr(module, "lora_variant"):
            module.lora_dropout["default"] = nn.Dropout(0.0)
    return model


REASONS = [
    (trained_bias, logging.WARNING, "trained itself"),
    (trained_weight, logging.WARNING, "trained itself"),
    (a_bias_adapted, logging.WARNING, "is no projection's weight"),
    (a_module_whose_forward_was_replaced, logging.WARNING, "forward was replaced"),
    (a_variant, logging.WARNING, "more than B A"),
    (nothing_of_the_experts, logging.INFO, "no weight of experts"),
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
