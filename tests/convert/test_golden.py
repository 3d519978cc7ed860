"""Adapters were written once in every format; every later release has to read them."""

from pathlib import Path

import pytest
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from convert.adapters import MISREAD, PREFIX, config_of, tensors
from helpers import assert_close, experts_adapter
from peft_moe_lora import convert_adapter, inspect_adapter, verify_adapter
from peft_moe_lora.convert.formats import FORMATS
from peft_moe_lora.files.tensor_file import RefusedError

GOLDEN = Path(__file__).parents[1] / "golden"
ADAPTERS = sorted(p.parent for p in GOLDEN.glob("*/*/adapter_config.json"))
E = 3


@pytest.fixture(params=ADAPTERS, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def adapter(request):
    return request.param


def test_every_format_and_family_is_there():
    names = {f"{folder.parent.name}-{folder.name}" for folder in ADAPTERS}
    every = {*FORMATS, "peft_legacy", "unsloth", "unsloth_noted", "tinker"}
    assert names >= {f"{family}-{name}" for family in ("qwen3_moe", "mixtral") for name in every}
    assert names >= {f"gpt_oss-{name}" for name in every - {"peft_legacy"}}


def test_a_golden_adapter_is_read_as_it_was_meant(adapter, tmp_path):
    """Its update, taken out of our file by the definition of our layout, is the one PEFT formed."""
    base = adapter.parent / "base"
    convert_adapter(adapter, tmp_path / "ours", to="moe_lora", base_config=base)
    state, config = tensors(tmp_path / "ours"), config_of(tmp_path / "ours")
    scaling = config["lora_alpha"] / config["r"]
    for projection, right in load_file(adapter.parent / "expected.safetensors").items():
        (A,) = (t for n, t in state.items() if n.endswith(f".lora_A.{projection}"))
        (B,) = (t for n, t in state.items() if n.endswith(f".lora_B.{projection}"))
        r = A.shape[0] // E
        for e in range(E):
            update = scaling * B[:, e * r : (e + 1) * r] @ A[e * r : (e + 1) * r]
            assert_close(update, right[e], 1e-6, f"{projection} of expert {e}")
    assert verify_adapter(tmp_path / "ours", base, adapter.parent / "moe_lora").max_error == 0
    ours = tensors(adapter.parent / "moe_lora")
    attention = {n: t for n, t in ours.items() if "self_attn" in n}
    assert len(attention) == 4
    assert all((state[n] == t).all() for n, t in attention.items())


def test_a_golden_adapter_becomes_every_format(adapter, tmp_path):
    base = adapter.parent / "base"
    for to in FORMATS:
        misread = MISREAD.get((adapter.parent.name, to))
        if misread is not None:
            with pytest.raises(RefusedError, match=misread):
                convert_adapter(adapter, tmp_path / to, to=to, base_config=base)
            continue
        convert_adapter(adapter, tmp_path / to, to=to, base_config=base)
        assert verify_adapter(tmp_path / to, base, adapter.parent / "moe_lora").ok


def test_ours_loads_in_peft(adapter):
    if adapter.name != "moe_lora":
        return
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(adapter.parent / "base"))
    model = PeftModel.from_pretrained(base, adapter)
    (path,) = {
        n.removeprefix(PREFIX).partition(".lora_")[0] for n in tensors(adapter) if "experts" in n
    }
    for projection, (A, B) in experts_adapter(model, path).items():
        saved = tensors(adapter)
        assert (A == saved[f"{PREFIX}{path}.lora_A.{projection}"]).all()
        assert (B == saved[f"{PREFIX}{path}.lora_B.{projection}"]).all()


def test_goldens_are_small_and_their_formats_are_told_apart(adapter):
    (file,) = adapter.glob("*.safetensors")
    assert file.stat().st_size < 16_000
    found = inspect_adapter(adapter, adapter.parent / "base")
    aliases = {
        "vllm_3d": "peft",
        "unsloth": "peft",
        "unsloth_noted": "peft",
        "tinker": "sglang_3d",
    }
    assert found.format == aliases.get(adapter.name, adapter.name)
    assert (found.modules, found.num_experts, set(found.ranks)) == (1, (E,), {2})
