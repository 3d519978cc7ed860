"""Nothing is written unless every tensor of an adapter is there, whole and finite."""

import math

import pytest
import torch
from peft import PeftModel

from helpers import SAME, R, assert_close, fill_adapter, moe_lora, outputs, tiny_model
from peft_moe_lora import MoELoraConfig

FILE = "adapter_model.safetensors"
START = "base_model.model.model.layers.1."
EXPERTS = START + "mlp.experts.lora_B.{}down"
Q_PROJ = START + "self_attn.q_proj.lora_A.{}weight"
GATE = START + "mlp.gate.lora_B.{}weight"
EMBEDDING = "base_model.model.model.embed_tokens.lora_embedding_A{}"
TARGETS = ["experts", "q_proj", "gate", "embed_tokens"]

# what came of a tensor -> its change in the state dict, and what the error says
CHANGES = {
    "missing": (lambda t: None, "is missing in the state dict"),
    "one shard of two": (lambda t: t[: len(t) // 2], "of it is here"),
    "gathered on another process": (lambda t: t[:0], "of it is here"),
    "flattened": (lambda t: t.flatten(), "of it is here"),
    "offloaded": (lambda t: t.to("meta"), "has no values here"),
    "NaN": (lambda t: t * math.nan, "holds NaN or infinity"),
    "infinite": (lambda t: t + math.inf, "holds NaN or infinity"),
}


@pytest.fixture(scope="module")
def model():
    return moe_lora(tiny_model(), target_modules=TARGETS)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_refused(model, folder, state, named, message):
    before = contents(folder)
    with pytest.raises(ValueError, match="cannot be saved") as error:
        model.save_pretrained(folder, state_dict=state)
    assert named.format("") in str(error.value)
    assert message in str(error.value)
    assert contents(folder) == before


@pytest.mark.parametrize("key", [EXPERTS, Q_PROJ, GATE], ids=["experts", "linear", "router"])
@pytest.mark.parametrize("why", CHANGES)
def test_a_tensor_that_is_not_whole_is_not_written(model, key, why, tmp_path):
    model.save_pretrained(tmp_path)
    change, message = CHANGES[why]
    state = model.state_dict()
    name = key.format("default.")
    state[name] = change(state[name])
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    check_refused(model, tmp_path, state, key, message)


@pytest.mark.parametrize("why", ["missing", "gathered on another process", "NaN"])
def test_an_embedding_is_checked_too(model, why, tmp_path):
    model.save_pretrained(tmp_path)
    change, message = CHANGES[why]
    state = model.state_dict()
    name = EMBEDDING.format(".default")
    state[name] = change(state[name])
    state = {key: tensor for key, tensor in state.items() if tensor is not None}
    check_refused(model, tmp_path, state, EMBEDDING, message)


def test_a_diverged_adapter_is_not_written_over_a_good_one(tmp_path):
    model = moe_lora(tiny_model(), target_modules=TARGETS)
    expected = outputs(model)
    model.save_pretrained(tmp_path)
    experts = model.base_model.model.model.layers[0].mlp.experts
    experts.lora_A["default"]["down"].data[3, 2] = math.inf
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.lora_A\.down holds NaN"):
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert_close(outputs(loaded), expected, SAME)


def test_transformers_writes_nothing_either(tmp_path):
    model = tiny_model()
    model.add_adapter(MoELoraConfig(r=R, target_modules=["experts", "q_proj"]))
    fill_adapter(model)
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    model.model.layers[1].self_attn.q_proj.lora_B["default"].weight.data.fill_(math.nan)
    with pytest.raises(ValueError, match="cannot be saved"):
        model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_what_is_not_written_is_not_checked(model, tmp_path):
    """A process beside the main one may hold nothing; a state dict alone may be sharded."""
    model.save_pretrained(tmp_path, is_main_process=False, state_dict={})
    assert not list(tmp_path.iterdir())
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    assert (tmp_path / FILE).is_file()
    assert torch.isfinite(outputs(PeftModel.from_pretrained(tiny_model(), tmp_path))).all()
