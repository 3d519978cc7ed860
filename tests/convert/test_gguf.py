"""The GGUF adapter of llama.cpp holds our update, by the package gguf; the rest is refused."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from convert.adapters import (
    INTERLEAVED,
    PREFIX,
    experts_count,
    rewrite,
    save_base,
    save_ours,
    tensors,
    update_of_ours,
)
from helpers import assert_close, experts_paths
from peft_moe_lora import convert_adapter
from peft_moe_lora.files.tensor_file import RefusedError

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

ARCHITECTURES = {
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
}
GOLDEN = Path(__file__).parents[1] / "golden"
GOLDENS = sorted(file.parents[1] for file in GOLDEN.glob("*/gguf/adapter.gguf"))
ROUTERS = {"gpt_oss": "router"}
PARTS = ("gate", "up", "down")


@pytest.fixture
def family(request, tmp_path):
    base = save_base(request.param, tmp_path / "base")
    router = ROUTERS.get(request.param, "gate")
    save_ours(base, tmp_path / "ours", target_modules=["experts", "o_proj", router])
    return SimpleNamespace(
        name=request.param, base=base, config=tmp_path / "base", ours=tmp_path / "ours"
    )


every_family = pytest.mark.parametrize("family", ARCHITECTURES, indirect=True)


def read(file):
    """(architecture, alpha, name -> tensor) of an adapter, by llama.cpp's own conventions."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["adapter.type"] == "lora"
    # GGUF counts dimensions from the last one
    tensors = {
        t.name: torch.tensor(t.data).reshape(tuple(map(int, t.shape))[::-1]) for t in reader.tensors
    }
    return fields["general.architecture"], fields["adapter.lora.alpha"], tensors


def experts_layers(base):
    """Number of a layer -> path of its experts."""
    return {int(path.split(".")[2]): path for path in experts_paths(base)}


def delta(tensors, alpha, name):
    A = tensors[f"{name}.weight.lora_a"]
    B = tensors[f"{name}.weight.lora_b"]
    return alpha / A.shape[-2] * B @ A


def joined(family, found):
    """gate_up in the order of the base's rows."""
    halves = [found["gate"], found["up"]]
    if family in INTERLEAVED:
        return torch.stack(halves, 2).flatten(1, 2)
    return torch.cat(halves, 1)


@every_family
def test_the_update_is_ours(family, tmp_path):
    convert_adapter(family.ours, tmp_path / "out", to="gguf", base_config=family.config)
    architecture, alpha, tensors = read(tmp_path / "out" / "adapter.gguf")
    assert architecture == ARCHITECTURES[family.name]
    right = update_of_ours(family.ours, family.base)
    layers = experts_layers(family.base)
    for layer, path in layers.items():
        found = {p: delta(tensors, alpha, f"blk.{layer}.ffn_{p}_exps") for p in PARTS}
        assert found["down"].shape[0] == experts_count(family.base, path)
        gate_up = joined(family.name, found)
        assert_close(gate_up, right[path]["gate_up"], 1e-6, f"{path}, gate_up")
        assert_close(found["down"], right[path]["down"], 1e-6, f"{path}, down")
    beside = {name for name in tensors if "exps" not in name}
    names = [f"blk.{layer}.attn_output" for layer in range(2)]
    names += [f"blk.{layer}.ffn_gate_inp" for layer in layers]
    assert beside == {f"{name}.weight.lora_{side}" for name in names for side in "ab"}


golden = pytest.mark.parametrize("golden", GOLDENS, ids=lambda folder: folder.name)


def test_the_golden_families():
    assert [folder.name for folder in GOLDENS] == ["gpt_oss", "mixtral", "qwen3_moe"]
    assert all((folder / "gguf" / "adapter.gguf").stat().st_size < 4000 for folder in GOLDENS)


@golden
def test_a_golden_file_holds_the_update_that_peft_formed(golden):
    architecture, alpha, tensors = read(golden / "gguf" / "adapter.gguf")
    assert architecture == ARCHITECTURES[golden.name]
    right = load_file(golden / "expected.safetensors")
    found = {p: delta(tensors, alpha, f"blk.0.ffn_{p}_exps") for p in PARTS}
    gate_up = joined(golden.name, found)
    assert_close(gate_up, right["gate_up"], 1e-6, "gate_up")
    assert_close(found["down"], right["down"], 1e-6, "down")


@golden
def test_the_golden_adapter_of_every_format_becomes_this_file_bit_for_bit(golden, tmp_path):
    right_architecture, right_alpha, right = read(golden / "gguf" / "adapter.gguf")
    for config in golden.glob("*/adapter_config.json"):
        out = tmp_path / config.parent.name
        convert_adapter(config.parent, out, to="gguf", base_config=golden / "base")
        architecture, alpha, found = read(out / "adapter.gguf")
        assert (architecture, alpha) == (right_architecture, right_alpha), out.name
        assert found.keys() == right.keys(), out.name
        assert all(torch.equal(found[name], tensor) for name, tensor in right.items()), out.name


