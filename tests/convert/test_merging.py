"""A merged checkpoint equals merging in memory, however the base stores its experts.

PEFT's adapters load in our layers.
"""

import copy
import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from convert.adapters import save_base, save_ours, save_pefts
from helpers import (
    assert_close,
    assert_unchanged,
    causal_families,
    experts_paths,
    outputs,
    snapshot,
    tiny_model,
)
from peft_moe_lora import convert_adapter, load_peft_adapter, merge_adapter
from peft_moe_lora.files.tensor_file import AdapterError, ExistsError, RefusedError
from peft_moe_lora.layers.layer import MoELoraLayer

TOLERANCE = 1e-5


def stored(base, folder, **kwargs):
    base.save_pretrained(folder, **kwargs)
    return folder


@pytest.mark.parametrize("shards", ["1GB", "20KB"])
@pytest.mark.parametrize("family", causal_families())
def test_merged_is_merged_in_memory(family, shards, tmp_path):
    base = save_base(family, tmp_path / "config")
    stored(base, tmp_path / "base", max_shard_size=shards)
    assert ((tmp_path / "base" / "model.safetensors.index.json").exists()) == (shards == "20KB")
    linears = ["q_proj", "v_proj"] if family in ("qwen3_moe", "mixtral") else []
    # gemma4's router holds a linear layer
    router = {"gpt_oss": "router", "aria": "router", "gemma4": "proj"}.get(family, "gate")
    model = save_ours(base, tmp_path / "ours", target_modules=["experts", router, *linears])
    done = merge_adapter(tmp_path / "ours", tmp_path / "base", tmp_path / "merged")
    assert done.rounding.dtypes == {"float32"}
    merged = type(base).from_pretrained(tmp_path / "merged").eval()
    assert_close(outputs(merged), outputs(model), TOLERANCE, "logits")
    right = model.merge_and_unload().state_dict()
    for name, weight in merged.state_dict().items():
        assert_close(weight, right[name], TOLERANCE, name)
    before = {p.name for p in (tmp_path / "base").iterdir()}
    assert {p.name for p in (tmp_path / "merged").iterdir()} == before


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("intermediate", [24, 16])
def test_stacked_checkpoints_either_way_round(tmp_path, transposed, intermediate):
    """The shapes tell [E, N, K] from [E, K, N], even for 2I = H, where gate_up alone does not."""
    base = tiny_model(moe_intermediate_size=intermediate)
    base.config.architectures = [type(base).__name__]
    base.config.save_pretrained(tmp_path / "base")
    stacks = {
        n for n in base.state_dict() if n.endswith(("experts.gate_up_proj", "experts.down_proj"))
    }
    state = {n: t.mT if transposed and n in stacks else t for n, t in base.state_dict().items()}
    save_file(
        {n: t.contiguous().clone() for n, t in state.items()},
        tmp_path / "base" / "model.safetensors",
    )
    model = save_ours(base, tmp_path / "ours").merge_and_unload()
    merge_adapter(tmp_path / "ours", tmp_path / "base", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    for name, weight in model.state_dict().items():
        found = merged[name].mT if transposed and name in stacks else merged[name]
        assert_close(found, weight, TOLERANCE, name)


@pytest.mark.parametrize("to", ["peft", "per_expert", "sglang_3d"])
def test_every_format_merges_the_same(qwen, to, tmp_path):
    stored(qwen.base, tmp_path / "base")
    convert_adapter(qwen.ours, tmp_path / to, to=to, base_config=qwen.config)
    merge_adapter(tmp_path / to, tmp_path / "base", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(outputs(merged), qwen.logits, TOLERANCE, "logits")


def test_bf16_is_rounded_once_and_said(qwen, tmp_path):
    half = copy.deepcopy(qwen.base).bfloat16()
    stored(half, tmp_path / "base")
    done = merge_adapter(qwen.ours, tmp_path / "base", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    model = PeftModel.from_pretrained(half.float(), qwen.ours).merge_and_unload()  # exact in fp32
    for path in experts_paths(half):
        for name in ("gate_up_proj", "down_proj"):
            exact = model.get_submodule(path).get_parameter(name)
            assert merged[f"{path}.{name}"].dtype == torch.bfloat16
            # 2e-3: half a unit in bf16's last place; one value in 10^5 may round the other way
            assert_close(merged[f"{path}.{name}"].float(), exact.bfloat16().float(), 2e-3, name)
    assert 0 < done.rounding.share < 0.02
    assert "bfloat16" in str(done)
    assert "%" in str(done)


@pytest.mark.parametrize("name", ["lm_head", "gate"])
def test_saved_modules_replace_the_bases(qwen, tmp_path, name):
    stored(qwen.base, tmp_path / "base")
    model = save_ours(qwen.base, tmp_path / "ours", modules_to_save=[name], randomize=True)
    with torch.no_grad():
        for parameter, tensor in model.named_parameters():
            if "modules_to_save" in parameter:
                tensor.mul_(1.5)
    model.save_pretrained(tmp_path / "ours")
    merge_adapter(tmp_path / "ours", tmp_path / "base", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(outputs(merged), outputs(model), TOLERANCE, "logits")


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.mlp.gate.weight"])
def test_a_tensor_of_the_base_that_is_transposed_is_not_replaced(qwen, tmp_path, name):
    stored(qwen.base, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    state = load_file(file)
    save_file(state | {name: state[name].T.contiguous()}, file, {"format": "pt"})
    save_ours(qwen.base, tmp_path / "ours", modules_to_save=["lm_head", "gate"])
    with pytest.raises(AdapterError, match=name):
        merge_adapter(tmp_path / "ours", tmp_path / "base", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.fixture
def sharded(qwen, tmp_path):
    return stored(qwen.base, tmp_path / "base", max_shard_size="20KB")


def refused(qwen, tmp_path, match, error=AdapterError):
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(error, match=match):
        merge_adapter(qwen.ours, tmp_path / "base", tmp_path / "merged")
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", 3]
)
def test_an_index_cannot_reach_outside(qwen, sharded, tmp_path, file):
    shutil.copy(next(sharded.glob("*.safetensors")), tmp_path / "secret.safetensors")
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = file
    path.write_text(json.dumps(index))
    refused(qwen, tmp_path, r"not the name of a safetensors file|weight_map")


def test_indexes_that_lie_are_refused(qwen, sharded, tmp_path):
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    whole = json.dumps(index)
    first = next(iter(index["weight_map"]))
    for wrong, match in (
        (
            {"weight_map": {**index["weight_map"], "more.weight": index["weight_map"][first]}},
            "differ on more.weight",
        ),
        ({"weight_map": {**index["weight_map"], first: "nowhere.safetensors"}}, "missing"),
        ({}, "weight_map"),
    ):
        path.write_text(json.dumps(wrong))
        refused(qwen, tmp_path, match)
    path.write_text(whole[:-5])
    refused(qwen, tmp_path, "not JSON")
    path.write_text(whole)
    shard = sharded / index["weight_map"][first]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(qwen, tmp_path, "not a whole safetensors")


def assert_merged_is_right(qwen, tmp_path):
    merge_adapter(qwen.ours, tmp_path / "base", tmp_path / "merged")
    merged = type(qwen.base).from_pretrained(tmp_path / "merged").eval()
    assert_close(outputs(merged), qwen.logits, TOLERANCE)


def test_a_folder_that_was_saved_in_shards_and_then_in_one_file(qwen, tmp_path):
    """transformers removes the shards, leaves their index, and loads the file."""
    stored(qwen.base, tmp_path / "base", max_shard_size="10KB")
    stored(qwen.base, tmp_path / "base")
    assert (tmp_path / "base" / "model.safetensors.index.json").is_file()
    assert_merged_is_right(qwen, tmp_path)
    assert not (tmp_path / "merged" / "model.safetensors.index.json").exists()


def test_a_folder_that_was_saved_in_one_file_and_then_in_shards(qwen, tmp_path):
    """transformers leaves the file and loads it, not what was saved last."""
    stored(qwen.base, tmp_path / "base")
    stored(qwen.base, tmp_path / "base", max_shard_size="10KB")
    refused(qwen, tmp_path, r"model\.safetensors, which transformers loads", RefusedError)
    (tmp_path / "base" / "model.safetensors").unlink()
    assert_merged_is_right(qwen, tmp_path)


def test_a_base_whose_experts_are_not_there(qwen, tmp_path):
    stored(qwen.base, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    state = load_file(file)
    save_file({n: t for n, t in state.items() if "experts.3.up_proj" not in n}, file)
    refused(qwen, tmp_path, "stored in a way that is not known", RefusedError)
    save_file(
        {n: t[:-1].clone() if "experts.3.up_proj" in n else t for n, t in state.items()}, file
    )
    refused(qwen, tmp_path, r"experts\.3\.up_proj")
    save_file(
        {n: t.to(torch.int8) if "experts.3.up_proj" in n else t for n, t in state.items()}, file
    )
    refused(qwen, tmp_path, "unquantized")
    file.unlink()
    refused(qwen, tmp_path, "holds neither")


def test_nothing_is_overwritten(qwen, tmp_path):
    stored(qwen.base, tmp_path / "base")
    with pytest.raises(ExistsError):
        merge_adapter(qwen.ours, tmp_path / "base", tmp_path / "base")
    merge_adapter(qwen.ours, tmp_path / "base", tmp_path / "merged")
    merge_adapter(qwen.ours, tmp_path / "base", tmp_path / "merged", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "merged"]


# ---- PEFT's adapters in our layers ---------------------------------------------------------------


def test_a_peft_adapter_loads_into_our_layers(case, tmp_path):
    linears = ["q_proj", "v_proj"] if case.family == "qwen3_moe" else []
    theirs = save_pefts(case.base, tmp_path / "theirs", target_modules=linears)
    ours = load_peft_adapter(copy.deepcopy(case.base), tmp_path / "theirs").eval()
    assert any(isinstance(module, MoELoraLayer) for module in ours.modules())
    assert_close(outputs(ours), outputs(theirs), TOLERANCE, "logits")
    assert not [p for p in ours.parameters() if p.requires_grad]


def test_a_loaded_peft_adapter_trains_on_and_is_saved_as_ours(qwen, tmp_path):
    save_pefts(qwen.base, tmp_path / "theirs")
    ours = load_peft_adapter(
        copy.deepcopy(qwen.base), tmp_path / "theirs", "theirs", is_trainable=True
    )
    assert all("lora_" in n for n, p in ours.named_parameters() if p.requires_grad)
    outputs(ours).square().mean().backward()
    assert all(p.grad is not None for p in ours.parameters() if p.requires_grad)
    ours.save_pretrained(tmp_path / "ours")
    again = PeftModel.from_pretrained(copy.deepcopy(qwen.base), tmp_path / "ours" / "theirs")
    assert_close(outputs(again.eval()), outputs(ours.eval()), 0, "logits")


def test_a_failed_load_leaves_the_model(made, qwen, tmp_path):
    save_pefts(made("deepseek_v3").base, tmp_path / "theirs")
    model = copy.deepcopy(qwen.base)
    before = snapshot(model)
    with pytest.raises(AdapterError):
        load_peft_adapter(model, tmp_path / "theirs")
    assert_unchanged(model, before)
