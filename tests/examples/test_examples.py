"""The fine-tuning example learns, saves what it trained, and goes on after a stop."""

import json
import re
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

pytest.importorskip("typer")

from typer.testing import CliRunner

import texts
import verdict
from arguments import parse
from finetune import REAL, TINY, FinetuneArguments
from helpers.scripts import ROOT, run_example
from peft_moe_lora.cli import app

pytestmark = pytest.mark.timeout(600)

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}"


finetune = partial(run_example, "finetune.py")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo, with fewer steps than by default: its folder and what it printed."""
    output = tmp_path_factory.mktemp("demo") / "out"
    return output, finetune("--output", output, "--pretrain-steps", 200, "--steps", 100)


def test_the_demo_learns_the_new_text_and_keeps_what_it_learned(demo):
    output, done = demo
    results = json.loads((output / "results.json").read_text())
    before, after = results["before"], results["after"]
    assert before["documentation"] < 4.5  # guessing would cost ln 512 = 6.2 nats
    assert after["standard library"] < before["standard library"] - 0.2
    distance = results["distance_from_trained"]
    assert distance["base"] > 0.1  # the adapter has something to say, so that losing it would show
    assert 0 <= distance["reloaded"] < 1e-4
    assert 0 <= distance["merged"] < 1e-4
    assert f"{after['standard library']:.3f}" in done.stdout
    for name in ("base", "adapter", "merged", "loss.png", "results.json"):
        assert re.search(rf"^  {name} ", done.stdout, re.MULTILINE)
        assert (output / name).exists()


def test_the_demo_says_what_it_will_do_and_ends_with_a_verdict(demo):
    output, done = demo
    lines = done.stdout.splitlines()
    assert "less than two minutes" in lines[0]
    assert lines[1:5] == [line for line in lines if re.match(r"  \d\. ", line)]
    assert "200 steps" in lines[1]
    assert "100 steps" in lines[2]
    assert sum(line.startswith("PASS  ") for line in lines) == 4
    assert "Verdict: PASS, all 4 checks hold." in lines
    before, after = (
        next(line for line in lines if line.startswith(f"  {word}  "))
        for word in ("before", "after ")
    )
    assert before.split(maxsplit=1)[1] != after.split(maxsplit=1)[1]
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_next_command_runs_as_it_is_printed(demo, monkeypatch):
    """On a copy, so that the folder of the other tests stays as the demo left it."""
    output, done = demo
    command = shlex.split(done.stdout.splitlines()[-1])
    assert Path(command[0]).samefile(sys.executable)
    assert command[1:3] == ["-m", "peft_moe_lora"]
    monkeypatch.chdir(ROOT)
    ran = CliRunner().invoke(app, command[3:])
    assert ran.exit_code == 0, ran.output
    shutil.rmtree(output / "adapter-serving")


def test_a_failed_check_is_the_verdict_and_the_exit_code(capsys):
    checks = [verdict.Check("the first holds", True), verdict.Check("the second does not", False)]
    with pytest.raises(SystemExit, match="FAIL, 1 of 2 checks") as stopped:
        verdict.print_checks(checks)
    assert stopped.value.code not in (0, None)
    assert "PASS  the first holds\nFAIL  the second does not" in capsys.readouterr().out


def test_tokenizers_are_saved_with_models(demo):
    output, _ = demo
    base, *others = (
        AutoTokenizer.from_pretrained(output / name) for name in ("base", "adapter", "merged")
    )
    for other in others:
        assert other("def main():")["input_ids"] == base("def main():")["input_ids"]


def test_the_demo_shows_its_progress_and_no_warning(demo):
    _, done = demo
    assert "100/100" in done.stderr
    assert "warn" not in (done.stdout + done.stderr).lower()


def test_the_adapter_is_on_every_expert_and_the_merged_model_holds_it(demo):
    output, _ = demo
    adapter = load_file(output / "adapter" / "adapter_model.safetensors")
    experts = {
        key: tensor for key, tensor in adapter.items() if ".experts." in key and "lora_B" in key
    }
    assert len(experts) == 2 * 2  # layers, projections
    for tensor in experts.values():  # [N, r*E], expert-major
        assert (tensor.unflatten(1, (8, -1)).abs().amax(dim=(0, 2)) > 0).all(), (
            "an expert was never trained"
        )
    base, merged = (
        load_file(output / "base" / "model.safetensors"),
        load_file(output / "merged" / "model.safetensors"),
    )
    assert base.keys() == merged.keys()
    changed = {key for key in base if not torch.equal(base[key], merged[key])}
    assert changed == {key for key in base if re.search(r"experts|[qkvo]_proj", key)}


@pytest.fixture(scope="module")
def real(demo, tmp_path_factory):
    """A saved model with a chat template, and a JSONL with both kinds of rows."""
    folder = tmp_path_factory.mktemp("real")
    shutil.copytree(demo[0] / "base", folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    rows = [{"text": f"The square of {i} is {i * i}. " * 20} for i in range(40)]
    rows += [{"messages": [{"role": "user", "content": f"Square {i}." * 10}]} for i in range(40)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = [
        "--length",
        64,
        "--batch-size",
        4,
        "--steps",
        8,
        "--save-steps",
        4,
        "--learning-rate",
        5e-3,
    ]
    return folder, ["--model", folder / "model", "--data", folder / "data.jsonl", *size]


def test_a_model_of_your_own_learns_your_data_and_resumes_where_it_stopped(real, tmp_path):
    _, arguments = real
    through = finetune(*arguments, "--output", tmp_path / "through")
    results = json.loads((tmp_path / "through" / "results.json").read_text())
    assert results["after"]["data.jsonl"] < results["before"]["data.jsonl"] - 0.2
    assert not (tmp_path / "through" / "merged").exists()
    assert "warn" not in (through.stdout + through.stderr).lower()

    # what is left after a power cut at the fourth step
    shutil.copytree(tmp_path / "through" / "checkpoint-4", tmp_path / "stopped" / "checkpoint-4")
    refused = finetune(*arguments, "--output", tmp_path / "stopped", ok=False)
    assert "checkpoint-4 is there already; add --resume" in refused.stderr

    resumed = finetune(*arguments, "--output", tmp_path / "stopped", "--resume")
    assert "checkpoint-4" in resumed.stdout
    state = json.loads((tmp_path / "stopped" / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["global_step"] == 8
    whole = load_file(tmp_path / "through" / "adapter" / "adapter_model.safetensors")
    halves = load_file(tmp_path / "stopped" / "adapter" / "adapter_model.safetensors")
    first_half = load_file(tmp_path / "through" / "checkpoint-4" / "adapter_model.safetensors")
    for key, tensor in whole.items():
        torch.testing.assert_close(halves[key], tensor, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(first_half[key], tensor, rtol=1e-4, atol=1e-6), (
            "resuming had nothing to do"
        )


def test_messages_go_through_the_chat_template(real):
    folder, _ = real
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = texts.read_jsonl(folder / "data.jsonl", tokenizer)
    assert rows[3].startswith("The square of 3 is 9. ")
    assert rows[43] == "<user> " + "Square 3." * 10 + "\n"
    blocks = texts.pack(rows[:2], tokenizer, 16)
    ids = torch.cat([block["input_ids"] for block in blocks])
    assert (rows[0] + "<eos>" + rows[1]).startswith(tokenizer.decode(ids))
    assert (ids == tokenizer.eos_token_id).sum() == 1
    with pytest.raises(ValueError, match="less than one block of 4096"):
        texts.pack(rows[:1], tokenizer, 4096)


@pytest.mark.parametrize(
    ("line", "says"), [('{"txt": "a"}', r"line 2: has \['txt'\]"), ("{", "line 2: not JSON")]
)
def test_a_line_that_cannot_be_read_is_named(tmp_path, line, says):
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(ValueError, match=says):
        texts.read_jsonl(data, tokenizer=None)


def test_held_out_texts_are_never_trained_on():
    train, held_out = texts.hold_out(texts.documentation())
    assert len(held_out) >= 0.1 * len(train) > 0
    for text in held_out:
        _, _, body = text.partition("\n\n")
        assert body.strip()
        assert not any(body.strip() in other for other in train)


def test_defaults_are_those_of_the_tiny_model_or_of_a_real_one(tmp_path):
    words = ["--steps", "7", "--output", str(tmp_path)]
    tiny = parse(FinetuneArguments, "", TINY, REAL, words)
    assert (tiny.steps, tiny.length, tiny.save_steps) == (7, 128, 0)
    assert tiny.base == str(tmp_path / "base")
    own = ["--model", "somewhere", "--data", "some.jsonl", "--length", "64"]
    real = parse(FinetuneArguments, "", TINY, REAL, words + own)
    assert (real.steps, real.length, real.save_steps) == (7, 64, 100)
    assert real.base == "somewhere"


def test_a_model_without_data_is_refused():
    assert "--model needs --data" in finetune("--model", "somewhere", ok=False).stderr