@pytest.mark.parametrize("family", ["qwen3_moe"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_arrive_exactly(family, dtype, tmp_path):
    # bf16 has numbers below those of fp16
    small = {torch.bfloat16: 2.0**-18, torch.float16: 1.0}[dtype]
    rewrite(family.ours, lambda state: {name: (t * small).to(dtype) for name, t in state.items()})
    convert_adapter(family.ours, tmp_path / "out", to="gguf", base_config=family.config)
    _, alpha, tensors = read(tmp_path / "out" / "adapter.gguf")
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    rewrite(family.ours, lambda state: {name: t.float() for name, t in state.items()})
    right = update_of_ours(family.ours, family.base)
    for layer, path in experts_layers(family.base).items():
        down = delta(tensors, alpha, f"blk.{layer}.ffn_down_exps")
        assert_close(down, right[path]["down"], 1e-6, path)


@pytest.mark.parametrize(
    ("family", "targets", "match"),
    [
        ("glm4_moe", ["experts"], "not tried with adapters on the experts of glm4_moe"),
        ("deepseek_v3", ["experts", "q_a_proj"], "q_a_proj of deepseek_v3 without LoRA"),
        ("deepseek_v2", ["experts", "kv_b_proj"], "kv_b_proj of deepseek_v2 without LoRA"),
        ("qwen3_moe", ["experts", "embed_tokens"], "loads LoRA alone"),
    ],
)
def test_what_llama_cpp_does_not_take_is_refused(family, targets, match, tmp_path):
    base = save_base(family, tmp_path / "base")
    save_ours(base, tmp_path / "ours", target_modules=targets)
    with pytest.raises(RefusedError, match=match) as caught:
        convert_adapter(
            tmp_path / "ours", tmp_path / "out", to="gguf", base_config=tmp_path / "base"
        )
    assert "peft-moe-lora merge" in str(caught.value) or "save it again" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["qwen3_moe"], indirect=True)
def test_without_the_package_the_extra_is_named(family, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RefusedError, match=r"peft-moe-lora\[gguf\]"):
        convert_adapter(family.ours, tmp_path / "out", to="gguf", base_config=family.config)


@pytest.mark.parametrize("name", ["q_proj", "k_proj"])
def test_the_rows_of_rotary_heads_become_pairs(name, tmp_path):
    """llama.cpp keeps row i of the first half of a head beside row i of its second half."""
    base = save_base("mixtral", tmp_path / "base")
    save_ours(base, tmp_path / "ours", target_modules=["experts", name])
    convert_adapter(tmp_path / "ours", tmp_path / "out", to="gguf", base_config=tmp_path / "base")
    _, _, found = read(tmp_path / "out" / "adapter.gguf")
    path = f"{PREFIX}model.layers.1.self_attn.{name}.lora_"
    ours = tensors(tmp_path / "ours")
    A, B = (ours[f"{path}{side}.weight"] for side in "AB")
    short = f"blk.1.attn_{name[0]}.weight.lora_"
    head_dim = 8
    rows = []
    for start in range(0, len(B), head_dim):
        for i in range(head_dim // 2):
            rows += [start + i, start + head_dim // 2 + i]
    assert rows != sorted(rows)
    assert torch.equal(found[f"{short}a"], A)
    assert torch.equal(found[f"{short}b"], B[rows])


@pytest.mark.parametrize(
    ("family", "settings", "match"),
    [
        ("qwen3_moe", {"tie_word_embeddings": True}, "stores no lm_head of its own"),
        ("deepseek_v3", {}, "lm_head of deepseek_v3 without LoRA"),
    ],
    ids=["tied", "computed otherwise"],
)
def test_a_head_without_lora_is_refused(family, settings, match, tmp_path):
    base = save_base(family, tmp_path / "base", **settings)
    save_ours(base, tmp_path / "ours", target_modules=["experts", "lm_head"])
    rewrite(
        tmp_path / "ours",
        lambda state: {name: t for name, t in state.items() if "base_layer" not in name},
    )
    with pytest.raises(RefusedError, match=match):
        convert_adapter(
            tmp_path / "ours", tmp_path / "out", to="gguf", base_config=tmp_path / "base"
        )


def test_an_embedding_is_written_as_rows_of_the_vocabulary(tmp_path):
    base = save_base("qwen3_moe", tmp_path / "base")
    model = save_ours(base, tmp_path / "ours", target_modules=["experts", "embed_tokens"])
    model.save_pretrained(tmp_path / "ours", save_embedding_layers=False)
    convert_adapter(tmp_path / "ours", tmp_path / "out", to="gguf", base_config=tmp_path / "base")
    _, _, found = read(tmp_path / "out" / "adapter.gguf")
    path = f"{PREFIX}model.embed_tokens.lora_embedding_"
    right = tensors(tmp_path / "ours")
    assert torch.equal(found["token_embd.weight.lora_a"], right[f"{path}A"].T)
    assert torch.equal(found["token_embd.weight.lora_b"], right[f"{path}B"])
