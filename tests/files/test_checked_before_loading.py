"""What is loaded is checked whole before the model is touched: one error, the model as it was."""

import json

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import (
    KNOWS_WRAPPERS,
    SAME,
    R,
    assert_close,
    assert_share_of_order_one,
    assert_unchanged,
    fill_adapter,
    moe_lora,
    outputs,
    snapshot,
    tiny_model,
)
from peft_moe_lora import MoELoraConfig

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


# ---- other ways to load --------------------------------------------------------------------------


def prefix_is_wrong(named):
    """transformers reads keys without PEFT's prefix too."""
    return KNOWS_WRAPPERS and named == "convert_adapter"


def said_by_transformers(named):
    """Older releases do not load the head of these adapters, which is said first."""
    if KNOWS_WRAPPERS:
        return named
    return "does not load lm_head"


def test_transformers_refuses_a_damaged_file_too(fault):
    named, folder = fault
    model = tiny_model(dtype=torch.float16)
    if prefix_is_wrong(named):
        model.load_adapter(str(folder))
        return
    before = snapshot(model)
    with pytest.raises(ValueError, match=said_by_transformers(named)):
        model.load_adapter(str(folder))
    assert_unchanged(model, before)
    assert not hasattr(model, "peft_config")
    assert not model._hf_peft_config_loaded


def test_transformers_loads_the_same_with_and_without_the_prefix(good, tmp_path):
    expected = outputs(PeftModel.from_pretrained(tiny_model(), good))
    change(good, tmp_path, without_prefix(""))
    for folder in (good, tmp_path):
        model = tiny_model()
        if not KNOWS_WRAPPERS:
            with pytest.raises(ValueError, match="upgrade transformers"):
                model.load_adapter(str(folder))
            continue
        model.load_adapter(str(folder))
        assert_close(outputs(model), expected, SAME)


def test_transformers_leaves_no_name_of_a_second_adapter(fault, good):
    named, folder = fault
    model = tiny_model(dtype=torch.float16)
    model.add_adapter(MoELoraConfig(r=2, target_modules=["experts", "v_proj"]))
    if prefix_is_wrong(named):
        return
    before = snapshot(model)
    with pytest.raises(ValueError, match=said_by_transformers(named)):
        model.load_adapter(str(folder), adapter_name="second")
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]


def test_a_config_made_by_hand_changes_nothing_either(fault):
    named, folder = fault
    config = MoELoraConfig(r=R, lora_alpha=2 * R, **SETTINGS)
    model = tiny_model(dtype=torch.float16)
    before = snapshot(model)
    with pytest.raises(ValueError, match=named):
        PeftModel.from_pretrained(model, folder, config=config)
    assert_unchanged(model, before)


def test_a_config_made_by_hand_must_mean_what_the_file_means(good):
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"scaling 2, but .* scaling 8\. .*set_scale"):
        PeftModel.from_pretrained(
            model, good, config=MoELoraConfig(r=R, lora_alpha=8 * R, **SETTINGS)
        )
    assert_unchanged(model, before)
    right = MoELoraConfig(r=R, lora_alpha=2 * R, **SETTINGS)
    loaded = PeftModel.from_pretrained(tiny_model(), good, config=right)
    expected = PeftModel.from_pretrained(tiny_model(), good)
    assert_close(outputs(loaded), outputs(expected), SAME)


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_configuration_without_weights_is_refused(good, is_trainable, tmp_path):
    (tmp_path / "adapter_config.json").write_text((good / "adapter_config.json").read_text())
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"holds no {FILE}"):
        PeftModel.from_pretrained(model, tmp_path, is_trainable=is_trainable)
    with pytest.raises(ValueError, match=f"holds no {FILE}"):
        model.load_adapter(str(tmp_path))
    assert_unchanged(model, before)
    # it can still be read for a new adapter
    config = MoELoraConfig.from_pretrained(tmp_path)
    config.inference_mode = False
    assert get_peft_model(model, config).active_adapters == ["default"]


# ---- over an adapter of the same name ------------------------------------------------------------

OTHERS = {
    "lora_alpha": {"lora_alpha": 3},
    "use_rslora": {"use_rslora": True},
    "the alpha of a router": {"alpha_pattern": {"layers.1.mlp.gate": 1}},
    "the rank of a linear layer": {"rank_pattern": {"layers.0.*q_proj": 2}},
    "the rank": {"r": R + 1, "lora_alpha": 2 * R + 2},
    "other experts, as many": {"expert_indices": {"experts": [0, 2]}},
}


@pytest.mark.parametrize("why", OTHERS)
def test_another_adapter_over_an_existing_name_is_refused(why, tmp_path):
    settings = {"target_modules": ["experts", "q_proj", "gate"]}
    if "expert_indices" in OTHERS[why]:
        settings["expert_indices"] = {"experts": [1, 3]}
    moe_lora(tiny_model(), **settings | OTHERS[why]).save_pretrained(tmp_path)
    model = moe_lora(tiny_model(), **settings)
    fill_adapter(model, seed=8)
    before = snapshot(model)
    config = model.peft_config["default"].to_dict()
    with pytest.raises(ValueError, match=r"delete_adapter\('default'\)"):
        model.load_adapter(tmp_path, "default")
    assert_unchanged(model, before)
    assert model.peft_config["default"].to_dict() == config
    model.add_adapter("other", MoELoraConfig(r=R, target_modules=["experts"]))
    model.delete_adapter("default")
    model.load_adapter(tmp_path, "default")
    model.set_adapter("default")
    expected = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert_close(outputs(model), outputs(expected), SAME)


def test_the_same_adapter_loads_over_an_existing_name(tmp_path):
    """A trainer does so when it goes back to its best checkpoint."""
    settings = {
        "target_modules": ["experts", "q_proj"],
        "alpha_pattern": {"layers.1.mlp.experts": 2, "experts": 9},
    }
    model = moe_lora(tiny_model(), **settings)
    expected = outputs(model)
    model.save_pretrained(tmp_path / "first")
    fill_adapter(model, seed=8)
    assert_share_of_order_one(outputs(model), expected)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", 0.5)
    model.save_pretrained(tmp_path / "scaled")
    scaled = outputs(model)
    model.load_adapter(tmp_path / "scaled", "default")
    assert_close(outputs(model), scaled, SAME)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", 1.0)
    for _ in range(2):
        model.load_adapter(tmp_path / "first", "default")
        assert_close(outputs(model), expected, SAME)


def test_a_damaged_file_is_refused_over_an_existing_name(tmp_path):
    model = moe_lora(tiny_model(), target_modules=["experts", "q_proj", "gate"])
    model.save_pretrained(tmp_path / "good")
    fill_adapter(model, seed=8)
    for number, fault in enumerate(("experts of int8", "linear layers without prefix", "a vector")):
        folder = tmp_path / str(number)
        folder.mkdir()
        change(tmp_path / "good", folder, FAULTS[fault][1])
        before = snapshot(model)
        with pytest.raises(ValueError, match="the adapter's state dict"):
            model.load_adapter(folder, "default")
        assert_unchanged(model, before)
    config = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    (tmp_path / "good" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    with pytest.raises(ValueError, match="set_scale"):
        model.load_adapter(tmp_path / "good", "default")
    assert_unchanged(model, before)
