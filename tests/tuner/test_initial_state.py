"""A trained adapter minus its initial state, `path_initial_model_for_weight_conversion`."""

import copy
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import (
    FP32,
    R,
    adapter_parameters,
    assert_close,
    assert_unchanged,
    fill_adapter,
    moe_lora,
    outputs,
    snapshot,
    tiny_model,
)

FILE = "adapter_model.safetensors"
KEY = "base_model.model.model.layers.1.mlp.experts.lora_B.down"
EVERYWHERE = {
    "qwen3_moe": ["experts", "gate", "q_proj", "embed_tokens"],
    "gpt_oss": ["experts", "router", "q_proj", "embed_tokens"],
}
SETTINGS = {
    "plain": {},
    "patterns": {"rank_pattern": {"layers.1.mlp.experts": 2}, "alpha_pattern": {"q_proj": 3}},
    "rslora": {"use_rslora": True},
    "rslora and patterns": {"use_rslora": True, "rank_pattern": {"layers.0.mlp.experts": 3}},
    "some experts": {"expert_indices": {"layers.1.mlp.experts": [0, 3]}},
    "projections of some experts": {"target_projections": {"layers.0.mlp.experts": ["gate_up"]}},
}


def merged(model):
    """Every parameter of the base with the adapter in it, in fp64."""
    whole = copy.deepcopy(model).merge_and_unload()
    return {name: p.detach().double() for name, p in whole.named_parameters()}


def trained(folder, family="qwen3_moe", **settings):
    """The base, the model before its training, saved in `folder`, and after it."""
    base = tiny_model(family)
    model = moe_lora(copy.deepcopy(base), **{"target_modules": EVERYWHERE[family], **settings})
    model.save_pretrained(folder)
    start = copy.deepcopy(model)
    fill_adapter(model, seed=5)
    return base, start, model


@pytest.mark.parametrize("family", EVERYWHERE)
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_update_is_the_trained_one_minus_the_initial_one(family, settings, tmp_path):
    base, start, model = trained(tmp_path / "start", family, **SETTINGS[settings])
    model.save_pretrained(
        tmp_path / "delta", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "delta")
    before = {name: p.detach().double() for name, p in base.named_parameters()}
    first, last, found = merged(start), merged(model), merged(loaded)
    changed = 0
    for name, weight in before.items():
        update = last[name] - first[name]
        if update.abs().max() == 0:
            assert torch.equal(found[name], weight), name
            continue
        changed += 1
        assert_close(found[name] - weight, update, FP32, name)
    # experts, a router and attention in two layers, and the embedding
    assert changed >= (6 if "experts" in settings else 9)
    with safe_open(tmp_path / "delta" / FILE, "pt") as file:
        described = json.loads(file.metadata()["peft_moe_lora"])
    ranks = {path: layer["r"] for path, layer in described["trained"].items()}
    assert (
        ranks["model.layers.1.mlp.experts.gate_up"]
        == 2 * model.get_submodule("base_model.model.model.layers.1.mlp.experts").r["default"]
    )


