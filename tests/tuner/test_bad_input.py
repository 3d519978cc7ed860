"""Bad input gets one clear error that names the field and the remedy, and changes nothing."""

import copy
import json
import math
import re
import shutil
from dataclasses import fields

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import (
    E,
    Holder,
    R,
    assert_unchanged,
    experts_adapter,
    moe_lora,
    outputs,
    random_rows,
    snapshot,
    tiny_model,
    wrap,
)
from peft_moe_lora import MoELoraConfig
from peft_moe_lora.experts.families import NOT_YET
from peft_moe_lora.files.field_rules import RULES

FILE = "adapter_model.safetensors"
KEY = "base_model.model.model.layers.1.mlp.experts.lora_B.down"

# ---- the config ----------------------------------------------------------------------------------

BAD_FIELDS = [
    ("r", 0),
    ("r", -4),
    ("r", 2.5),
    ("r", "8"),
    ("lora_alpha", math.inf),
    ("lora_alpha", math.nan),
    ("lora_dropout", -0.1),
    ("lora_dropout", 1.0),
    ("lora_dropout", math.nan),
    ("rank_pattern", {"layers.0.mlp.experts": 0}),
    ("alpha_pattern", {"layers.0.mlp.experts": math.inf}),
    ("target_projections", []),
    ("target_projections", ["gate"]),
    ("target_projections", ["down", "gate_up_proj"]),
    ("backend", "cuda"),
    ("layout", "rank_major"),
    ("format_version", 3),
    ("format_version", 0),
    ("use_dora", True),
    ("lora_bias", True),
    ("target_parameters", "experts.gate_up_proj"),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "eva"),
    ("init_lora_weights", "orthogonal"),
    ("init_lora_weights", "loftq"),
    ("init_lora_weights", "no such thing"),
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS, ids=lambda v: str(v))
def test_a_field_out_of_range_raises_and_is_named(field, value):
    with pytest.raises(ValueError, match=field) as error:
        MoELoraConfig(**{"r": R, "target_modules": ["experts"], field: value})
    # the message says what came and what is allowed
    given = next(iter(value.values())) if isinstance(value, dict) else value
    assert str(given) in str(error.value)
    assert len(str(error.value)) > len(field) + len(str(given)) + 10


# older releases of PEFT lack some of them
FEATURES = [field.name for field in fields(LoraConfig) if RULES[field.name].feature]


@pytest.mark.parametrize("field", FEATURES)
def test_a_feature_that_experts_do_not_support_is_refused(field):
    for value in (True, {"any": 1}):
        with pytest.raises(ValueError, match=field):
            MoELoraConfig(r=R, target_modules=["experts"], **{field: value})


THE_ENDS = [("r", 1), ("lora_alpha", 0.5), ("lora_dropout", 0), ("lora_dropout", 0.99)]


@pytest.mark.parametrize(("field", "value"), THE_ENDS)
def test_the_ends_of_the_ranges_are_allowed(field, value):
    assert getattr(MoELoraConfig(**{field: value}), field) == value


# ---- the targets ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("why", "settings", "named"),
    [
        ("no module has the name", {"target_modules": ["expert"]}, "expert"),
        ("no module matches the pattern", {"target_modules": r".*\.no_experts"}, "no_experts"),
        ("one name of two is misspelt", {"target_modules": ["experts", "qproj"]}, "qproj"),
        (
            "no such layer",
            {"target_modules": ["experts"], "layers_to_transform": [7]},
            "layers_to_transform",
        ),
        (
            "every target is excluded",
            {"target_modules": ["experts"], "exclude_modules": ["experts"]},
            "exclude",
        ),
        ("a part of the experts", {"target_modules": ["experts", "act_fn"]}, "experts.act_fn"),
        ("experts and their parts", {"target_modules": r".*experts.*"}, "experts.act_fn"),
        ("a block is no linear layer", {"target_modules": ["experts", "self_attn"]}, "Attention"),
    ],
)
def test_a_target_that_cannot_be_adapted_raises_and_changes_nothing(why, settings, named):
    model = tiny_model()
    before, expected = snapshot(model), outputs(model)
    with pytest.raises(ValueError, match=named):
        get_peft_model(model, MoELoraConfig(r=R, **settings))
    assert_unchanged(model, before)
    assert torch.equal(outputs(model), expected)
    # the model is unharmed: the right target still works
    assert experts_adapter(moe_lora(model), "model.layers.1.mlp.experts").keys() == {
        "gate_up",
        "down",
    }


