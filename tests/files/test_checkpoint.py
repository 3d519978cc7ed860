"""What is written to disk, who can read it, and that the same numbers come back."""

import copy
import json
import os

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import safe_open
from safetensors.torch import load_file

from helpers import (
    QWEN3_MOE,
    SAME,
    E,
    H,
    Holder,
    I,
    R,
    adapter_parameters,
    assert_close,
    assert_share_of_order_one,
    base_weight,
    build_experts,
    causal_families,
    dense_delta,
    experts_paths,
    fill_adapter,
    moe_lora,
    outputs,
    tiny_families,
    tiny_model,
    wrap,
)
from peft_moe_lora import MoELoraConfig

FILE = "adapter_model.safetensors"


def metadata(directory):
    with safe_open(directory / FILE, framework="pt") as file:
        return file.metadata()


def document(directory):
    return json.loads(metadata(directory)["peft_moe_lora"])


@pytest.fixture
def saved(tmp_path):
    """A tiny Qwen3-MoE with a random adapter, the adapter saved: (plain base, model, directory)."""
    base = tiny_model()
    model = moe_lora(copy.deepcopy(base))
    model.save_pretrained(tmp_path / "adapter")
    return base, model, tmp_path / "adapter"


# ---- what is in the file -------------------------------------------------------------------------


def test_file_keys_and_shapes_are_the_documented_ones(saved):
    _, _, directory = saved
    experts = "base_model.model.model.layers.{}.mlp.experts.lora_{}.{}"
    assert {name: tuple(tensor.shape) for name, tensor in load_file(directory / FILE).items()} == {
        experts.format(layer, matrix, projection): shape
        for layer in (0, 1)
        for matrix, projection, shape in (
            ("A", "gate_up", (R * E, H)),
            ("B", "gate_up", (2 * I, R * E)),
            ("A", "down", (R * E, I)),
            ("B", "down", (H, R * E)),
        )
    }


def test_file_holds_the_very_parameters(saved):
    _, model, directory = saved
    tensors = load_file(directory / FILE)
    parameters = adapter_parameters(model)
    assert len(tensors) == len(parameters)
    for name, parameter in parameters.items():
        assert torch.equal(tensors[name.replace(".default", "")], parameter), name


def test_metadata_says_layout_and_sizes(saved):
    base, _, directory = saved
    assert metadata(directory)["format"] == "pt"
    sizes = {
        "num_experts": E,
        "gate_up": {"r": R, "in_features": H, "out_features": 2 * I},
        "down": {"r": R, "in_features": I, "out_features": H},
    }
    assert document(directory)["format_version"] == 1
    assert document(directory)["layout"] == "expert_major"
    modules = document(directory)["experts"]
    assert list(modules.values()) == [sizes, sizes]
    for path, name in zip(experts_paths(base), sorted(modules), strict=True):
        assert name.endswith(path)


def test_metadata_has_each_modules_own_rank(tmp_path):
    model = moe_lora(
        tiny_model(), target_projections=["down"], rank_pattern={"layers.1.mlp.experts": 3}
    )
    model.save_pretrained(tmp_path)
    first, second = (
        document(tmp_path)["experts"][name] for name in sorted(document(tmp_path)["experts"])
    )
    assert first == {"num_experts": E, "down": {"r": R, "in_features": I, "out_features": H}}
    assert second == {"num_experts": E, "down": {"r": 3, "in_features": I, "out_features": H}}


def test_config_file_says_layout_and_version(saved):
    _, _, directory = saved
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["peft_type"] == "MOE_LORA"
    assert config["layout"] == "expert_major"
    assert config["format_version"] == 1


def test_config_comes_back_as_it_was(tmp_path):
    config = MoELoraConfig(
        r=3,
        lora_alpha=7,
        target_modules=["experts"],
        target_projections=["down"],
        backend="torch",
        recompute=True,
        lora_dropout=0.25,
        use_rslora=True,
        rank_pattern={"layers.1.mlp.experts": 2},
        alpha_pattern={"layers.1.mlp.experts": 5},
        layers_to_transform=[0, 1],
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is MoELoraConfig
    assert loaded.to_dict() == config.to_dict()


def test_only_safetensors_are_written(saved):
    _, _, directory = saved
    assert {p.name for p in directory.iterdir()} == {FILE, "adapter_config.json", "README.md"}


@pytest.mark.parametrize("family", tiny_families())
def test_file_alone_gives_the_merged_weights(family, tmp_path):
    """A reader that knows only the documented layout gets the merged weights."""
    base = tiny_model(family)
    model = moe_lora(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    tensors, sizes = load_file(tmp_path / FILE), document(tmp_path)["experts"]
    scaling = json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] / R
    merged = model.merge_and_unload()
    for path in experts_paths(base):
        num_experts = next(size for name, size in sizes.items() if name.endswith(path))[
            "num_experts"
        ]
        for projection in ("gate_up", "down"):
            lora_A, lora_B = (
                tensors[f"base_model.model.{path}.lora_{m}.{projection}"] for m in "AB"
            )
            before, after = (base_weight(m.get_submodule(path), projection) for m in (base, merged))
            delta = dense_delta(lora_A, lora_B, num_experts, scaling)
            assert_share_of_order_one(before + delta, before)
            assert_close(after, before + delta, 1e-6, f"{path}.{projection}")


def test_adapter_of_a_bf16_model_is_saved_in_fp32(tmp_path):
    moe_lora(tiny_model(dtype=torch.bfloat16)).save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / FILE).values()} == {torch.float32}