def test_linear_layers_get_the_tensors_that_peft_gives_them(tmp_path):
    config = {"r": R, "lora_alpha": 2 * R, "target_modules": ["q_proj"]}
    theirs = get_peft_model(tiny_model(), LoraConfig(**config))
    ours = moe_lora(tiny_model(), **config, randomize=False)
    for name, model in {"theirs": theirs, "ours": ours}.items():
        fill_adapter(model)
        model.save_pretrained(tmp_path / f"{name} at first")
        fill_adapter(model, seed=5)
        model.save_pretrained(
            tmp_path / name,
            path_initial_model_for_weight_conversion=str(tmp_path / f"{name} at first"),
        )
    expected = load_file(tmp_path / "theirs" / FILE)
    found = load_file(tmp_path / "ours" / FILE)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 9]}], ids=str
)
def test_what_has_no_a_and_b_is_saved_as_it_was_trained(settings, tmp_path):
    base, _, model = trained(tmp_path / "start", target_modules=["experts"], **settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_" not in name:
                parameter.mul_(1.5)
    model.save_pretrained(
        tmp_path / "delta", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    model.save_pretrained(tmp_path / "trained")
    found = load_file(tmp_path / "delta" / FILE)
    expected = load_file(tmp_path / "trained" / FILE)
    beside = [key for key in expected if ".lora_" not in key]
    assert beside
    assert all(torch.equal(found[key], expected[key]) for key in beside)
    assert found.keys() == expected.keys()
    PeftModel.from_pretrained(base, tmp_path / "delta")


@pytest.mark.parametrize("start", ["start", "./start/", "default"])
def test_the_model_goes_on_as_before(start, tmp_path, monkeypatch):
    """PEFT would load the initial adapter under the folder's name, and leave training mode."""
    _, _, model = trained(tmp_path / start)
    monkeypatch.chdir(tmp_path)
    model.train()
    before, expected = snapshot(model), adapter_parameters(model)
    model.save_pretrained("delta", path_initial_model_for_weight_conversion=start)
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]
    assert all(module.training for module in model.modules())
    assert model.peft_config["default"].r == R
    assert all(p.requires_grad for p in expected.values())


def test_the_initial_adapter_stays_what_it_was(tmp_path):
    base, start, model = trained(tmp_path / "start")
    model.save_pretrained(
        tmp_path / "delta", path_initial_model_for_weight_conversion=str(tmp_path / "start")
    )
    loaded = PeftModel.from_pretrained(base, tmp_path / "start")
    assert_close(outputs(loaded), outputs(start), FP32)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"r": 2, "lora_alpha": 4}, "holds another adapter"),
        ({"lora_alpha": R}, "holds another adapter"),
        ({"target_modules": ["experts"]}, "holds another adapter"),
        ({"target_projections": ["down"]}, "holds another adapter"),
        (None, "holds no adapter_model.safetensors"),
    ],
)
def test_another_adapter_is_no_initial_state(other, message, tmp_path):
    _, _, model = trained(tmp_path / "right")
    if other is not None:
        trained(tmp_path / "start", **other)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(
            tmp_path / "delta", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    assert_unchanged(model, before)
    assert not (tmp_path / "delta" / FILE).exists()


@pytest.mark.parametrize("r", [2, R])
def test_an_initial_file_of_an_earlier_release_is_known_by_its_ranks(r, tmp_path):
    """It does not describe its adapter, and PEFT saves the configuration there first."""
    _, _, model = trained(tmp_path / "right")
    trained(tmp_path / "start", r=r, lora_alpha=2 * r)
    file = tmp_path / "start" / FILE
    save_file(load_file(file), file, {"format": "pt"})
    before = {path.name: path.read_bytes() for path in file.parent.iterdir()}

    def save():
        model.save_pretrained(
            tmp_path / "delta", path_initial_model_for_weight_conversion=str(file.parent)
        )

    if r == R:
        save()
        assert (tmp_path / "delta" / FILE).exists()
        return
    with pytest.raises(ValueError, match="holds another adapter"):
        save()
    assert {path.name: path.read_bytes() for path in file.parent.iterdir()} == before
    assert not (tmp_path / "delta" / FILE).exists()


@pytest.mark.parametrize("change", [lambda B: {}, lambda B: {KEY: B[1:].clone()}], ids=["-", "<"])
def test_an_initial_file_without_a_whole_tensor_is_refused(change, tmp_path):
    _, _, model = trained(tmp_path / "start")
    file = tmp_path / "start" / FILE
    tensors = load_file(file)
    B = tensors.pop(KEY)
    save_file(tensors | change(B), file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"needs .*layers\.1\.mlp\.experts\.lora_B\.down of shape"):
        model.save_pretrained(
            tmp_path / "delta", path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )
    assert not (tmp_path / "delta" / FILE).exists()


def test_a_configuration_is_not_saved_over_another_adapter(tmp_path):
    _, _, model = trained(tmp_path / "right")
    trained(tmp_path / "other", lora_alpha=R)
    shutil.copytree(tmp_path / "other", tmp_path / "kept")
    # what saves the weights elsewhere asks for them first
    get_peft_model_state_dict(model)
    with pytest.raises(ValueError, match="holds another adapter"):
        model.peft_config["default"].save_pretrained(tmp_path / "other")
    for kept in (tmp_path / "kept").iterdir():
        assert kept.read_bytes() == (tmp_path / "other" / kept.name).read_bytes()