def dense_model():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )


@pytest.mark.parametrize("target_modules", [None, ["experts"]])
@pytest.mark.parametrize(
    "build", [dense_model, lambda: nn.Sequential(nn.Linear(3, 3))], ids=["llama", "bare"]
)
def test_a_model_without_experts_raises(build, target_modules):
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match="experts"):
        get_peft_model(model, MoELoraConfig(r=R, target_modules=target_modules))
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", NOT_YET)
def test_experts_of_another_contract_raise_by_name(name):
    """These store their weights differently: an adapter would be silently wrong."""
    module = type(name, (nn.Module,), {})()
    module.gate_up_proj = nn.Parameter(torch.randn(E, 8, 16))
    model = Holder(module)
    before = snapshot(model)
    with pytest.raises(ValueError, match=name):
        get_peft_model(model, MoELoraConfig(r=R, target_modules=["experts"]))
    assert_unchanged(model, before)


def test_a_bad_second_adapter_leaves_the_first_alone():
    model = moe_lora(tiny_model())
    before, expected = snapshot(model), outputs(model)
    for settings in (
        {"target_modules": ["expert"]},
        {"target_modules": ["q_proj", "experts", "self_attn"]},
    ):
        with pytest.raises(ValueError, match=r"expert|Attention"):
            model.add_adapter("second", MoELoraConfig(r=2, **settings))
        assert_unchanged(model, before)
        assert list(model.peft_config) == ["default"]
        assert model.active_adapters == ["default"]
        assert torch.equal(outputs(model), expected)


# ---- the adapter file ----------------------------------------------------------------------------


def rewrite(directory, change_tensors=None, change_document=None, change_config=None):
    """Change the tensors, the metadata document or the config of the adapter in `directory`."""
    tensors = load_file(directory / FILE)
    with safe_open(directory / FILE, framework="pt") as file:
        metadata = dict(file.metadata())
    if change_tensors:
        tensors = change_tensors(tensors)
    if change_document:
        document = json.loads(metadata["peft_moe_lora"])
        change_document(document)
        metadata["peft_moe_lora"] = json.dumps(document)
    save_file(tensors, directory / FILE, metadata=metadata)
    if change_config:
        path = directory / "adapter_config.json"
        config = json.loads(path.read_text())
        change_config(config)
        path.write_text(json.dumps(config))


def missing(directory):
    rewrite(directory, lambda t: {k: v for k, v in t.items() if k != KEY})


def extra_tensor(directory):
    rewrite(directory, lambda t: {**t, KEY.replace("layers.1", "layers.2"): t[KEY].clone()})


def extra_projection(directory):
    rewrite(directory, lambda t: {**t, KEY.replace("down", "up"): t[KEY].clone()})


def transposed(directory):
    rewrite(directory, lambda t: {**t, KEY: t[KEY].T.contiguous()})


def other_rank(directory):
    rewrite(directory, lambda t: {**t, KEY: t[KEY][:, :-E].contiguous()})


def not_a_number(directory):
    def change(tensors):
        tensors[KEY][3] = math.nan
        return tensors

    rewrite(directory, change)


def infinite(directory):
    def change(tensors):
        tensors[KEY][-1, -1] = -math.inf
        return tensors

    rewrite(directory, change)


def unknown_layout(directory):
    rewrite(directory, change_document=lambda d: d.update(layout="rank_major"))


def unknown_layout_in_config(directory):
    rewrite(directory, change_config=lambda c: c.update(layout="rank_major"))


def newer_version(directory):
    rewrite(directory, change_document=lambda d: d.update(format_version=3))


def newer_version_in_config(directory):
    rewrite(directory, change_config=lambda c: c.update(format_version=3))


def another_expert_count(directory):
    moe_lora(tiny_model(num_experts=E + 1)).save_pretrained(directory)


def another_expert_count_of_the_same_shape(directory):
    """E + 1 experts of rank E in a config that says rank E + 1: the shapes fit E experts too."""
    moe_lora(tiny_model(num_experts=E + 1), r=E).save_pretrained(directory)
    rewrite(directory, change_config=lambda c: c.update(r=E + 1))


def truncated(directory):
    path = directory / FILE
    path.write_bytes(path.read_bytes()[:-100])


