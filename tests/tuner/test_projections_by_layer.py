"""`target_projections` as a dict: layers of experts with projections of their own."""

import copy
import json
import re

import pytest
from peft import PeftModel, get_peft_model

from families.off_interface import off_interface_model
from helpers import (
    R,
    assert_close,
    assert_unchanged,
    fill_adapter,
    moe_lora,
    outputs,
    relative_error,
    snapshot,
    tiny_model,
)
from peft_moe_lora import MoELoraConfig, convert_adapter, merge_adapter
from peft_moe_lora.layers.layer import MoELoraLayer

TOLERANCE = 1e-5
FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"
BY_LAYER = {"layers.0.mlp.experts": ["gate_up"], "layers.1.mlp.experts": ["down"]}


def adapted_projections(model, adapter_name="default"):
    """Path of each adapted experts module -> the projections that an adapter of it has."""
    return {
        path.removeprefix("base_model.model."): layer.adapted_projections(adapter_name)
        for path, layer in model.named_modules()
        if isinstance(layer, MoELoraLayer)
    }


def test_each_layer_has_its_own_and_the_others_have_both():
    model = moe_lora(tiny_model(num_hidden_layers=3), target_projections=BY_LAYER)
    assert adapted_projections(model) == {
        FIRST: ["gate_up"],
        SECOND: ["down"],
        "model.layers.2.mlp.experts": ["gate_up", "down"],
    }
    assert "3 experts modules, 15 experts, 20 projections adapted" in model.base_model.summary()


def test_the_first_key_that_matches_decides():
    given = {"1.mlp.experts": "down", "experts": ("gate_up",)}
    model = moe_lora(tiny_model(), target_projections=given)
    assert adapted_projections(model) == {FIRST: ["gate_up"], SECOND: ["down"]}


@pytest.mark.parametrize(
    "given",
    [
        BY_LAYER,
        {r".*\.1\..*": ["down"]},
        # PEFT sorts the keys of a saved configuration
        {"layers.1.mlp.experts": ["down"], "experts": ["gate_up"]},
    ],
    ids=str,
)
def test_a_saved_adapter_loads_and_merges_the_same(given, tmp_path):
    base = tiny_model()
    model = moe_lora(copy.deepcopy(base), target_projections=given, target_modules=["experts"])
    assert relative_error(outputs(model), outputs(base)) > 0.1
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    assert adapted_projections(loaded) == adapted_projections(model)
    assert relative_error(outputs(loaded), outputs(model)) == 0
    # saved once more, and merged by files
    loaded.save_pretrained(tmp_path / "again")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        first, again = (tmp_path / folder / name for folder in ("adapter", "again"))
        assert first.read_bytes() == again.read_bytes()
    base.save_pretrained(tmp_path / "base")
    merge_adapter(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged")
    assert_close(outputs(merged), outputs(model), TOLERANCE)


def test_the_card_lists_them(tmp_path):
    moe_lora(tiny_model(), target_projections=BY_LAYER).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert re.search(r"projections.*layers\.0\.mlp\.experts.*gate_up.*down.*both in the", card)


def test_it_becomes_pefts_file_and_ours_again(tmp_path):
    base = tiny_model()
    model = moe_lora(copy.deepcopy(base), target_projections=BY_LAYER)
    model.save_pretrained(tmp_path / "ours")
    convert_adapter(tmp_path / "ours", tmp_path / "peft", to="peft", base_config=base.config)
    theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft")
    assert theirs.peft_config["default"].target_parameters == {
        f"{FIRST}.gate_up_proj",
        f"{SECOND}.down_proj",
    }
    assert_close(outputs(theirs), outputs(model), TOLERANCE)
    convert_adapter(tmp_path / "peft", tmp_path / "back", to="moe_lora", base_config=base.config)
    back = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "back")
    assert adapted_projections(back) == adapted_projections(model)
    assert relative_error(outputs(back), outputs(model)) == 0


def test_adapters_of_different_projections_are_added_up():
    base = tiny_model()
    model = moe_lora(
        copy.deepcopy(base), target_projections=["gate_up"], target_modules=["0.mlp.experts"]
    )
    second = MoELoraConfig(r=R, target_projections=["down"], target_modules=["1.mlp.experts"])
    model.add_adapter("second", second)
    fill_adapter(model, "second", seed=9)
    model.base_model.set_adapter(["default", "second"])
    right = outputs(model)
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both", combination_type="cat")
    model.set_adapter("both")
    assert adapted_projections(model, "both") == {FIRST: ["gate_up"], SECOND: ["down"]}
    assert_close(outputs(model), right, TOLERANCE)


def test_a_module_that_is_a_single_projection_ignores_them():
    base = off_interface_model("jetmoe")
    model = get_peft_model(base, MoELoraConfig(target_projections={r".*\.0\..*": ["down"]}))
    assert list(adapted_projections(model).values()) == [["linear"]] * 8


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "target_projections={} names no experts module"),
        ({"experts": ["up"]}, r"target_projections\['experts'\] must name one or more .*'up'"),
        ({"experts": []}, r"target_projections\['experts'\] must name one or more"),
        ({"experts": ["down", "down"]}, r"target_projections\['experts'\] must name one or more"),
        ({"experts": ["gate_up_proj"]}, "mean 'gate_up'"),
        ({"experts": 3}, "target_projections must be a name, a list of names, or an object"),
        ({"(": ["down"]}, "target_projections: "),
        ({"experst": ["down"]}, "target_projections: 'experst' matches no targeted experts module"),
        ({"experts": ["down"], "0.mlp.experts": ["gate_up"]}, "'0.mlp.experts' matches no target"),
    ],
    ids=str,
)
def test_what_a_dict_cannot_say_is_refused(given, message):
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, MoELoraConfig(r=R, target_projections=given))
    assert_unchanged(model, before)


def test_pefts_words_beside_it_are_refused():
    with pytest.raises(ValueError, match="target_parameters names the projections already"):
        MoELoraConfig(target_parameters=["experts.down_proj"], target_projections=BY_LAYER)
    with pytest.raises(ValueError, match=r"target_projections=.*a LoraConfig names parameters by"):
        MoELoraConfig(target_projections=BY_LAYER).to_lora_config()
    # without experts there is nothing to say
    MoELoraConfig(target_projections=BY_LAYER, target_modules=["q_proj"]).to_lora_config()


@pytest.mark.parametrize("change", [["up"], {"experts": ["up"]}, {"experts": 3}], ids=str)
def test_a_damaged_field_is_refused_when_it_is_loaded_and_converted(change, tmp_path):
    base = tiny_model()
    moe_lora(copy.deepcopy(base), target_projections=BY_LAYER).save_pretrained(tmp_path / "ours")
    path = tmp_path / "ours" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_projections": change}))
    with pytest.raises(ValueError, match="target_projections"):
        PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    with pytest.raises(ValueError, match="target_projections"):
        convert_adapter(tmp_path / "ours", tmp_path / "peft", to="peft", base_config=base.config)


def test_projections_that_are_not_those_of_the_file_are_refused(tmp_path):
    base = tiny_model()
    moe_lora(copy.deepcopy(base), target_projections=BY_LAYER).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_projections": ["down"]}))
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.lora_A\.down"):
        PeftModel.from_pretrained(base, tmp_path)
    assert_unchanged(base, before)