def test_linear_layers_and_modules_to_save_are_in_the_same_file(tmp_path):
    base = tiny_model()
    model = moe_lora(
        copy.deepcopy(base), target_modules=["experts", "q_proj"], modules_to_save=["lm_head"]
    )
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / FILE).keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys
    assert "base_model.model.model.layers.0.mlp.experts.lora_B.down" in keys
    assert "base_model.model.lm_head.weight" in keys
    assert_close(outputs(PeftModel.from_pretrained(base, tmp_path)), outputs(model), SAME)


@pytest.mark.parametrize("adapter_name", ["down", "gate_up", "experts", "mlp", "2"])
def test_any_name_of_an_adapter_survives_its_file(adapter_name, tmp_path):
    """Keys are the parameters' names without the adapter's name, which may occur in them too."""
    base = tiny_model()
    model = moe_lora(copy.deepcopy(base), adapter_name=adapter_name)
    assert_share_of_order_one(outputs(model), outputs(base))
    model.save_pretrained(tmp_path)
    assert "base_model.model.model.layers.0.mlp.experts.lora_A.gate_up" in load_file(
        tmp_path / adapter_name / FILE
    )
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / adapter_name)
    assert_close(outputs(loaded), outputs(model), SAME)
    loaded = PeftModel.from_pretrained(base, tmp_path / adapter_name, adapter_name=adapter_name)
    assert_close(outputs(loaded), outputs(model), SAME)


@pytest.mark.parametrize(
    "target_modules", ["all-linear", ["experts", "q_proj"], r".*\.(experts|o_proj)", None]
)
def test_every_way_to_name_targets_survives_the_file(target_modules, tmp_path):
    base = tiny_model()
    model = moe_lora(copy.deepcopy(base), target_modules=target_modules)
    assert not torch.equal(outputs(model), outputs(base))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert_close(outputs(loaded), outputs(model), SAME)


# ---- who reads it --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny_families())
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_from_pretrained_gives_the_saved_model(family, low_cpu_mem_usage, tmp_path):
    base = tiny_model(family)
    plain = outputs(base)
    model = moe_lora(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not any(p.is_meta for p in loaded.parameters())
    assert_share_of_order_one(outputs(loaded), plain)
    assert_close(outputs(loaded), outputs(model), SAME)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_from_pretrained_to_train_on(saved):
    base, model, directory = saved
    loaded = PeftModel.from_pretrained(base, directory, is_trainable=True)
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == set(
        adapter_parameters(model)
    )


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_load_adapter_beside_another(saved, low_cpu_mem_usage):
    base, model, directory = saved
    other = moe_lora(base)
    fill_adapter(other, seed=9)
    own = outputs(other)
    other.load_adapter(directory, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(outputs(other), own)
    other.set_adapter("second")
    assert_close(outputs(other), outputs(model), SAME)
    assert_share_of_order_one(outputs(other), own)


@pytest.mark.parametrize("family", tiny_families())
def test_transformers_load_adapter_gives_the_saved_model(family, tmp_path):
    base = tiny_model(family)
    plain = outputs(base)
    model = moe_lora(copy.deepcopy(base))
    model.save_pretrained(tmp_path)
    base.load_adapter(str(tmp_path))
    assert_share_of_order_one(outputs(base), plain)
    assert_close(outputs(base), outputs(model), SAME)
    base.disable_adapters()
    assert_close(outputs(base), plain, 1e-5)
    base.enable_adapters()
    assert_close(outputs(base), outputs(model), SAME)


@pytest.mark.parametrize("family", causal_families())
def test_auto_peft_model_gives_the_saved_model(family, tmp_path):
    tiny_model(family).save_pretrained(tmp_path / "base")
    base = type(tiny_model(family)).from_pretrained(tmp_path / "base").eval()
    plain = outputs(base)
    model = moe_lora(base)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert type(loaded.peft_config["default"]) is MoELoraConfig
    assert_share_of_order_one(outputs(loaded), plain)
    assert_close(outputs(loaded), outputs(model), SAME)


@pytest.mark.parametrize("family", tiny_families())
def test_transformers_add_adapter_and_save_pretrained(family, tmp_path):
    """Without a PeftModel the file is the same, and both ways read it."""
    base = tiny_model(family)
    plain = outputs(base)
    base.add_adapter(MoELoraConfig(r=R, lora_alpha=2 * R, target_modules=["experts"]))
    fill_adapter(base)
    assert_share_of_order_one(outputs(base), plain)
    base.save_pretrained(tmp_path)
    assert all(key.startswith("base_model.model.") for key in load_file(tmp_path / FILE))
    assert_close(
        outputs(PeftModel.from_pretrained(tiny_model(family), tmp_path)), outputs(base), SAME
    )
    again = tiny_model(family)
    again.load_adapter(str(tmp_path))
    assert_close(outputs(again), outputs(base), SAME)


def test_an_adapter_loads_from_a_subfolder(saved):
    base, model, directory = saved
    loaded = PeftModel.from_pretrained(base, directory.parent, subfolder=directory.name)
    assert_close(outputs(loaded), outputs(model), SAME)


def test_bf16_adapter_keeps_its_dtype_or_is_widened(tmp_path):
    base = tiny_model(dtype=torch.bfloat16)
    config = MoELoraConfig(r=R, lora_alpha=2 * R, target_modules=["experts"])
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    fill_adapter(model)
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / FILE).values()} == {torch.bfloat16}
    for autocast, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        loaded = PeftModel.from_pretrained(
            copy.deepcopy(base), tmp_path, autocast_adapter_dtype=autocast
        )
        parameters = adapter_parameters(loaded)
        assert {p.dtype for p in parameters.values()} == {dtype}
        for name, parameter in adapter_parameters(model).items():
            assert torch.equal(parameters[name].float(), parameter.float()), name


