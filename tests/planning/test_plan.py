"""`plan` in Python and on the command line: what it says, and what it refuses."""

import json
from typing import get_args

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

from peft_moe_lora import MoELoraConfig, keep_experts, plan
from peft_moe_lora.ops.quantize import FORMATS
from peft_moe_lora.planning.gpus import CALIBRATED, COUNTS, GIB, GPU, GPUS, how_many
from peft_moe_lora.planning.optimizers import OPTIMIZERS
from planning.test_step import config

pytest.importorskip("typer")

from typer.testing import CliRunner

from peft_moe_lora.cli import BAD, app
from peft_moe_lora.cli.planning import GpuCount, OptimName, QuantName

SMALL = GPU("small", 11, 100, 1)
# bytes that tensors may take on it
ROOM = int(SMALL.usable)


@pytest.fixture
def folder(tmp_path):
    config().save_pretrained(tmp_path)
    return tmp_path


def test_it_says_memory_time_and_gpus():
    found = plan(config(), r=4, length=64, batch=2, checkpointing=True)
    assert found.peak_gib == found.step.peak / GIB
    assert found.batch.checkpointing
    assert found.gpus.keys() == {gpu.name for gpu in GPUS}
    assert set(found.gpus.values()) == {1}
    assert 0 < found.milliseconds() == 1e3 * found.step.seconds[CALIBRATED]
    compiled = plan(config(), r=4, length=64, batch=2, checkpointing=True, compile=True)
    assert compiled.milliseconds() == pytest.approx(0.8 * found.milliseconds())
    assert any("upper bound" in line for line in compiled.assumptions())
    assert f"{found.step.trainable:,} trained parameters" in str(found)


def test_trainable_parameters_are_those_of_a_real_model():
    found = plan(config(), r=4, target_modules=["experts", "q_proj"])
    model = get_peft_model(
        AutoModelForCausalLM.from_config(config()),
        MoELoraConfig(r=4, target_modules=["experts", "q_proj"]),
    )
    assert found.step.trainable == model.get_nb_trainable_parameters()[0]


def test_what_is_to_be_pasted_runs():
    found = plan(config(), r=4, batch=3, checkpointing=True)
    names = {"MoELoraConfig": MoELoraConfig, "TrainingArguments": TrainingArguments}
    exec("\n".join(found.paste()), names)
    assert names["config"].r == 4
    assert names["config"].target_modules == {"experts", "q_proj", "k_proj", "v_proj", "o_proj"}
    assert names["arguments"].per_device_train_batch_size == 3
    assert names["arguments"].optim == "adamw_torch_fused"
    kept = plan(config(), r=4, checkpointing=True, keep_experts=True).paste()
    exec("\n".join(kept), names | {"keep_experts": keep_experts})
    assert any("keep_experts" in line for line in kept)
    quantized = plan(config(), quant="nf4", liger=True, compile=True).paste()
    assert quantized[0].startswith("base = load_quantized(")
    assert "    use_liger_kernel=True," in quantized
    assert "    torch_compile=True," in quantized


@pytest.mark.parametrize(
    ("divided", "whole", "layer", "available", "count"),
    [
        (ROOM, 0, 0, None, 1),
        (ROOM, 1, 0, None, 2),
        (2 * ROOM, 0, 0, None, 2),
        (2 * ROOM, 0, ROOM // 4, None, 4),
        (9 * ROOM, 0, 0, None, None),
        (0, ROOM + 1, 0, None, None),
        (ROOM, 0, 0, 4, 4),
        (5 * ROOM, 0, 0, 4, None),
    ],
)
def test_how_many_gpus_hold_it(divided, whole, layer, available, count):
    assert how_many(SMALL, divided, whole, layer, available) == count


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"length": -1}, "length"),
        ({"batch": 0}, "batch"),
        ({"quant": "nf3"}, "quant must be None or one of"),
        ({"keep_experts": True}, "give checkpointing=True too"),
        ({"gpus": 3}, r"gpus must be None or one of \(1, 2, 4, 8\), got 3"),
    ],
)
def test_bad_numbers_are_refused_before_a_model_is_built(changes, says, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", None)
    with pytest.raises(ValueError, match=says):
        plan(config(), **changes)


# ---- the command line ----------------------------------------------------------------------------


def test_the_command_takes_an_optimizer(folder):
    words = ["plan", str(folder), "--r", "4", "--optim", "adamw_8bit", "--json"]
    found = json.loads(CliRunner().invoke(app, words).stdout)
    assert found == json.loads(json.dumps(plan(str(folder), r=4, optim="adamw_8bit").found()))
    assert '    optim="adamw_8bit",' in found["paste"]


def test_choices_are_those_of_the_package():
    assert get_args(QuantName) == FORMATS
    assert tuple(map(int, get_args(GpuCount))) == COUNTS
    assert get_args(OptimName) == tuple(OPTIMIZERS)


def test_the_command_prints_the_plan(folder):
    words = ["plan", str(folder), "--r", "4", "--length", "64", "--checkpointing", "--gpus", "2"]
    words += ["--keep-experts"]
    done = CliRunner().invoke(app, [*words, "--target", "experts", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    expected = plan(
        str(folder),
        r=4,
        length=64,
        checkpointing=True,
        keep_experts=True,
        gpus=2,
        target_modules=["experts"],
    )
    assert found == json.loads(json.dumps(expected.found()))
    assert found["gpus"]["H200"] == "2"
    assert sum(found["gib"].values()) == pytest.approx(found["peak_gib"], abs=0.05)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--r", "0"], 2),
        (["--quant", "nf3"], 2),
        (["--gpus", "3"], 2),
        (["--optim", "sgd"], 2),
        (["--optim", "adamw_8bit", "--gpus", "2"], BAD),
        (["--target", "nothing_like_this"], BAD),
    ],
)
def test_wrong_words_are_refused(folder, words, code):
    done = CliRunner().invoke(app, ["plan", str(folder), *words])
    assert done.exit_code == code
    assert not done.stdout


def test_a_folder_without_a_configuration_is_refused(tmp_path):
    done = CliRunner().invoke(app, ["plan", str(tmp_path)])
    assert done.exit_code == BAD
    assert done.stderr.startswith("error: ")
    assert torch.get_default_device().type == "cpu"
