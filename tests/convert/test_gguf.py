"""The GGUF adapter of llama.cpp holds our update, by the package gguf; the rest is refused."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from convert.adapters import experts_count, rewrite, save_base, save_ours, update_of_ours
from helpers import assert_close, experts_paths
from peft_moe_lora import convert_adapter
from peft_moe_lora.files.tensor_file import RefusedError

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

ARCHITECTURES = {
    "qwen3_moe": "qwen3moe",
    "qwen2_moe": "qwen2moe",
    "mixtral": "llama",
    "olmoe": "olmoe",
}
PARTS = ("gate", "up", "down")


@pytest.fixture
def family(request, tmp_path):
    base = save_base(request.param, tmp_path / "base")
    save_ours(base, tmp_path / "ours", target_modules=["experts", "o_proj", "gate"])
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


def delta(tensors, alpha, name):
    A = tensors[f"{name}.weight.lora_a"]
    B = tensors[f"{name}.weight.lora_b"]
    return alpha / A.shape[-2] * B @ A


@every_family
def test_the_update_is_ours(family, tmp_path):
    convert_adapter(family.ours, tmp_path / "out", to="gguf", base_config=family.config)
    architecture, alpha, tensors = read(tmp_path / "out" / "adapter.gguf")
    assert architecture == ARCHITECTURES[family.name]
    right = update_of_ours(family.ours, family.base)
    for layer, path in enumerate(experts_paths(family.base)):
        found = {p: delta(tensors, alpha, f"blk.{layer}.ffn_{p}_exps") for p in PARTS}
        assert found["down"].shape[0] == experts_count(family.base, path)
        gate_up = torch.cat([found["gate"], found["up"]], 1)
        assert_close(gate_up, right[path]["gate_up"], 1e-6, f"{path}, gate_up")
        assert_close(found["down"], right[path]["down"], 1e-6, f"{path}, down")
    beside = {name for name in tensors if "exps" not in name}
    assert beside == {
        f"blk.{layer}.{name}.weight.lora_{side}"
        for layer in range(2)
        for name in ("attn_output", "ffn_gate_inp")
        for side in "ab"
    }


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
    for layer, path in enumerate(experts_paths(family.base)):
        down = delta(tensors, alpha, f"blk.{layer}.ffn_down_exps")
        assert_close(down, right[path]["down"], 1e-6, path)


@pytest.mark.parametrize(
    ("family", "targets", "match"),
    [
        ("gpt_oss", ["experts"], "gpt_oss"),
        ("mixtral", ["experts", "q_proj"], "q_proj of mixtral in another order"),
        ("mixtral", ["experts", "k_proj"], "k_proj of mixtral in another order"),
        ("qwen3_moe", ["experts", "embed_tokens"], "loads LoRA alone|another order"),
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
