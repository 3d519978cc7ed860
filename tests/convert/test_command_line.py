"""The command line: what it prints and its exit codes, which scripts rely on. The model card."""

import copy
import json
import shutil

import pytest
import torch
from peft import PeftModel

from convert.adapters import config_of, rewrite, save_ours, tensors
from helpers import E, assert_close, outputs
from peft_moe_lora.convert.convert import convert_adapter
from peft_moe_lora.convert.formats import FORMATS
from peft_moe_lora.files.card import OUR_CARD, card_section, write_card

pytest.importorskip("typer")

from typer.testing import CliRunner

from peft_moe_lora.cli import app


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments):
    done = run(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_env_can_be_pasted():
    found = answer("env")
    assert found["torch"] == torch.__version__ or found["torch"] in torch.__version__
    assert found["backend"] in ("torch", "triton")
    assert {
        "peft_moe_lora",
        "python",
        "transformers",
        "peft",
        "triton",
        "gpu",
        "cuda",
    } <= found.keys()
    text = run("env").stdout
    assert "transformers" in text
    assert found["python"] in text


def test_inspect_says_format_modules_and_readers(qwen):
    found = answer("inspect", qwen.ours, "--base-config", qwen.config)
    assert (found["format"], found["modules"], found["num_experts"]) == ("moe_lora", 2, [E])
    assert found["readers"]["per_expert"].startswith("ok")
    text = run("inspect", qwen.ours).stdout
    assert "needs" not in text.split("readers")[0]
    assert "--base-config" in text


def test_convert_verify_and_back(qwen, tmp_path):
    done = answer("convert", qwen.ours, tmp_path / "p", "--base-config", qwen.config)
    assert (done["from"], done["to"], done["experts"]) == ("moe_lora", "per_expert", 2 * E)
    assert any("--max-lora-rank 8" in note for note in done["notes"])
    assert (
        run(
            "convert",
            tmp_path / "p",
            tmp_path / "back",
            "--to",
            "moe_lora",
            "--base-config",
            qwen.config,
        ).exit_code
        == 0
    )
    assert all(torch.equal(t, tensors(qwen.ours)[n]) for n, t in tensors(tmp_path / "back").items())
    found = answer("verify", qwen.ours, qwen.config, tmp_path / "p")
    assert found["ok"]
    assert found["max_error"] == 0
    assert found["compared"] == 2 * 2 * E
    assert answer("verify", qwen.ours, qwen.config)["ok"]


def test_merge_writes_the_merged_model(qwen, tmp_path):
    from transformers import AutoModelForCausalLM

    qwen.base.save_pretrained(tmp_path / "base")
    done = answer("merge", qwen.ours, tmp_path / "base", tmp_path / "merged")
    assert done["dtypes"] == ["float32"]
    assert done["merged"] == 2 * 3 * E
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert_close(outputs(merged), qwen.logits, 1e-5, "logits")


def test_every_outcome_has_its_exit_code(qwen, tmp_path):
    """0 done, 1 different, 2 usage, 3 bad, 4 refused, 5 exists; errors are one line on stderr."""
    config = ("--base-config", qwen.config)

    def fails(code, *arguments):
        done = run(*arguments)
        assert done.exit_code == code, (done.exit_code, done.output)
        assert not done.stdout or code in (1, 2)
        if code != 2:
            assert done.stderr.startswith("error: ")
            assert done.stderr.count("\n") == 1
        return done.stderr

    fails(2, "convert", qwen.ours)
    fails(2, "nonsense")
    fails(3, "inspect", tmp_path)
    fails(3, "convert", qwen.ours, tmp_path / "x", "--base-config", tmp_path)
    assert "--base-config" in fails(4, "convert", qwen.ours, tmp_path / "x")
    assert "per_expert" in fails(2, "convert", qwen.ours, tmp_path / "x", "--to", "gptq", *config)
    assert not list(tmp_path.iterdir())
    assert run("convert", qwen.ours, tmp_path / "x", "--to", "peft", *config).exit_code == 0
    assert "--force" in fails(5, "convert", qwen.ours, tmp_path / "x", "--to", "peft", *config)
    assert (
        run("convert", qwen.ours, tmp_path / "x", "--to", "peft", "--force", *config).exit_code == 0
    )
    rewrite(tmp_path / "x", lora_alpha=9)
    assert "differs" in fails(1, "verify", qwen.ours, qwen.config, tmp_path / "x")
    assert run("verify", qwen.ours, qwen.config, tmp_path / "x", "--tolerance", "1").exit_code == 0
    file = tmp_path / "x" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-2])
    fails(3, "verify", qwen.ours, qwen.config, tmp_path / "x")


