"""llama.cpp computes our logits with a GGUF adapter, or does what the table says it does."""

import copy
import importlib.metadata
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from convert.adapters import rewrite
from helpers import FP32, outputs, relative_error, tiny_model
from peft_moe_lora.experts.families import GGUF_NO_LORA
from readers.cases import KINDS, SWAPS, Case, write_unchecked
from readers.verdicts import EXACT, LLAMA_CPP

pytest.importorskip(
    "llama_cpp",
    reason="llama-cpp-python is not installed; above test-readers the Makefile says how",
)

from readers.drive_llama_cpp import logits
from readers.gguf_bases import write_base

pytestmark = pytest.mark.readers

# architecture -> its tiny model, with what published configs say and llama.cpp does not read
MODELS = {
    "Qwen3MoeForCausalLM": ("qwen3_moe", {"norm_topk_prob": True}),
    "Qwen2MoeForCausalLM": ("qwen2_moe", {"norm_topk_prob": False}),
    "MixtralForCausalLM": ("mixtral", {}),
    "OlmoeForCausalLM": ("olmoe", {"norm_topk_prob": False, "num_key_value_heads": 4}),
    "DeepseekV2ForCausalLM": ("deepseek_v2", {}),
    "DeepseekV3ForCausalLM": ("deepseek_v3", {}),
    "GptOssForCausalLM": ("gpt_oss", {}),
}
GOLDEN = Path(__file__).parents[1] / "golden"
# q_proj is there only in models without q_a_proj
SILENT = sorted(n for n, words in GGUF_NO_LORA["deepseek2"].items() if n != "q_proj" and not words)
IDS = torch.randint(3, 64, (11,), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """architecture -> its case, and the base as GGUF."""
    cache = {}

    def make(architecture):
        if architecture not in cache:
            folder = tmp_path_factory.mktemp(architecture)
            family, settings = MODELS[architecture]
            model = tiny_model(family, tie_word_embeddings=False, **settings)
            write_base(model, folder / "base.gguf")
            cache[architecture] = Case(architecture, folder, model), folder / "base.gguf"
        return cache[architecture]

    return make


def ours(case, folder):
    """The logits of the base with an adapter in our own format."""
    model = PeftModel.from_pretrained(copy.deepcopy(case.model), folder).eval()
    return outputs(model, IDS[None])[0].detach()


def plain(case):
    return outputs(case.model, IDS[None])[0].detach()


def test_the_release_is_the_tables():
    assert importlib.metadata.version("llama-cpp-python") == LLAMA_CPP.version


def test_every_architecture_of_the_table_is_run():
    assert list(MODELS) == list(LLAMA_CPP.rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", MODELS)
def test_logits(run, architecture, kind):
    case, base = run(architecture)
    row = LLAMA_CPP.rows[architecture]
    said = {"experts": row.formats["gguf"]}.get(kind) or getattr(row, kind)
    adapter = case.written(kind, "gguf") / "adapter.gguf"
    if said != EXACT:
        with pytest.raises(ValueError, match=re.escape(said.removeprefix("refused: "))):
            logits(base, IDS, adapter)
        return
    right = ours(case, case.ours(kind))
    assert relative_error(plain(case), right) > 0.1
    assert relative_error(logits(base, IDS), plain(case)) < FP32
    assert relative_error(logits(base, IDS, adapter), right) < FP32


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_a_golden_file(family, tmp_path):
    """Its attention is adapted too, in the order of rows that llama.cpp has."""
    config = AutoConfig.from_pretrained(GOLDEN / family / "base")
    # llama.cpp knows published models only
    config.norm_topk_prob = True
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    write_base(model, tmp_path / "base.gguf")
    ids = torch.arange(8)
    right = outputs(
        PeftModel.from_pretrained(model, GOLDEN / family / "moe_lora").eval(), ids[None]
    )
    found = logits(tmp_path / "base.gguf", ids, GOLDEN / family / "gguf" / "adapter.gguf")
    assert relative_error(found, right[0].detach()) < FP32
    assert relative_error(logits(tmp_path / "base.gguf", ids), right[0].detach()) > 0.01


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head", "o_proj"])
def test_other_layers(run, name, tmp_path):
    case, base = run("Qwen3MoeForCausalLM")
    case.save(tmp_path / "ours", ["experts", name], save_embedding_layers=False)
    write_unchecked(tmp_path / "ours", case.base, "gguf", tmp_path / "out")
    right = ours(case, tmp_path / "ours")
    assert relative_error(logits(base, IDS, tmp_path / "out" / "adapter.gguf"), right) < FP32


@pytest.mark.parametrize("name", SILENT)
def test_a_layer_without_lora_is_ignored(run, name, tmp_path):
    """With the adapter on the layer, llama.cpp computes what it computes without it."""
    case, base = run("DeepseekV3ForCausalLM")
    case.save(tmp_path / "ours", ["experts", name], save_embedding_layers=False)
    shutil.copytree(tmp_path / "ours", tmp_path / "less")
    rewrite(
        tmp_path / "less", lambda state: {n: t for n, t in state.items() if f".{name}." not in n}
    )
    found = {}
    for kind in ("ours", "less"):
        write_unchecked(tmp_path / kind, case.base, "gguf", tmp_path / f"{kind}-gguf")
        found[kind] = logits(base, IDS, tmp_path / f"{kind}-gguf" / "adapter.gguf")
    assert torch.equal(found["ours"], found["less"])
    assert relative_error(found["ours"], ours(case, tmp_path / "ours")) > 0.01


@pytest.mark.parametrize("kind", SWAPS)
@pytest.mark.parametrize("architecture", ["Qwen3MoeForCausalLM", "GptOssForCausalLM"])
def test_a_swap_is_seen(run, architecture, kind):
    case, base = run(architecture)
    found = logits(base, IDS, case.written(kind, "gguf") / "adapter.gguf")
    assert relative_error(found, ours(case, case.ours("experts"))) > 0.01
