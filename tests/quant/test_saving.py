"""A model with quantized experts is not saved; its adapters are, and the model when it is dense."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpers import SAME, assert_close, moe_lora, outputs, tiny_model, token_ids
from peft_moe_lora import dequantize_experts, load_quantized, quantize_experts


def in_memory(tmp_path):
    return quantize_experts(tiny_model(), "int8")


def loaded(tmp_path):
    tiny_model().save_pretrained(tmp_path / "dense")
    return load_quantized(tmp_path / "dense", "int8")


MAKERS = [in_memory, loaded]


def reloaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("part", ["", "model"], ids=["whole", "inner"])
def test_codes_are_not_saved_as_a_model(make, part, tmp_path, caplog):
    model = make(tmp_path)
    with pytest.raises(ValueError, match="not serializable"):
        model.get_submodule(part).save_pretrained(tmp_path / "saved")
    assert "call dequantize_experts(model)" in caplog.text
    with pytest.raises(ValueError, match="not serializable"):
        copy.deepcopy(model).save_pretrained(tmp_path / "saved")
    merged = moe_lora(model).merge_and_unload()
    with pytest.raises(ValueError, match="not serializable"):
        merged.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.glob("saved/*.safetensors"))


@pytest.mark.parametrize("make", MAKERS)
def test_a_dense_model_is_saved_again(make, tmp_path):
    model = moe_lora(make(tmp_path))
    dequantize_experts(model)
    model = model.merge_and_unload()
    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved/config.json").read_text())
    assert_close(outputs(reloaded(tmp_path / "saved")), outputs(model), SAME)


@pytest.mark.parametrize("make", MAKERS)
def test_adapters_are_saved_as_before(make, tmp_path):
    model = moe_lora(make(tmp_path))
    model.save_pretrained(tmp_path / "adapter")
    base = make(tmp_path)
    base.load_adapter(tmp_path / "adapter")
    assert_close(outputs(base), outputs(model), SAME)
    base.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(make(tmp_path), tmp_path / "again")
    assert_close(outputs(again), outputs(model), SAME)


def test_a_model_quantized_in_memory_trains_and_makes_room_for_another_format(tmp_path):
    model = in_memory(tmp_path)
    quantize_experts(dequantize_experts(model), "nf4")
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")
    model = moe_lora(model)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()


def test_the_quantizer_of_linear_layers_comes_back(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    settings = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=settings)
    own = model.hf_quantizer
    quantize_experts(model)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")
    dequantize_experts(model)
    assert model.hf_quantizer is own
    assert model.config.quantization_config is own.quantization_config
    assert model.is_quantized
