"""What is loaded is checked whole before the model is touched: one error, the model as it was."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import (
    assert_unchanged,
    fill_adapter,
    moe_lora,
    outputs,
    snapshot,
    tiny_model,
)

FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
EXPERTS = PREFIX + "model.layers.0.mlp.experts.lora_A.down"
Q_PROJ = PREFIX + "model.layers.1.self_attn.q_proj.lora_B.weight"
GATE = PREFIX + "model.layers.1.mlp.gate.lora_A.weight"
HEAD = PREFIX + "lm_head.weight"
TOKENS = PREFIX + "model.embed_tokens.token_adapter.trainable_tokens_delta"
SETTINGS = {
    "target_modules": ["experts", "q_proj", "gate"],
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": {"embed_tokens": [3, 5]},
}


def cast(key, dtype):
    return lambda tensors: tensors | {key: (tensors[key] * 9).to(dtype)}


def without_prefix(*ends):
    def change(tensors):
        return {
            key.removeprefix(PREFIX) if key.endswith(ends) else key: tensor
            for key, tensor in tensors.items()
        }

    return change


def twice(tensors):
    return tensors | {Q_PROJ.removeprefix(PREFIX): tensors[Q_PROJ].clone()}


def large(key, value):
    def change(tensors):
        tensors[key][1, 1] = value
        return tensors

    return change


# what is wrong -> (what the error names, the change of the tensors)
FAULTS = {
    "experts of int8": (EXPERTS, cast(EXPERTS, torch.int8)),
    "experts of bool": (EXPERTS, cast(EXPERTS, torch.bool)),
    "a linear layer of int64": (Q_PROJ, cast(Q_PROJ, torch.int64)),
    "a router of uint8": (GATE, cast(GATE, torch.uint8)),
    "a head of int32": (HEAD, cast(HEAD, torch.int32)),
    "tokens of int16": (TOKENS, cast(TOKENS, torch.int16)),
    "complex experts": (EXPERTS, cast(EXPERTS, torch.complex64)),
    "experts too large": (EXPERTS, large(EXPERTS, -1e5)),
    "a router too large": (GATE, large(GATE, 1e5)),
    "a head too large": (HEAD, large(HEAD, 7e4)),
    "a double too large": (
        Q_PROJ,
        lambda t: large(Q_PROJ, 1e300)(cast(Q_PROJ, torch.float64)(t)),
    ),
    "no prefix": ("convert_adapter", without_prefix("")),
    "linear layers without prefix": ("convert_adapter", without_prefix("lora_B.weight")),
    "a head without prefix": ("convert_adapter", without_prefix("lm_head.weight")),
    "with prefix and without": ("twice", twice),
    "no tokens": (TOKENS, lambda t: {k: v for k, v in t.items() if k != TOKENS}),
    "an empty tensor": (Q_PROJ, lambda t: t | {Q_PROJ: t[Q_PROJ][:, :0].clone()}),
    "a vector": (Q_PROJ, lambda t: t | {Q_PROJ: t[Q_PROJ].flatten()}),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    moe_lora(tiny_model(), **SETTINGS).save_pretrained(folder)
    return folder


def change(source, folder, change_tensors):
    with safe_open(source / FILE, framework="pt") as file:
        metadata = file.metadata()
    save_file(change_tensors(load_file(source / FILE)), folder / FILE, metadata)
    config = json.loads((source / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.fixture(params=FAULTS)
def fault(request, good, tmp_path):
    """(what the error names, folder of a damaged adapter)."""
    named, change_tensors = FAULTS[request.param]
    change(good, tmp_path, change_tensors)
    return named.replace(".", r"\."), tmp_path


def test_the_undamaged_adapter_loads(good):
    for dtype in (torch.float32, torch.float16):
        loaded = PeftModel.from_pretrained(tiny_model(dtype=dtype), good)
        assert torch.isfinite(outputs(loaded)).all()


def test_a_damaged_file_is_refused_and_the_model_unchanged(fault):
    named, folder = fault
    model = tiny_model(dtype=torch.float16)
    before = snapshot(model)
    with pytest.raises(ValueError, match=named):
        PeftModel.from_pretrained(model, folder)
    assert_unchanged(model, before)
    assert not hasattr(model, "peft_config")


def test_a_damaged_file_is_refused_beside_another_adapter(fault):
    named, folder = fault
    model = moe_lora(tiny_model(dtype=torch.float16), target_modules=["experts", "v_proj"])
    before = snapshot(model)
    config = model.peft_config["default"].to_dict()
    with pytest.raises(ValueError, match=named):
        model.load_adapter(folder, "second")
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]
    assert model.peft_config["default"].to_dict() == config


def test_values_that_the_model_holds_are_taken(good, tmp_path):
    change(good, tmp_path, large(EXPERTS, 1e5))
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert max(p.abs().max().item() for p in loaded.parameters()) == 1e5
    change(good, tmp_path, cast(EXPERTS, torch.bfloat16))
    PeftModel.from_pretrained(tiny_model(), tmp_path)


STATE_FAULTS = {
    "a linear layer of int8": cast(Q_PROJ, torch.int8),
    "experts of bool": cast(EXPERTS, torch.bool),
    "a linear layer is missing": lambda t: {k: v for k, v in t.items() if k != Q_PROJ},
    "a linear layer of another rank": lambda t: t | {Q_PROJ: t[Q_PROJ][:, 1:]},
    "a linear layer without prefix": without_prefix("q_proj.lora_B.weight"),
    "not finite in the dtype of its parameter": large(GATE, 1e5),
}


@pytest.mark.parametrize("why", STATE_FAULTS)
def test_a_damaged_state_dict_is_refused_and_the_model_unchanged(why):
    model = moe_lora(tiny_model(), target_modules=["experts", "q_proj", "gate"])
    model.base_model.model.half()
    state = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, state)
    fill_adapter(model, seed=5)
    before = snapshot(model)
    with pytest.raises(ValueError, match="the adapter's state dict"):
        set_peft_model_state_dict(model, STATE_FAULTS[why](state))
    assert_unchanged(model, before)