def test_unsloth_names_the_option(qwen, tmp_path):
    convert_adapter(qwen.ours, tmp_path / "u", to="peft", base_config=qwen.config)
    rewrite(tmp_path / "u", base_model_name_or_path="unsloth/Qwen3-30B-A3B")
    done = run(
        "convert", tmp_path / "u", tmp_path / "o", "--to", "moe_lora", "--base-config", qwen.config
    )
    assert done.exit_code == 4
    assert "--b-layout" in done.stderr
    again = (
        "convert",
        tmp_path / "u",
        tmp_path / "o",
        "--to",
        "moe_lora",
        "--base-config",
        qwen.config,
    )
    assert run(*again, "--b-layout", "rank_major").exit_code == 0


# ---- the card ------------------------------------------------------------------------------------


def test_a_saved_adapter_has_a_card(qwen):
    card = (qwen.ours / "README.md").read_text()
    said = (
        "import peft_moe_lora",
        "expert-major",
        "rank: 4",
        "lora_alpha 8",
        "`experts`",
        "vllm serve",
    )
    said += (
        "--max-lora-rank 8",
        "sglang.launch_server",
        "peft-moe-lora convert",
        "library_name: peft",
    )
    assert [words for words in said if words not in card] == []


def test_saving_again_replaces_our_part_and_leaves_the_rest(qwen, tmp_path):
    model = save_ours(qwen.base, tmp_path / "a")
    card = tmp_path / "a" / "README.md"
    card.write_text(card.read_text() + "\n## Results\n\nIt works.\n")
    model.save_pretrained(tmp_path / "a")
    text = card.read_text()
    assert text.count("## LoRA on the experts") == 1
    assert "It works." in text


def test_what_belongs_to_an_adapter_comes_along_and_nothing_else(qwen, tmp_path):
    shutil.copytree(qwen.ours, tmp_path / "in")
    for name in ("tokenizer.json", "added_tokens.json", "trainer_state.json", "optimizer.pt"):
        (tmp_path / "in" / name).write_text("{}")
    card = tmp_path / "in" / "README.md"
    card.write_text(card.read_text() + "\n## Results\n\nIt works.\n")
    convert_adapter(tmp_path / "in", tmp_path / "out", to="peft")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
        "tokenizer.json",
        "added_tokens.json",
    }  # fmt: skip
    text = (tmp_path / "out" / "README.md").read_text()
    assert "It works." in text
    assert text.count("## LoRA on the experts") == 1
    assert "both expert-major" not in text


@pytest.mark.parametrize("to", ["peft", "per_expert", "vllm_3d", "sglang_3d"])
def test_a_converted_adapter_has_a_card_of_its_format(qwen, to, tmp_path):
    convert_adapter(qwen.ours, tmp_path / "o", to=to, base_config=qwen.config)
    text = (tmp_path / "o" / "README.md").read_text()
    assert "import peft_moe_lora" not in text
    assert ("vllm serve" in text) == (to != "sglang_3d")
    assert ("sglang.launch_server" in text) == (to != "vllm_3d")
    assert ("rank-major" in text) == (to in ("peft", "vllm_3d"))
    assert ("peft-moe-lora convert" in text) == (to in ("peft", "sglang_3d"))


def test_commands_on_a_card_are_ours(qwen, tmp_path):
    """The convert command of the card, run as it stands, with the names filled in."""
    text = card_section(
        OUR_CARD, {**config_of(qwen.ours), "base_model_name_or_path": str(qwen.config)}
    )
    (line,) = (line for line in text.splitlines() if line.startswith("peft-moe-lora convert"))
    shutil.copytree(qwen.ours, tmp_path / "ADAPTER")
    words = [
        str(tmp_path / word) if word.startswith("ADAPTER") else word for word in line.split()[1:]
    ]
    assert run(*words).exit_code == 0
    model = PeftModel.from_pretrained(copy.deepcopy(qwen.base), tmp_path / "ADAPTER-serving").eval()
    assert_close(outputs(model), qwen.logits, 1e-5, "logits")


def test_a_card_without_a_base_still_reads(tmp_path):
    write_card(
        tmp_path, FORMATS["peft"].card, {"r": 700, "lora_alpha": 1, "target_modules": "all-linear"}
    )
    text = (tmp_path / "README.md").read_text()
    assert "BASE" in text
    assert "--max-lora-rank 700" in text
