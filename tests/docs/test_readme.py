"""README.md: its length, its chart, what fits, and that its code runs as it stands."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Qwen3MoeForCausalLM, TrainingArguments

import measured
import will_it_fit
from docs.blocks import README, ROOT, blocks, commands, run
from helpers import assert_close, outputs, tiny_model
from peft_moe_lora import MoELoraConfig
from peft_moe_lora.layers.layer import MoELoraLayer
from test_docs import tables

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
LONGEST = 900
LAPTOP, REAL = blocks(README, "python")
RESULTS = measured.read_results()


def words(text):
    """What stands between blanks and has a letter or a digit; code and tables count too."""
    return [word for word in text.split() if re.search(r"\w", word)]


def test_it_is_short():
    assert len(words(README.read_text("utf-8"))) <= LONGEST


# ---- the chart -----------------------------------------------------------------------------------


def bars(quantity):
    (panel,) = (panel for panel in RESULTS["chart"]["panels"] if quantity in panel["title"])
    return {bar["who"]: bar["value"] for bar in panel["bars"]}


def test_the_chart_has_the_results(tmp_path):
    (said,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README.read_text("utf-8"))
    assert ROOT / said == measured.CHART
    found = _texts(measured.CHART)
    for panel in RESULTS["chart"]["panels"]:
        assert set(panel["title"].split("\n")) <= found
        for bar in panel["bars"]:
            assert measured.label(bar["value"]) in found
    pytest.importorskip("matplotlib")
    measured.draw(RESULTS["chart"], tmp_path / "again.svg")
    assert _texts(tmp_path / "again.svg") == found, "run python examples/benchmarks/measured.py"


def _texts(path):
    """The texts of an SVG file."""
    found = ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")
    return {"".join(element.itertext()) for element in found}


def test_the_sentences_below_the_chart_have_the_results():
    text = README.read_text("utf-8")
    for quantity, unit in (("time of one", "ms"), ("kept by", "MiB")):
        for who, value in bars(quantity).items():
            named = {
                "ours": r"(?:backward:|keeps) {}",
                "unsloth": r"Unsloth (?:takes|keeps) {}",
                "peft": r"PEFT {}",
                "frozen": r"the frozen layer (?:without LoRA, on [^,]*, )?{}",
            }[who]
            assert re.search(named.format(rf"{value:,} {unit}"), text), (who, value, unit)
    dates = {bar["date"] for panel in RESULTS["chart"]["panels"] for bar in panel["bars"]} - {None}
    assert f"{min(dates)} to {max(dates)}" in text


def test_the_chart_and_the_table_of_layers_agree():
    table = RESULTS["tables"]["layers"]
    row = dict(zip(table["columns"], table["rows"][0], strict=True))
    assert row["shape (E, H, I, top-k), tokens"].endswith("8192")
    times, kept = bars("time of one"), bars("kept by")
    assert str(times["ours"]) == row["ours ms"]
    assert str(times["peft"]) == row["PEFT `target_parameters`"]
    assert str(times["unsloth"]) == row["unsloth_zoo"]
    assert (str(kept["ours"]), str(kept["peft"])) == (row["MiB ours"], row["MiB PEFT"])


# ---- what fits -----------------------------------------------------------------------------------


# the others take a minute
SHORT = (will_it_fit.Case("OLMoE-1B-7B", None, 16), will_it_fit.Case("Qwen3-30B-A3B", "nf4", 4))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.long] if case not in SHORT else [])
        for case in will_it_fit.CASES
    ],
    ids=str,
)
def test_the_table_of_what_fits_is_the_planners(case):
    (rows,) = tables(README)["Will it fit?"]
    written = list(rows[will_it_fit.CASES.index(case)].values())
    found = will_it_fit.row(case)
    again = "run python examples/benchmarks/will_it_fit.py"
    at = 4
    # releases of transformers and of this package differ by a few buffers
    assert float(written.pop(at)) == pytest.approx(float(found.pop(at)), abs=0.2), again
    assert written == found, again


def test_the_table_says_for_which_step_it_is():
    text = README.read_text("utf-8")
    assert f"1 x {will_it_fit.LENGTH} tokens with gradient checkpointing and Liger" in text
    assert len(tables(README)["Will it fit?"][0]) == len(will_it_fit.CASES) == 6


# ---- the code ------------------------------------------------------------------------------------


@pytest.fixture
def _one_thread_is_undone():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread_is_undone")
def test_the_laptops_code_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    statements = [line for line in LAPTOP.splitlines() if line and not line.startswith("#")]
    assert len(statements) <= 21
    # another test may have seen a GPU
    names = run(LAPTOP.replace('"out",', '"out", use_cpu=True,'), README, {})
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < losses[0] - 0.2
    assert_experts_were_trained(names["model"])
    # what was saved is what was trained, and merging keeps it
    ids = torch.arange(20)[None]
    trained = outputs(names["model"].eval(), ids)
    base = Qwen3MoeForCausalLM.from_pretrained("base").eval()
    assert (outputs(base, ids) - trained).abs().max() > 0.1
    loaded = PeftModel.from_pretrained(base, "adapter").eval()
    assert_close(outputs(loaded, ids), trained, 1e-5, "logits")
    merged = AutoModelForCausalLM.from_pretrained("merged").eval()
    assert_close(outputs(merged, ids), trained, 1e-4, "logits")
    _run_the_commands()


def _run_the_commands():
    """The README's commands, in the folder where its code ran; vLLM's is the model card's."""
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from peft_moe_lora.cli import app

    plan, convert, serve = (
        words for words in commands(README) if words[0] in ("peft-moe-lora", "vllm")
    )
    plan[plan.index("Qwen/Qwen3-30B-A3B")] = "base"
    for words in (plan, convert):
        done = CliRunner().invoke(app, words[1:])
        assert done.exit_code == 0, done.output
    card = Path("adapter-serving", "README.md").read_text("utf-8")
    assert " ".join(serve).replace("adapter=adapter-serving", "adapter=ADAPTER") in card
    verified = CliRunner().invoke(app, ["verify", "adapter", "base", "adapter-serving", "--json"])
    assert json.loads(verified.stdout)["max_error"] == 0
    assert json.loads(verified.stdout)["compared"] > 0


