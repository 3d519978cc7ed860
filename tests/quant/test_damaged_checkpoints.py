"""A checkpoint whose experts are not those of its configuration is refused, by name.

Nothing is handed out: the error says which stack, its shape, what was needed and what came.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import STORED_FAMILIES, E, moe_lora, tiny_model
from peft_moe_lora import load_quantized, quantize_experts
from peft_moe_lora.experts.stored import stored_weight
from peft_moe_lora.ops.quantize import FORMATS

LAYER = "model.layers.1.mlp.experts"
DOWN = f"{LAYER}.2.down_proj.weight"
PARTS = ("gate_proj", "up_proj", "down_proj")


def lose_last(t):
    for name in [n for n in t if f".experts.{E - 1}." in n]:
        del t[name]


def lose_middle(t):
    for part in PARTS:
        del t[f"{LAYER}.2.{part}.weight"]


def lose_one(t):
    del t[DOWN]


def lose_up(t):
    for name in [n for n in t if n.startswith(LAYER) and "up_proj" in n]:
        del t[name]


def lose_stack(t):
    for name in [n for n in t if n.startswith(LAYER) and "down_proj" in n]:
        del t[name]


def number_anew(t):
    for part in PARTS:
        t[f"{LAYER}.{E + 2}.{part}.weight"] = t.pop(f"{LAYER}.2.{part}.weight")


def add_one(t):
    for part in PARTS:
        t[f"{LAYER}.{E}.{part}.weight"] = t[f"{LAYER}.2.{part}.weight"].clone()


def write_twice(t):
    t[f"{LAYER}.02.down_proj.weight"] = t[DOWN].clone()


def stack_too(t):
    t[f"{LAYER}.down_proj"] = torch.stack([t[f"{LAYER}.{e}.down_proj.weight"] for e in range(E)])


def transpose_one(t):
    t[DOWN] = t[DOWN].T.contiguous()


def transpose_all(t):
    for e in range(E):
        name = f"{LAYER}.{e}.down_proj.weight"
        t[name] = t[name].T.contiguous()


def make_int(t):
    t[DOWN] = (100 * t[DOWN]).to(torch.int8)


def make_fp8(t):
    t[DOWN] = t[DOWN].to(torch.float8_e4m3fn)


def put_nan(t):
    t[DOWN][1, 2] = float("nan")


def put_infinity(t):
    t[DOWN][1, 2] = -float("inf")


# what is done to the checkpoint -> what the error says beside the stack and its shape
DAMAGES = {
    lose_last: rf"experts 0 to {E - 1}, each exactly once.*it lacks \[{E - 1}\]",
    lose_middle: r"it lacks \[2\]",
    lose_one: rf"has {E - 1}: it lacks \[2\]",
    lose_up: r"up_proj.*but the checkpoint holds \[.*gate_proj",
    lose_stack: r"does not hold 1 of 4 parameters of the experts",
    number_anew: rf"it lacks \[2\]; the configuration has no \[{E + 2}\]",
    add_one: rf"the configuration has no \[{E}\]",
    write_twice: r"twice there are \[2\]",
    stack_too: r"but the checkpoint holds",
    transpose_one: r"experts\.2\.down_proj\.weight is \[\d+, \d+\], but the tensors of the other",
    transpose_all: r"by the configuration, but the checkpoint holds \[",
    make_int: r"experts\.2\.down_proj\.weight is torch\.int8",
    make_fp8: r"experts\.2\.down_proj\.weight is torch\.float8_e4m3fn",
    put_nan: r"must be finite, but the experts \[2\] hold NaN",
    put_infinity: r"must be finite, but the experts \[2\] hold NaN or infinity",
}


@pytest.fixture
def damaged(tmp_path):
    """Save a tiny model, change its tensors, save them again."""

    def save(damage, family="qwen3_moe", file="model.safetensors"):
        tiny_model(family).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        damage(tensors)
        if file.endswith(".bin"):
            (tmp_path / "model.safetensors").unlink()
            torch.save(tensors, tmp_path / file)
        else:
            save_file(tensors, tmp_path / file, {"format": "pt"})
        return tmp_path

    return save


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("experts", ["nf4", "int8"])
def test_experts_that_are_not_the_configurations_are_refused(damaged, damage, experts):
    with pytest.raises(ValueError, match=DAMAGES[damage]) as caught:
        load_quantized(damaged(damage), experts)
    if damage is lose_last:
        assert "model.layers.0.mlp.experts" in str(caught.value)
    else:
        assert LAYER in str(caught.value)
    assert f"[{E}, " in str(caught.value)


def test_headers_are_checked_before_a_tensor_is_read(damaged, monkeypatch):
    monkeypatch.setattr("transformers.core_model_loading._materialize_copy", None)
    with pytest.raises(ValueError, match=r"it lacks \[2\]"):
        load_quantized(damaged(lose_middle))


def test_files_of_torch_are_checked_too(damaged):
    with pytest.raises(ValueError, match=r"it lacks \[2\]; the configuration has no"):
        load_quantized(damaged(number_anew, file="pytorch_model.bin"))


def test_a_value_too_large_for_the_dtype_is_refused(damaged):
    def enlarge(t):
        t[DOWN][0, 0] = 1e6

    path = damaged(enlarge)
    with pytest.raises(ValueError, match=r"infinity in torch\.float16.*bfloat16 or float32"):
        load_quantized(path, dtype=torch.float16)
    load_quantized(path, dtype=torch.bfloat16)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    tiny_model("qwen3_moe").save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in index.values() if file != index[DOWN])
    tensors = load_file(tmp_path / other)
    tensors[DOWN] = 2 * load_file(tmp_path / index[DOWN])[DOWN]
    save_file(tensors, tmp_path / other, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{LAYER}.down_proj.*twice there are \[2\]"):
        load_quantized(tmp_path)


@pytest.mark.parametrize("family", STORED_FAMILIES)
def test_every_tensor_of_the_experts_is_needed(damaged, family):
    """Also biases, which the loader initializes at random when they are missing."""
    names = []
    damaged(lambda t: names.extend(n for n in t if ".experts." in n and ".1." in n), family)
    assert names
    for name in dict.fromkeys(n.rpartition("experts")[2] for n in names):
        full = next(n for n in names if n.endswith(f"experts{name}"))
        with pytest.raises(ValueError, match=r"the checkpoint (has|holds|does not hold)"):
            load_quantized(damaged(lambda t, full=full: t.pop(full), family))


def test_experts_numbered_across_two_stacks(tmp_path):
    """Those of text come first, then those of images, which are smaller."""
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

    text = {
        "vocab_size": 64,
        "hidden_size": 64,
        "head_dim": 64,
        "intermediate_size": 48,
        "moe_intermediate_size": [24, 16],
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "moe_num_experts": E,
        "mlp_layer_types": ["sparse"] * 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [11, 11, 10],
        },
    }
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 4}
    config = Ernie4_5_VLMoeConfig(text_config=text, vision_config=vision)
    Ernie4_5_VLMoeForConditionalGeneration(config).save_pretrained(tmp_path)
    given = {"experts": "int8", "model_class": Ernie4_5_VLMoeForConditionalGeneration}
    moe = load_quantized(tmp_path, **given).model.language_model.layers[1].mlp
    for experts, width in ((moe.text_moe.experts, 24), (moe.vision_moe.experts, 16)):
        assert stored_weight(experts, "down_proj").shape == (E, 64, width)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [n for n in tensors if f".1.mlp.experts.{2 * E - 1}.down" in n]:
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"0 to {2 * E - 1}.*it lacks \[{2 * E - 1}\]"):
        load_quantized(tmp_path, **given)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_quantizing_a_model_that_is_not_finite_changes_nothing(format, value):
    model = moe_lora(tiny_model("qwen3_moe"))
    experts = model.base_model.model.model.layers[1].mlp.experts.get_base_layer()
    experts.down_proj.data[3, 0, 0] = value
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = r"layers\.1\.mlp\.experts.*\.down_proj \[.*must be finite, but the experts \[3\] hold"
    with pytest.raises(ValueError, match=said):
        quantize_experts(model, format)
    assert before.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    assert isinstance(stored_weight(experts, "gate_up_proj"), torch.nn.Parameter)