def test_each_adapter_is_saved_under_its_name(tmp_path):
    base = tiny_model()
    model = moe_lora(copy.deepcopy(base))
    model.add_adapter("second", MoELoraConfig(r=2, lora_alpha=4, target_modules=["experts"]))
    fill_adapter(model, "second", seed=7)
    model.save_pretrained(tmp_path)
    for name, directory in {"default": tmp_path, "second": tmp_path / "second"}.items():
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), directory)
        assert_close(outputs(loaded), outputs(model), SAME)


def test_state_dict_round_trip(saved):
    base, model, directory = saved
    state = get_peft_model_state_dict(model)
    assert state.keys() == load_file(directory / FILE).keys()
    fresh = moe_lora(base, randomize=False)
    result = set_peft_model_state_dict(fresh, state)
    assert not result.unexpected_keys
    assert_close(outputs(fresh), outputs(model), SAME)


def test_saving_a_merged_adapter_saves_the_adapter(saved, tmp_path):
    base, model, _ = saved
    expected = outputs(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path / "again")
    assert_close(outputs(PeftModel.from_pretrained(base, tmp_path / "again")), expected, SAME)


def test_merged_model_loads_as_a_plain_one(saved, tmp_path):
    base, model, _ = saved
    expected = outputs(model)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    loaded = type(base).from_pretrained(tmp_path / "merged").eval()
    assert_close(outputs(loaded), expected)


def test_a_bare_module_needs_no_config_of_transformers(tmp_path):
    experts = build_experts(*QWEN3_MOE)
    model = wrap(copy.deepcopy(experts))
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / FILE)) == {
        f"base_model.model.experts.lora_{m}.{p}" for m in "AB" for p in ("gate_up", "down")
    }
    assert PeftModel.from_pretrained(Holder(experts), tmp_path).peft_config["default"].r == R


def test_pickled_file_is_refused_on_save(tmp_path):
    model = moe_lora(tiny_model())
    with pytest.raises(ValueError, match="safe"):
        model.save_pretrained(tmp_path / "adapter", safe_serialization=False)
    assert not list(tmp_path.rglob("*.bin"))


def test_training_further_from_a_file_starts_where_it_ended(saved, tmp_path):
    base, model, directory = saved
    loaded = PeftModel.from_pretrained(base, directory, is_trainable=True)
    outputs(loaded).square().mean().backward()
    with torch.no_grad():
        for parameter in adapter_parameters(loaded).values():
            assert parameter.grad.abs().max() > 0
            parameter -= 0.1 * parameter.grad
    loaded.save_pretrained(tmp_path / "later")
    again = PeftModel.from_pretrained(tiny_model(), tmp_path / "later")
    assert_close(outputs(again), outputs(loaded.eval()), SAME)
    assert not torch.equal(outputs(again), outputs(model))


@pytest.mark.parametrize("kind", ["folder", "named pipe", "link that leads to no file"])
def test_weights_that_are_not_a_file_are_refused_by_name(saved, kind):
    """Opening a named pipe would wait for ever."""
    base, _, directory = saved
    (directory / FILE).unlink()
    if kind == "folder":
        (directory / FILE).mkdir()
    elif kind == "named pipe":
        os.mkfifo(directory / FILE)
    else:
        (directory / FILE).symlink_to(directory / "absent")
    names = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=f"{FILE} is a {kind}"):
        PeftModel.from_pretrained(base, directory)
    assert [name for name, _ in base.named_modules()] == names
