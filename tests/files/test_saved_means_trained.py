"""A saved adapter means what was trained: patterns in any order, ranks and scalings in metadata."""

import copy
import json
import math

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import (
    FP32,
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
from peft_moe_lora import MoELoraConfig, convert_adapter
from peft_moe_lora.convert.reading import open_adapter

FILE = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
EVERY_KIND = ["experts", "gate", "q_proj"]

# the first entry of each is the more specific one, and sorts after the second
ORDERED = {
    "alpha of experts": {"alpha_pattern": {"layers.1.mlp.experts": 2, "experts": 3 * R}},
    "rank of experts": {"rank_pattern": {"layers.1.mlp.experts": 2, "experts": 3}},
    "rank of a linear layer": {"rank_pattern": {"layers.1.self_attn.q_proj": 2, ".*q_proj": 3}},
    "alpha of a router": {"alpha_pattern": {r"model\.layers\.1\.mlp\.gate": 1, "gate": 3 * R}},
    "alpha of everything": {
        "alpha_pattern": {"layers.1.mlp.experts": 2, "layers.0.mlp.gate": 3, ".*": 3 * R},
        "use_rslora": True,
    },
    "chosen experts": {"expert_indices": {"layers.1.mlp.experts": [2], "experts": [0, 1, 3]}},
    "chosen experts, equal": {"expert_indices": {"layers.1.mlp.experts": [2], "experts": [2]}},
    "a layer without experts": {
        "expert_indices": {"layers.1.mlp.experts": [], "experts": [0, 1, 3]}
    },
}
TARGETS = {
    "list": EVERY_KIND,
    "regular expression": r".*\.(experts|gate|q_proj)",
}


@pytest.fixture(params=ORDERED)
def ordered(request):
    return copy.deepcopy(ORDERED[request.param])


def lora_layers(model, adapter_name="default"):
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.scaling:
            yield name, module


def scalings(model, adapter_name="default"):
    """{path: (r, scaling)} of every LoRA layer."""
    return {
        name.removeprefix("base_model.model."): (m.r[adapter_name], m.scaling[adapter_name])
        for name, m in lora_layers(model, adapter_name)
    }


def read_by_conversion(folder, base):
    adapter = open_adapter(folder, base.config.to_dict())
    found = {path: (pair.r, pair.scaling) for path, pair in adapter.linears.items()}
    for path, pairs in adapter.experts.items():
        (found[path],) = {(pair.r, pair.scaling) for pair in pairs.values()}
    return found


def document_of(folder):
    with safe_open(folder / FILE, framework="pt") as file:
        return json.loads(file.metadata()["peft_moe_lora"])


def with_document(folder, document):
    metadata = {"format": "pt", "peft_moe_lora": json.dumps(document)}
    save_file(load_file(folder / FILE), folder / FILE, metadata)


def with_config(folder, **changes):
    path = folder / CONFIG
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config, sort_keys=True))


# ---- the order of patterns -----------------------------------------------------------------------


@pytest.mark.parametrize("targets", TARGETS)
def test_patterns_mean_the_same_in_any_order(ordered, targets, tmp_path):
    base = tiny_model()
    settings = {"lora_alpha": 2 * R, "target_modules": TARGETS[targets], **ordered}
    model = moe_lora(copy.deepcopy(base), **settings)
    assert_share_of_order_one(outputs(model), outputs(base))
    before = copy.deepcopy(model.peft_config["default"].to_dict())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert scalings(loaded) == scalings(model)
    assert_close(outputs(loaded), outputs(model), SAME)
    assert read_by_conversion(tmp_path, base) == scalings(model)
    # the configuration in memory keeps the patterns of the user
    after = model.peft_config["default"].to_dict()
    for name in ("rank_pattern", "alpha_pattern", "expert_indices"):
        assert list((after[name] or {}).items()) == list((before[name] or {}).items())


def test_a_pattern_whose_order_does_not_count_is_saved_as_it_is(tmp_path):
    pattern = {"layers.1.mlp.experts": 3, "q_proj": 5, "layers.0.mlp.gate": 2}
    moe_lora(tiny_model(), target_modules=EVERY_KIND, rank_pattern=pattern).save_pretrained(
        tmp_path
    )
    assert json.loads((tmp_path / CONFIG).read_text())["rank_pattern"] == pattern


def test_every_adapter_has_its_own_patterns(tmp_path):
    base = tiny_model()
    model = moe_lora(copy.deepcopy(base), alpha_pattern={"layers.1.mlp.experts": 2, "experts": 9})
    pattern = {"layers.0.mlp.experts": 2, "experts": 9}
    model.add_adapter("second", MoELoraConfig(r=R, target_modules=None, alpha_pattern=pattern))
    fill_adapter(model, "second", seed=7)
    model.save_pretrained(tmp_path)
    for name, folder in {"default": tmp_path, "second": tmp_path / "second"}.items():
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
        assert scalings(loaded) == scalings(model, name)
        assert_close(outputs(loaded), outputs(model), SAME)


