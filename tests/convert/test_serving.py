"""What a server refuses or misreads is said, or refused with the format that works instead.

vLLM and SGLang are not installed here: what they do was found by driving their own loaders.
"""

import json
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest

from convert.adapters import MISREAD, save_base, save_ours
from peft_moe_lora import convert_adapter, inspect_adapter
from peft_moe_lora.convert.base import read_base
from peft_moe_lora.files.card import OUR_CARD, card_section
from peft_moe_lora.files.tensor_file import RefusedError


@pytest.fixture(scope="module")
def nemotron(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nemotron_h")
    base = save_base("nemotron_h", folder / "base")
    save_ours(base, folder / "ours")
    return SimpleNamespace(config=folder / "base", ours=folder / "ours")


@pytest.fixture
def family(request, made, nemotron):
    if request.param == "nemotron_h":
        return nemotron
    return made(request.param)


def converted(case, folder, to, base_config=None):
    """The notes and the card of a conversion."""
    done = convert_adapter(case.ours, folder, to=to, base_config=base_config or case.config)
    return " ".join(done.notes), (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("family", "to", "match", "working"),
    [
        ("mixtral", "vllm_3d", "block_sparse_moe.experts and ignores", "per_expert"),
        ("nemotron_h", "vllm_3d", "misreads this format", "per_expert"),
    ],
    indirect=["family"],
)
def test_a_format_that_is_misread_is_refused(family, to, match, working, tmp_path):
    with pytest.raises(RefusedError, match=match) as caught:
        convert_adapter(family.ours, tmp_path / "out", to=to, base_config=family.config)
    assert f"convert to {working} instead" in str(caught.value)
    assert not list(tmp_path.iterdir())
    converted(family, tmp_path / working, working)


@pytest.mark.parametrize(
    ("family", "server", "start", "instead"),
    [
        ("gpt_oss", "vLLM", "vllm serve", "vllm_3d"),
        ("mixtral", "SGLang", "sglang.launch_server", "sglang_3d"),
        ("nemotron_h", "SGLang", "sglang.launch_server", "sglang_3d"),
    ],
    indirect=["family"],
)
def test_per_expert_files_name_the_format_of_each_server(family, server, start, instead, tmp_path):
    notes, card = converted(family, tmp_path / "out", "per_expert")
    assert server in notes
    assert f"convert to {instead} for it" in notes
    assert start not in card
    assert ("vllm serve" in card) or ("sglang.launch_server" in card)
    _, card = converted(family, tmp_path / instead, instead)
    assert start in card


@pytest.mark.parametrize("to", ["vllm_3d", "per_expert"])
@pytest.mark.parametrize(
    ("architecture", "own"),
    [
        ("Qwen3_5MoeForCausalLM", "per_expert"),
        ("Qwen3_5MoeForConditionalGeneration", "vllm_3d"),
        ("Qwen3VLMoeForConditionalGeneration", "vllm_3d"),
    ],
)
def test_the_architecture_decides_what_vllm_reads(qwen, architecture, own, to, tmp_path):
    base = replace(read_base(qwen.config), architecture=architecture)
    notes, card = converted(qwen, tmp_path / "out", to, base)
    assert (f"vLLM reads {architecture} as {own}" in notes) == (own != to)
    stacked = {"vllm_3d": "true", "per_expert": "false"}[to]
    assert (f"is_3d_lora_weight {stacked}" in notes) == (own != to)
    (command,) = (line for line in card.splitlines() if line.startswith("vllm serve"))
    arguments = shlex.split(command)
    assert ("--enable-mixed-moe-lora-format" in arguments) == (own != to)
    if own == to:
        assert arguments[-1] == "adapter=ADAPTER"
        return
    entry = {"name": "adapter", "path": "ADAPTER", "is_3d_lora_weight": to == "vllm_3d"}
    assert json.loads(arguments[-1]) == entry


def test_the_architecture_is_the_configs_or_the_models(qwen):
    assert read_base(qwen.config).architecture == "Qwen3MoeForCausalLM"
    bare = {**qwen.base.config.to_dict(), "architectures": None}
    assert read_base(bare).architecture == "Qwen3MoeForCausalLM"
    named = {**bare, "architectures": ["SomebodysQwenForCausalLM"]}
    assert read_base(named).architecture == "SomebodysQwenForCausalLM"
    for other in ("\x1b[31mforged", "a b", "", "x" * 5000):
        strange = read_base({**bare, "architectures": [other]})
        assert strange.architecture == "Qwen3MoeForCausalLM"


def test_vllms_3d_needs_to_know_the_model(qwen, tmp_path):
    with pytest.raises(RefusedError, match="--base-config"):
        convert_adapter(qwen.ours, tmp_path / "out", to="vllm_3d")


def test_sglang_has_no_lora_on_routers(qwen, tmp_path):
    save_ours(qwen.base, tmp_path / "in", target_modules=["experts", "gate"])
    case = SimpleNamespace(ours=tmp_path / "in", config=qwen.config)
    with pytest.raises(RefusedError, match=r"routers.*layers\.0\.mlp\.gate"):
        converted(case, tmp_path / "out", "sglang_3d")
    notes, card = converted(case, tmp_path / "out", "per_expert")
    assert "no LoRA on routers" in notes
    assert "sglang.launch_server" not in card
    assert "vllm serve" in card


@pytest.mark.parametrize(
    ("family", "names", "held"),
    [
        ("qwen3_moe", ["q_proj", "k_proj"], "k_proj, q_proj"),
        ("qwen3_moe", ["v_proj"], "v_proj"),
        ("qwen3_moe", ["k_proj"], "k_proj"),
        ("deepseek_v3", ["q_a_proj", "o_proj"], "q_a_proj"),
        ("deepseek_v3", ["kv_a_proj_with_mqa"], "kv_a_proj_with_mqa"),
    ],
    indirect=["family"],
)
def test_sglang_loads_what_it_stacks_together(family, names, held, tmp_path):
    save_ours(family.base, tmp_path / "in", target_modules=["experts", *names])
    case = SimpleNamespace(ours=tmp_path / "in", config=family.config)
    with pytest.raises(RefusedError, match=rf"together only, but \S+ has {held};"):
        converted(case, tmp_path / "out", "sglang_3d")
    notes, card = converted(case, tmp_path / "out", "per_expert")
    assert "SGLang loads" in notes
    assert "sglang.launch_server" not in card


def test_a_file_that_nobody_reads_is_not_written(made, tmp_path):
    """gpt_oss per expert: PEFT ignores it, and with a module saved whole the servers refuse it."""
    oss = made("gpt_oss")
    save_ours(oss.base, tmp_path / "in", modules_to_save=["lm_head"])
    with pytest.raises(RefusedError, match="no program reads"):
        convert_adapter(tmp_path / "in", tmp_path / "out", to="per_expert", base_config=oss.config)
    notes, card = converted(oss, tmp_path / "plain", "per_expert")
    assert "PEFT does not read per-expert tensors of gpt_oss" in notes
    assert "PeftModel" not in card


@pytest.mark.parametrize("server", ["vllm_3d", "per_expert"])
def test_the_highest_rank_of_vllm_and_one_more(qwen, server, tmp_path):
    save_ours(qwen.base, tmp_path / "512", r=512, randomize=False)
    save_ours(qwen.base, tmp_path / "513", r=513, randomize=False)
    answers = [inspect_adapter(tmp_path / r, qwen.config).readers[server] for r in ("512", "513")]
    assert "ranks up to" not in answers[0]
    assert "ranks up to 512, but this adapter has rank 513" in answers[1]
    notes, card = converted(
        SimpleNamespace(ours=tmp_path / "512", config=qwen.config), tmp_path / "out", server
    )
    assert "--max-lora-rank 512" in notes
    assert "--max-lora-rank 512" in card


@pytest.mark.parametrize(
    "more",
    [
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3]},
        {"bias": "all"},
    ],
    ids=str,
)
def test_the_card_of_an_adapter_with_more_than_lora_serves_it_merged(more):
    card = card_section(OUR_CARD, {"r": 4, "lora_alpha": 8, "target_modules": ["experts"], **more})
    assert "vllm serve" not in card
    assert "peft-moe-lora convert" not in card
    assert "peft-moe-lora merge" in card


@pytest.mark.parametrize(
    ("to", "command"),
    [
        ("mlx", "mlx_lm.server --model BASE --adapter-path ADAPTER"),
        ("gguf", "llama-server --model BASE.gguf --lora ADAPTER/adapter.gguf"),
    ],
)
def test_a_format_of_one_program_is_served_by_that_program(qwen, to, command, tmp_path):
    if to == "gguf":
        pytest.importorskip("gguf", reason="the package gguf is not installed")
    _, card = converted(qwen, tmp_path / "out", to)
    serve = card.split("### Serve")[1]
    assert serve.split("```sh")[1].split("```")[0].strip() == command
    assert "peft-moe-lora" not in serve.partition("<!--")[0]


def test_every_misreading_is_tested_here():
    assert {to for _, to in MISREAD} == {"vllm_3d"}