def truncated_header(directory):
    path = directory / FILE
    path.write_bytes(path.read_bytes()[:40])


def empty(directory):
    (directory / FILE).write_bytes(b"")


def pickled(directory):
    torch.save(load_file(directory / FILE), directory / "adapter_model.bin")
    (directory / FILE).unlink()


def text(directory):
    (directory / FILE).write_text("version https://git-lfs.github.com/spec/v1\n")


# what is wrong with the file -> what the error names
FAULTS = {
    missing: r"layers\.1\.mlp\.experts\.lora_B\.down",
    extra_tensor: r"layers\.2\.mlp\.experts\.lora_B\.down",
    extra_projection: r"layers\.1\.mlp\.experts\.lora_B\.up",
    transposed: r"layers\.1\.mlp\.experts\.lora_B\.down|layers\.1\.mlp\.experts",
    other_rank: r"layers\.1\.mlp\.experts\.lora_B\.down|layers\.1\.mlp\.experts",
    not_a_number: r"layers\.1\.mlp\.experts\.lora_B\.down",
    infinite: r"layers\.1\.mlp\.experts\.lora_B\.down",
    unknown_layout: r"layout.*rank_major",
    unknown_layout_in_config: r"layout.*rank_major",
    newer_version: r"version.*2",
    newer_version_in_config: r"version.*2",
    another_expert_count: r"experts",
    another_expert_count_of_the_same_shape: r"experts",
    truncated: FILE,
    truncated_header: FILE,
    empty: FILE,
    pickled: "safetensors",
    text: FILE,
}
every_fault = pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)


@pytest.fixture(scope="module")
def good_adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good")
    tiny_model().save_pretrained(directory / "base")
    base = type(tiny_model()).from_pretrained(directory / "base")
    moe_lora(base).save_pretrained(directory / "adapter")
    return directory / "adapter"


@pytest.fixture
def broken(fault, good_adapter, tmp_path):
    directory = tmp_path / "adapter"
    shutil.copytree(good_adapter, directory)
    fault(directory)
    return directory


def test_the_unbroken_file_loads(good_adapter):
    """If this file did not load, the tests below would prove nothing."""
    assert PeftModel.from_pretrained(tiny_model(), good_adapter).active_adapters == ["default"]


