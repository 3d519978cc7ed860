"""Merging and unmerging a model leaves every weight as it was, beside the experts too."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from helpers import BF16, FP32, assert_close, fill_adapter, moe_lora, outputs, tiny_model

TARGETS = ["experts", "gate", "q_proj", "o_proj", "embed_tokens"]


def adapted(dtype=torch.bfloat16, **config):
    model = moe_lora(tiny_model(dtype=dtype), **{"target_modules": TARGETS, **config})
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


def overwrite(model):
    fill_adapter(model, seed=7)


def rescale(model):
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", 0.5)


def break_it(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(float("nan"))


@pytest.mark.parametrize("change", [overwrite, rescale, break_it], ids=lambda f: f.__name__)
def test_an_adapter_may_change_while_it_is_merged(change):
    model, before = adapted()
    model.merge_adapter()
    change(model)
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, before[name]), name


def test_an_adapter_that_was_not_finite_leaves_nothing():
    model, before = adapted(torch.float16)
    for parameter in model.parameters():
        if parameter.ndim == 2 and parameter.dtype == torch.float32:
            parameter.data *= 1e4
    model.merge_adapter()
    assert not q_proj(model).weight.isfinite().all()
    model.unmerge_adapter()
    assert torch.equal(q_proj(model).weight, before[Q_PROJ])


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_may_be_cast_while_it_is_merged(wide):
    """A wider dtype gives the weights exactly, the same dtype casts A and B alone."""
    model, before = adapted()
    model.merge_adapter()
    model.to(wide)
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(parameter, before[name].to(wide)), name


def test_a_model_may_be_cast_to_a_narrower_dtype_while_it_is_merged():
    model, before = adapted(torch.float32)
    model.merge_adapter()
    model.to(torch.bfloat16)
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            assert_close(parameter, before[name], BF16, name)


@pytest.mark.parametrize("fast_linear", [True, False])
def test_merging_within_autocast_is_merging(fast_linear):
    model, before = adapted(torch.float32, fast_linear=fast_linear)
    model.merge_adapter()
    merged = {n: p.clone() for n, p in model.named_parameters()}
    model.unmerge_adapter()
    with torch.autocast("cpu", torch.bfloat16):
        model.merge_adapter()
    assert_same(model, merged)
    with torch.autocast("cpu", torch.bfloat16):
        model.unmerge_adapter()
    assert_same(model, before)
    with torch.autocast("cpu", torch.bfloat16):
        whole = model.merge_and_unload()
    for name, parameter in whole.named_parameters():
        wrapped = f"base_model.model.{name}"
        if wrapped not in merged:
            wrapped = wrapped.replace(".mlp.experts", ".mlp.experts.base_layer")
        if wrapped not in merged:
            wrapped = wrapped.replace(".weight", ".base_layer.weight")
        assert torch.equal(parameter, merged[wrapped]), name


def test_a_forward_within_autocast_unmerges_what_was_merged():
    model, before = adapted(torch.float32, target_modules=TARGETS[:-1])
    model.merge_adapter()
    with model.disable_adapter(), torch.autocast("cpu", torch.bfloat16):
        outputs(model)
    for name, parameter in model.named_parameters():
        assert_close(parameter, before[name], FP32, name)


BESIDE = {
    "an adapted embedding": {"target_modules": ["experts", "embed_tokens"]},
    "an adapted head": {"target_modules": ["experts", "lm_head"]},
    "tokens": {"target_modules": ["experts"], "trainable_token_indices": [3, 5]},
}


@pytest.mark.parametrize("config", BESIDE.values(), ids=BESIDE)
def test_what_is_saved_of_a_merged_model_is_what_is_saved_of_the_unmerged(config, tmp_path):
    model, _ = adapted(torch.float32, **config)
    model.save_pretrained(tmp_path / "unmerged", save_embedding_layers=True)
    expected = outputs(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path / "merged", save_embedding_layers=True)
    held, right = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("merged", "unmerged")
    )
    assert held.keys() == right.keys()
    for name, tensor in held.items():
        assert torch.equal(tensor, right[name]), name
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "merged")
    assert_close(outputs(loaded), expected, FP32)


def test_a_merged_embedding_that_nobody_kept_is_not_saved(tmp_path):
    model, _ = adapted(torch.float32, target_modules=["embed_tokens", "experts"])
    model.base_model.model.model.embed_tokens.merge()
    with pytest.raises(ValueError, match=r"merged into model\.embed_tokens"):
        model.save_pretrained(tmp_path / "merged")
    assert not list(tmp_path.glob("merged/*"))
    model.unmerge_adapter()
    model.save_pretrained(tmp_path / "merged")


def test_nothing_is_loaded_into_a_merged_adapter(tmp_path):
    model, _ = adapted()
    model.save_pretrained(tmp_path)
    tensors = get_peft_model_state_dict(model)
    fill_adapter(model, seed=7)
    expected = {n: p.clone() for n, p in model.named_parameters()}
    model.merge_adapter()
    with pytest.raises(ValueError, match="nothing was loaded into it"):
        model.load_adapter(tmp_path, "default")
    with pytest.raises(ValueError, match="nothing was loaded into it"):
        set_peft_model_state_dict(model, tensors)
    model.unmerge_adapter()
    assert_same(model, expected)
    model.load_adapter(tmp_path, "default")
    assert all(torch.equal(get_peft_model_state_dict(model)[key], tensors[key]) for key in tensors)


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
