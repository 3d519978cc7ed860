"""Base models whose weights accelerate offloads: adapters are added, trained, merged and loaded."""

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers import (
    FP32,
    SAME,
    adapter_parameters,
    assert_close,
    fill_adapter,
    moe_lora,
    outputs,
    tiny_model,
    token_ids,
)
from peft_moe_lora import MoELoraConfig

CPU = torch.device("cpu")
TARGETS = ["experts", "gate", "q_proj", "o_proj"]
# the second layer is on disk
PLACES = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture(params=["device_map", "cpu_offload"])
def offloaded(request, tmp_path):
    if request.param == "cpu_offload":
        return cpu_offload(tiny_model(), CPU)
    return on_disk(tmp_path)


def on_disk(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=PLACES, offload_folder=tmp_path / "offloaded"
    ).eval()


def adapted(model, **config):
    return moe_lora(model, target_modules=TARGETS, **config)


def q_proj(model):
    return model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")


def test_a_new_adapter_changes_nothing_and_is_where_it_runs(offloaded):
    model = adapted(offloaded, randomize=False)
    assert q_proj(model).base_layer.weight.is_meta, "nothing is offloaded: the test proves nothing"
    assert not any(parameter.is_meta for parameter in adapter_parameters(model).values())
    assert_close(outputs(model), outputs(tiny_model()), SAME)


def test_gradients_are_those_of_a_model_in_memory(offloaded):
    model = adapted(offloaded)
    expected = adapted(tiny_model())
    for each in (model, expected):
        each(input_ids=token_ids(), labels=token_ids()).loss.backward()
    wanted = {name: p.grad for name, p in adapter_parameters(expected).items()}
    for name, parameter in adapter_parameters(model).items():
        assert_close(parameter.grad, wanted[name], FP32, name)


def test_merging_unmerging_and_disabling(offloaded):
    model = adapted(offloaded)
    expected = outputs(adapted(tiny_model()))
    for _ in range(2):
        model.merge_adapter()
        assert_close(outputs(model), expected)
        with model.disable_adapter():
            assert_close(outputs(model), outputs(tiny_model()))
        assert_close(outputs(model), expected)
        model.merge_adapter()
        model.unmerge_adapter()
        assert_close(outputs(model), expected)
    assert_close(outputs(model.merge_and_unload()), expected)


def test_a_merged_layer_that_is_offloaded_does_not_unmerge_in_a_forward(offloaded):
    for targets in (["experts"], ["q_proj"], ["gate"]):
        model = moe_lora(offloaded, target_modules=targets)
        model.merge_adapter()
        # as transformers' disable_adapters does, which does not call the tuner
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                module.enable_adapters(False)
        with pytest.raises(ValueError, match="merged into weights that are offloaded"):
            outputs(model)
        model.unmerge_adapter()
        assert_close(outputs(model), outputs(tiny_model()))
        offloaded = model.unload()


def test_an_adapter_is_saved_and_loaded(offloaded, tmp_path):
    source = adapted(tiny_model())
    source.save_pretrained(tmp_path / "adapter")
    if not hasattr(offloaded, "hf_device_map"):
        model = PeftModel.from_pretrained(offloaded, tmp_path / "adapter")
    else:
        # PEFT does not find fused experts in the index of what is on disk
        config = MoELoraConfig.from_pretrained(tmp_path / "adapter")
        model = get_peft_model(offloaded, config)
        weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        set_peft_model_state_dict(model, weights)
    assert_close(outputs(model), outputs(source), SAME)
    fill_adapter(source, seed=7)
    fill_adapter(model, seed=7)
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "again")
    assert_close(outputs(again), outputs(source), SAME)


def test_load_adapter_of_transformers_is_refused_where_it_would_load_nothing(tmp_path):
    adapted(tiny_model()).save_pretrained(tmp_path / "adapter")
    model = on_disk(tmp_path)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match=r"loads nothing into model\.layers\.1"):
        model.load_adapter(tmp_path / "adapter")
    assert [name for name, _ in model.named_modules()] == names
    assert_close(outputs(model), outputs(tiny_model()), SAME)