def test_transformers_saves_patterns_in_any_order_too(tmp_path):
    model = tiny_model()
    pattern = {"layers.1.mlp.experts": 2, "experts": 3 * R}
    model.add_adapter(MoELoraConfig(r=R, target_modules=EVERY_KIND, alpha_pattern=pattern))
    fill_adapter(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert scalings(loaded) == scalings(model)
    assert_close(outputs(loaded), outputs(model), SAME)
    again = tiny_model()
    again.load_adapter(str(tmp_path))
    assert_close(outputs(again), outputs(model), SAME)


def test_paths_that_end_in_another_path_stay_apart(tmp_path):
    """PEFT matches the end of a path, so the path of one module can match another one too."""

    def holder():
        inner = torch.nn.ModuleDict({"q": torch.nn.Linear(8, 8), "k": torch.nn.Linear(8, 8)})
        outer = torch.nn.ModuleDict({"inner": inner, "q": torch.nn.Linear(8, 8)})
        return torch.nn.ModuleDict({"outer": outer, "inner": copy.deepcopy(inner)})

    alphas = {"^inner.q": 1, "outer.inner.q": 2, "outer.q": 3, "q": 4, "k": 5}
    config = MoELoraConfig(r=2, target_modules=["q", "k"], alpha_pattern=alphas)
    model = get_peft_model(holder(), config)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(holder(), tmp_path)
    assert scalings(loaded) == scalings(model)
    assert {scaling for _, scaling in scalings(model).values()} == {0.5, 1.0, 1.5, 2.5}


def test_a_configuration_alone_keeps_the_order_of_its_patterns(ordered, tmp_path):
    MoELoraConfig(target_modules=EVERY_KIND, **ordered).save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    for name, pattern in ordered.items():
        assert getattr(loaded, name) == pattern
        if isinstance(pattern, dict):
            assert list(getattr(loaded, name)) == list(pattern)


# ---- rank and scaling ----------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    model = moe_lora(tiny_model(), target_modules=EVERY_KIND, alpha_pattern={"gate": R})
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_metadata_say_rank_and_scaling_of_each_projection(saved):
    _, folder = saved
    trained = document_of(folder)["trained"]
    assert len(trained) == 8
    for layer, numbers in trained.items():
        scaling = 1.0 if layer.endswith("gate") else 2.0
        assert numbers == {"r": R, "scaling": scaling}, layer
    assert "model.layers.1.mlp.experts.down" in trained


EDITS = {
    "lora_alpha": {"lora_alpha": 4 * R},
    "use_rslora": {"use_rslora": True},
    "the alpha of routers": {"alpha_pattern": {"gate": 2 * R}},
    "the alpha of a linear layer": {"alpha_pattern": {"gate": R, "layers.1.*q_proj": R}},
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_configuration_of_another_scaling_is_refused(saved, edit, tmp_path_factory):
    _, folder = saved
    with_config(folder, **EDITS[edit])
    base = tiny_model()
    before = snapshot(base)
    with pytest.raises(ValueError, match=r"saved with rank 4 and scaling [12].*set_scale"):
        PeftModel.from_pretrained(base, folder)
    assert_unchanged(base, before)
    with pytest.raises(ValueError, match="set_scale"):
        convert_adapter(
            folder, tmp_path_factory.mktemp("to") / "peft", to="peft", base_config=base.config
        )


def test_a_rank_that_only_the_metadata_tell_apart_is_refused(saved):
    """Half the experts of twice the rank have tensors of the same shapes."""
    _, folder = saved
    document = document_of(folder)
    document["trained"]["model.layers.0.mlp.experts.down"]["r"] = 2 * R
    with_document(folder, document)
    with pytest.raises(ValueError, match=f"rank {2 * R} .* rank {R} "):
        PeftModel.from_pretrained(tiny_model(), folder)


def test_files_of_earlier_releases_load(saved):
    model, folder = saved
    document = document_of(folder)
    del document["trained"]
    with_document(folder, document)
    loaded = PeftModel.from_pretrained(tiny_model(), folder)
    assert_close(outputs(loaded), outputs(model), SAME)
    assert read_by_conversion(folder, tiny_model()) == scalings(model)


def test_what_a_conversion_writes_says_its_scalings(saved, tmp_path_factory):
    _, folder = saved
    to = tmp_path_factory.mktemp("to") / "ours"
    convert_adapter(folder, to, to="moe_lora", base_config=tiny_model().config)
    assert document_of(to)["trained"] == document_of(folder)["trained"]
    with_config(to, lora_alpha=R)
    with pytest.raises(ValueError, match="set_scale"):
        PeftModel.from_pretrained(tiny_model(), to)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_changed_scale_is_saved(use_rslora, tmp_path, caplog):
    """The file gives the numbers that the model gave when it was saved."""
    model = moe_lora(tiny_model(), target_modules=EVERY_KIND, use_rslora=use_rslora)
    as_trained = outputs(model)
    for path, layer in lora_layers(model):
        layer.set_scale("default", 0.3 if "layers.1" in path else 0.5)
    assert_share_of_order_one(outputs(model), as_trained, low=0.1)
    model.save_pretrained(tmp_path)
    assert "its current scaling" in caplog.text
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert_close(outputs(loaded), outputs(model), FP32)
    assert model.peft_config["default"].lora_alpha == 2 * R


def test_a_configuration_changed_after_the_adapter_was_made_does_not_count(tmp_path):
    model = moe_lora(tiny_model(), target_modules=EVERY_KIND)
    model.peft_config["default"].lora_alpha = 64
    model.peft_config["default"].rank_pattern = {"experts": 2}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert_close(outputs(loaded), outputs(model), SAME)


BAD_TRAINED = {
    "no object": 5,
    "no numbers": {"model.layers.0.mlp.experts.down": 2.0},
    "no rank": {"model.layers.0.mlp.experts.down": {"scaling": 2.0}},
    "text": {"model.layers.0.mlp.experts.down": {"r": R, "scaling": "2"}},
    "not finite": {"model.layers.0.mlp.experts.down": {"r": R, "scaling": math.nan}},
}


@pytest.mark.parametrize("fault", BAD_TRAINED)
def test_damaged_entries_are_refused(saved, fault):
    _, folder = saved
    with_document(folder, {**document_of(folder), "trained": BAD_TRAINED[fault]})
    with pytest.raises(ValueError, match="trained"):
        PeftModel.from_pretrained(tiny_model(), folder)
    with pytest.raises(ValueError, match="trained"):
        open_adapter(folder, tiny_model().config)