@every_fault
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_from_pretrained_raises_before_anything_changes(fault, broken, low_cpu_mem_usage):
    model = tiny_model()
    before, expected = snapshot(model), outputs(model)
    with pytest.raises(ValueError, match=FAULTS[fault]):
        PeftModel.from_pretrained(model, broken, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_unchanged(model, before)
    assert torch.equal(outputs(model), expected)


@every_fault
def test_load_adapter_raises_before_anything_changes(fault, broken):
    model = moe_lora(tiny_model())
    before, expected = snapshot(model), outputs(model)
    with pytest.raises(ValueError, match=FAULTS[fault]):
        model.load_adapter(broken, "second")
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert torch.equal(outputs(model), expected)


# ---- an adapter of experts, linear layers and a saved head ---------------------------------------

LINEAR = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight"
HEAD = "base_model.model.lm_head.weight"
MIXED_FAULTS = {
    "a linear layer's B is missing": (LINEAR, lambda t: t.pop(LINEAR)),
    "a linear layer's B has another rank": (
        LINEAR,
        lambda t: t.update({LINEAR: t[LINEAR][:, 1:].contiguous()}),
    ),
    "a linear layer's B is not finite": (LINEAR, lambda t: t[LINEAR].fill_(math.nan)),
    "a linear layer nobody targets": (
        "k_proj",
        lambda t: t.update({LINEAR.replace("q_proj", "k_proj"): t[LINEAR].clone()}),
    ),
    "the saved head is missing": ("lm_head", lambda t: t.pop(HEAD)),
    "the saved head has another vocabulary": (
        "lm_head",
        lambda t: t.update({HEAD: t[HEAD][1:].contiguous()}),
    ),
    "an expert's tensor is missing": (KEY, lambda t: t.pop(KEY)),
    "an experts module nobody has": (
        "layers.2",
        lambda t: t.update({KEY.replace("layers.1", "layers.2"): t[KEY].clone()}),
    ),
}


@pytest.mark.parametrize("why", MIXED_FAULTS)
def test_a_fault_beside_the_experts_raises_too(why, tmp_path):
    named, change = MIXED_FAULTS[why]
    moe_lora(
        tiny_model(), target_modules=["experts", "q_proj"], modules_to_save=["lm_head"]
    ).save_pretrained(tmp_path)

    def changed(tensors):
        change(tensors)
        return tensors

    assert PeftModel.from_pretrained(tiny_model(), tmp_path).active_adapters == ["default"]
    rewrite(tmp_path, changed)
    model = tiny_model()
    before, expected = snapshot(model), outputs(model)
    with pytest.raises(ValueError, match=re.escape(named)):
        PeftModel.from_pretrained(model, tmp_path)
    assert_unchanged(model, before)
    assert torch.equal(outputs(model), expected)


def test_a_config_read_and_changed_does_not_skip_the_checks(broken_late):
    """Users change a field of the config before loading; the file is as bad as before."""
    model = tiny_model()
    before, expected = snapshot(model), outputs(model)
    config = MoELoraConfig.from_pretrained(broken_late)
    config.backend = "torch"
    with pytest.raises(ValueError, match="misses"):
        PeftModel.from_pretrained(model, broken_late, config=config)
    assert_unchanged(model, before)
    assert torch.equal(outputs(model), expected)


@pytest.fixture
def broken_late(good_adapter, tmp_path):
    """An adapter with good values, some of which are missing."""
    folder = tmp_path / "late"
    shutil.copytree(good_adapter, folder)
    rewrite(folder, lambda tensors: {k: t for k, t in tensors.items() if k != KEY})
    return folder


@pytest.mark.parametrize(
    "fault", [missing, transposed, not_a_number, another_expert_count], ids=lambda f: f.__name__
)
def test_a_config_made_by_hand_does_not_skip_the_checks(fault, broken):
    """Such a config knows no file; the file is still refused before anything changes."""
    config = MoELoraConfig(r=R, lora_alpha=2 * R, target_modules=["experts"], inference_mode=True)
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=FAULTS[fault]):
        PeftModel.from_pretrained(model, broken, config=config)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "fault", [missing, not_a_number, truncated, pickled, newer_version], ids=lambda f: f.__name__
)
def test_auto_peft_model_raises(fault, broken):
    with pytest.raises(ValueError, match=FAULTS[fault]):
        AutoPeftModelForCausalLM.from_pretrained(broken)


@every_fault
def test_transformers_load_adapter_raises_before_anything_changes(fault, broken):
    model = tiny_model()
    before, expected = snapshot(model), outputs(model)
    with pytest.raises(ValueError, match=FAULTS[fault]):
        model.load_adapter(str(broken))
    assert_unchanged(model, before)
    assert torch.equal(outputs(model), expected)


def test_no_file_at_all_raises(tmp_path):
    moe_lora(tiny_model()).save_pretrained(tmp_path)
    (tmp_path / FILE).unlink()
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=tmp_path.name):
        PeftModel.from_pretrained(model, str(tmp_path))
    assert_unchanged(model, before)


def test_an_adapter_of_another_family_raises(good_adapter):
    model = tiny_model("nemotron_h")
    before, expected = snapshot(model), outputs(model)
    with pytest.raises(ValueError, match="experts"):
        PeftModel.from_pretrained(model, good_adapter)
    assert_unchanged(model, before)
    assert torch.equal(outputs(model), expected)


# ---- calls ---------------------------------------------------------------------------------------


def test_safe_merge_of_a_broken_adapter_raises_and_changes_nothing():
    model = moe_lora(tiny_model())
    with torch.no_grad():
        experts_adapter(model, "model.layers.1.mlp.experts")["down"][1][0, 0] = math.nan
    base = model.base_model.model.model
    before = {n: p.clone() for n, p in base.named_parameters() if ".lora_" not in n}
    with pytest.raises(ValueError, match="default"):
        model.merge_adapter(safe_merge=True)
    broken = base.layers[1].mlp.experts
    for name, parameter in broken.base_layer.named_parameters():
        assert torch.equal(parameter, before[f"layers.1.mlp.experts.base_layer.{name}"]), name


def test_the_triton_backend_on_a_cpu_raises_and_says_so():
    model = wrap(copy.deepcopy(tiny_model().model.layers[0].mlp.experts), backend="triton")
    with pytest.raises((ValueError, RuntimeError), match="triton"):
        model(*random_rows())