def test_the_real_models_code_is_the_row_that_fits_the_gpu_it_names(tmp_path, monkeypatch):
    """Its statements run on a tiny model, and are those of the row of the table."""
    text = README.read_text("utf-8")
    ((model, gpu, gb),) = re.findall(r"^(\S+) on one (.*) \((\d+) GB\) differs", text, re.M)
    assert will_it_fit.GPUS[gpu] == int(gb)
    (row,) = (
        row
        for row in tables(README)["Will it fit?"][0]
        if (row["model"], row["experts"], row["r"]) == (model, "NF4", "4")
    )
    assert row[f"{gpu} ({gb} GB)"] == "1"
    assert f"peft-moe-lora plan Qwen/{model} --quant nf4 --r 4 --checkpointing --liger" in text
    assert "rows of 2048 tokens" in text

    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("tiny")
    code = REAL
    for there, here in {
        f'"Qwen/{model}"': '"tiny"',
        '"bfloat16"': '"float32"',
        '"cuda:0"': '"cpu"',
        "use_liger_kernel=True": "use_liger_kernel=True, max_steps=1, use_cpu=True",
    }.items():
        assert there in code
        code = code.replace(there, here)
    names = run(_start() + code, README, {})
    assert set(names["targets"]) == set(will_it_fit.TARGETS)
    assert names["config"].r == 4
    arguments = names["arguments"]
    assert arguments.per_device_train_batch_size == 1
    assert arguments.use_liger_kernel
    assert arguments.learning_rate == 2e-4
    ids = torch.arange(3, 19)
    names["rows"] = [{"input_ids": ids, "labels": ids}] * 2
    # Liger's kernels need a GPU
    arguments.use_liger_kernel = False
    names = run(_end(), README, names)
    assert_experts_were_trained(names["model"])


def assert_experts_were_trained(model):
    """B starts at zero."""
    layers = [module for module in model.modules() if isinstance(module, MoELoraLayer)]
    assert layers
    for layer in layers:
        assert all((B != 0).any() for B in layer.lora_B["default"].parameters())


def _start():
    """The laptop's imports and targets."""
    (targets,) = re.findall(r"^targets = .*$", LAPTOP, re.M)
    imports = [line for line in LAPTOP.splitlines() if re.match("from|import", line)]
    return "\n".join([*imports, targets]) + "\n"


def _end():
    """The laptop's statements from the adapter to the saved file."""
    return LAPTOP[LAPTOP.index("model = get_peft_model") : LAPTOP.index("fresh =")]


def test_rate_alpha_and_targets_are_those_that_the_advice_begins_with():
    advice = (ROOT / "docs" / "choosing-rank.md").read_text("utf-8")
    rate = re.search(r"learning rate of (\S+) and a cosine schedule", advice)[1]
    names = run(_start() + REAL.split("base = ", 1)[1].split("\n", 1)[1], README, {})
    assert isinstance(names["arguments"], TrainingArguments)
    assert names["arguments"].learning_rate == float(rate)
    assert names["arguments"].lr_scheduler_type == "cosine"
    config = names["config"]
    assert isinstance(config, MoELoraConfig)
    assert config.lora_alpha == 2 * config.r
    assert f"target_modules={json.dumps(names['targets'])}" in advice
    for page in (advice, LAPTOP):
        assert "MoELoraConfig(r=16, lora_alpha=32, target_modules=" in page


def test_results_have_machine_and_date():
    found = json.loads(measured.RESULTS.read_text("utf-8"))
    for table in found["tables"].values():
        assert re.fullmatch(r"2026-\d\d-\d\d", table["date"])
        assert "NVIDIA" in table["machine"]
        assert table["command"]
    for said in found["said"]:
        assert said["machine"]
        assert said["of"]
        assert re.fullmatch(r"2026-\d\d-\d\d", said["date"])
