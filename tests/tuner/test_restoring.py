"""Merging and unmerging a model leaves every weight as it was, beside the experts too."""

import copy

import pytest
import torch

from helpers import assert_close, fill_adapter, moe_lora, outputs, tiny_model

TARGETS = ["experts", "gate", "q_proj", "o_proj", "embed_tokens"]


def adapted(dtype=torch.bfloat16):
    model = moe_lora(tiny_model(dtype=dtype), target_modules=TARGETS)
    return model, {n: p.clone() for n, p in model.named_parameters()}


def assert_same(model, before):
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def q_proj(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_weight_is_restored(dtype):
    model, before = adapted(dtype)
    for _ in range(5):
        model.merge_adapter()
        assert not torch.equal(q_proj(model).weight, before[Q_PROJ])
        model.unmerge_adapter()
    assert_same(model, before)
    assert not any("_before_merge" in vars(module) for module in model.modules())


Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"


def test_two_adapters_merged_one_after_the_other():
    model, _ = adapted()
    model.add_adapter("second", copy.deepcopy(model.peft_config["default"]))
    fill_adapter(model, "second", seed=5)
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    model.unmerge_adapter()
    assert_same(model, before)


def test_a_weight_that_somebody_else_changed_is_left_to_peft():
    model, before = adapted(torch.float32)
    model.merge_adapter()
    with torch.no_grad():
        q_proj(model).weight.add_(1.0)
    model.unmerge_adapter()
    assert_close(q_proj(model).weight, before[Q_PROJ] + 1.0)


def test_a_layer_that_unmerged_by_itself_is_not_written():
    """A forward with the adapters disabled unmerges each layer."""
    model, before = adapted(torch.float32)
    model.merge_adapter()
    with model.disable_adapter():
        outputs(model)
    with torch.no_grad():
        q_proj(model).weight.fill_(2.0)
    model.unmerge_adapter()
    assert (q_proj(model).weight == 2.0).all()
    # and the next merge copies what is there now
    model.merge_adapter()
    model.unmerge_adapter()
    assert (q_proj(model).weight == 2.0).all()
    assert before


def test_a_merge_that_is_refused_keeps_no_copy():
    model, before = adapted(torch.float32)
    with torch.no_grad():
        q_proj(model).lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        model.merge_adapter(safe_merge=True)
    assert "_before_merge" not in vars(q_proj(model))
    model.unmerge_adapter()
    assert torch.equal(q_proj(model).weight, before[Q_PROJ])
