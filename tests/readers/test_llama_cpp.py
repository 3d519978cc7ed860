"""llama.cpp computes our logits with a GGUF adapter on experts, attention and routers."""

import copy
import importlib.metadata

import pytest
import torch

from helpers import FP32, moe_lora, outputs, relative_error, tiny_model
from peft_moe_lora import convert_adapter
from readers.cases import SWAPS, swapped_copy

pytest.importorskip(
    "llama_cpp",
    reason="llama-cpp-python is not installed; pip install --no-deps llama-cpp-python builds it",
)

from readers.drive_llama_cpp import logits, write_base

pytestmark = pytest.mark.readers

VERSION = "0.3.36"
SIZES = {"hidden_size": 64, "tie_word_embeddings": False}
# what is fixed in llama.cpp: the widths of heads, and whether routing weights are normalised
FAMILIES = {
    "qwen3_moe": {"head_dim": 16, "norm_topk_prob": True},
    "qwen2_moe": {"norm_topk_prob": False},
    "mixtral": {},
    "olmoe": {"norm_topk_prob": False, "num_key_value_heads": 4},
}
TARGETS = {"mixtral": ["experts", "v_proj", "o_proj", "gate"]}
IDS = torch.randint(3, 64, (11,), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    cache = {}

    def make(family):
        if family not in cache:
            folder = tmp_path_factory.mktemp(family)
            base = tiny_model(family, **SIZES, **FAMILIES[family])
            base.config.architectures = [type(base).__name__]
            base.config.save_pretrained(folder / "base")
            write_base(base, folder / "base.gguf")
            targets = TARGETS.get(family, ["experts", "q_proj", "k_proj", "v_proj", "gate"])
            model = moe_lora(copy.deepcopy(base), target_modules=targets).eval()
            model.save_pretrained(folder / "ours")
            cache[family] = folder, base, outputs(model, IDS[None])[0].detach()
        return cache[family]

    return make


def with_adapter(folder, ours, out):
    convert_adapter(ours, out, to="gguf", base_config=folder / "base")
    return logits(folder / "base.gguf", IDS, out / "adapter.gguf")


def test_the_release_is_the_documents():
    assert importlib.metadata.version("llama-cpp-python") == VERSION


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(made, family, tmp_path):
    folder, base, right = made(family)
    plain = outputs(base, IDS[None])[0].detach()
    assert relative_error(logits(folder / "base.gguf", IDS), plain) < FP32
    assert relative_error(plain, right) > 0.1
    assert relative_error(with_adapter(folder, folder / "ours", tmp_path / "out"), right) < FP32


@pytest.mark.parametrize("kind", SWAPS)
def test_a_swap_is_seen(made, kind, tmp_path):
    folder, _, right = made("qwen3_moe")
    swapped_copy(folder / "ours", tmp_path / "ours", kind)
    found = with_adapter(folder, tmp_path / "ours", tmp_path / "out")
    assert relative_error(found, right) > 0.01
