"""`peft-moe-lora run -- COMMAND ...`: PEFT's LoRA on experts, in a program that imports PEFT alone.

Where numbers are compared, a program runs as it is, and through `run`.
"""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import peft_moe_lora
from peft_moe_lora import cli

pytest.importorskip("typer")

from helpers import tiny_model
from interop.models import stacks_of

ROOT = Path(peft_moe_lora.__file__).parents[1]
SCRIPTS = Path(sys.executable).parent
RUN = [sys.executable, "-c", "from peft_moe_lora_command import main; main()", "run", "--"]
# the launcher of accelerate looks for a free port with this
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
NONE = "warning: no experts module ran through peft_moe_lora"

# a program that imports PEFT alone, and prints a loss
TRAIN = """
import sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.manual_seed(0)
config = LoraConfig(r=4, target_modules=[], target_parameters=sys.argv[2].split(","),
                    init_lora_weights=False)
model = get_peft_model(model, config).train()
ids = torch.arange(3, 25).view(2, 11)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for _ in range(3):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print("loss", loss.item())
"""


def environment(**variables):
    folders = [str(Path(cli.__file__).parent), str(ROOT)]
    return {**os.environ, **OFFLINE, "PYTHONPATH": os.pathsep.join(folders), **variables}


def started(*command, timeout=240, **variables):
    return subprocess.run(
        [*map(str, command)],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run(*command, **variables):
    return started(*RUN, *command, **variables)


def losses(text):
    return [float(line.split()[1]) for line in text.splitlines() if line.startswith("loss ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, and the program."""
    made = tmp_path_factory.mktemp("run")
    tiny_model().save_pretrained(made / "base")
    (made / "train.py").write_text(TRAIN)
    return made


@pytest.fixture(scope="module")
def parameters():
    return [f"mlp.experts.{name}" for name in stacks_of(tiny_model())]


# ---- what it costs, and what it says -------------------------------------------------------------


def test_a_process_without_peft_imports_nothing():
    seen = "import sys; print([n for n in ('torch', 'peft', 'peft_moe_lora') if n in sys.modules])"
    done = run(sys.executable, "-c", seen)
    assert (done.stdout, done.returncode) == ("[]\n", 0)
    first, last = done.stderr.splitlines()
    assert first.startswith("peft-moe-lora: experts that PEFT's target_parameters adapts run thr")
    assert last.startswith(f"peft-moe-lora: {NONE}")


def test_the_exit_code_is_the_programs():
    assert run(sys.executable, "-c", "raise SystemExit(7)").returncode == 7
    killed = run(sys.executable, "-c", "import os; os.kill(os.getpid(), 9)")
    assert killed.returncode == 128 + 9


def test_a_program_that_is_not_there_is_refused():
    done = run("no-such-program", "--an-option")
    assert done.returncode == 2
    assert "there is no program 'no-such-program'" in done.stderr
    assert NONE not in done.stderr


def test_another_sitecustomize_still_runs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import builtins; builtins.theirs = __file__")
    paths = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    code = "import sitecustomize, sys; print(theirs, sitecustomize.__file__, len(sys.meta_path))"
    plain = started(sys.executable, "-c", code, PYTHONPATH=paths)
    done = run(sys.executable, "-c", code, PYTHONPATH=paths)
    theirs = str(tmp_path / "sitecustomize.py")
    assert plain.stdout.split()[:2] == done.stdout.split()[:2] == [theirs, theirs]
    # the finder that waits for PEFT is there too
    assert int(done.stdout.split()[2]) == int(plain.stdout.split()[2]) + 1


def test_its_folder_is_gone_from_the_path_and_from_the_disk():
    code = "import os, sys; print(os.environ['PEFT_MOE_LORA_COUNTS'], sys.path)"
    done = run(sys.executable, "-c", code)
    made, _, path = done.stdout.strip().partition(" ")
    assert made not in path
    assert not Path(made).exists()


def test_a_signal_to_the_launcher_reaches_the_program():
    code = "import signal, time; signal.signal(15, lambda *_: exit(3)); print(1, flush=True); "
    launched = subprocess.Popen(
        [*RUN, sys.executable, "-c", f"{code} time.sleep(60)"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert launched.stdout.readline() == b"1\n"
    time.sleep(0.1)
    launched.send_signal(signal.SIGTERM)
    launched.communicate(timeout=30)
    assert launched.returncode == 3


# ---- programs ------------------------------------------------------------------------------------


@pytest.fixture
def plain_losses(folder, parameters, monkeypatch, capsys):
    """What the program prints by itself."""
    words = ["train.py", str(folder / "base"), ",".join(parameters)]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(folder / "train.py"))
    found = losses(capsys.readouterr().out)
    assert len(found) == 3
    return found


def test_a_python_file_trains_the_same_and_is_counted(folder, parameters, plain_losses):
    done = run(folder / "train.py", folder / "base", ",".join(parameters))
    assert done.returncode == 0, done.stderr
    assert losses(done.stdout) == pytest.approx(plain_losses, rel=1e-5)
    assert done.stderr.splitlines()[-1] == (
        "peft-moe-lora: 2 experts modules ran through peft_moe_lora in 1 process: 2 by torch"
    )


@pytest.mark.long
def test_a_program_without_experts_is_warned_about(folder):
    done = run(sys.executable, "-c", "import peft.tuners.lora.layer")
    assert done.stderr.splitlines()[-1].startswith(f"peft-moe-lora: {NONE}")


@pytest.mark.long
def test_a_program_that_calls_apply_to_peft_itself_is_counted_too(folder, parameters):
    own = folder / "own.py"
    own.write_text(f"import peft_moe_lora\npeft_moe_lora.apply_to_peft()\n{TRAIN}")
    done = run(own, folder / "base", ",".join(parameters))
    assert "2 experts modules ran through" in done.stderr.splitlines()[-1]


@pytest.mark.long
def test_a_python_without_the_package_says_so_and_trains(folder, parameters, plain_losses):
    """The launcher's Python has the package; that of the program has not."""
    refusing = folder / "refusing.py"
    refusing.write_text(f"import sys\nsys.modules['peft_moe_lora'] = None\n{TRAIN}")
    done = run(refusing, folder / "base", ",".join(parameters))
    assert done.returncode == 0, done.stderr
    assert "cannot import peft_moe_lora" in done.stderr
    assert NONE in done.stderr
    assert losses(done.stdout) == pytest.approx(plain_losses, rel=1e-6)


@pytest.mark.long
def test_accelerate_launch(folder, parameters, plain_losses):
    words = ["launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    done = run(
        SCRIPTS / "accelerate", *words, folder / "train.py", folder / "base", ",".join(parameters)
    )
    assert done.returncode == 0, done.stderr
    assert losses(done.stdout) == pytest.approx(plain_losses, rel=1e-5)
    assert "2 experts modules ran through peft_moe_lora in 1 process" in done.stderr


@pytest.mark.long
def test_the_processes_of_torchrun_are_summed(folder, parameters, plain_losses):
    words = ["--nproc-per-node", "2", "--master-port", "29611", folder / "train.py"]
    done = run(SCRIPTS / "torchrun", *words, folder / "base", ",".join(parameters))
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "peft-moe-lora: 4 experts modules ran through peft_moe_lora in 2 processes: 4 by torch"
    )
    assert sorted(losses(done.stdout)) == pytest.approx(sorted(2 * plain_losses), rel=1e-5)


@pytest.mark.long
def test_trl_sft_gives_the_same_losses(folder, parameters, monkeypatch, tmp_path):
    """TRL's own command line, with a JSONL and PEFT's parameters."""
    pytest.importorskip("trl")
    trl = shutil.which("trl", path=str(SCRIPTS))
    assert trl is not None
    monkeypatch.syspath_prepend(ROOT / "examples")
    from tiny import make_tokenizer

    base = tmp_path / "base"
    tiny_model(vocab_size=257, pad_token_id=0, eos_token_id=0, bos_token_id=None).save_pretrained(
        base
    )
    make_tokenizer(["a"], vocab_size=257).save_pretrained(base)
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"text": f"abc {i % 3} abc {i % 3}"} for i in range(16)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        *("sft", "--model_name_or_path", base, "--dataset_name", data, "--use_peft"),
        *("--lora_r", "4", "--lora_dropout", "0", "--lora_target_parameters", *parameters),
        *("--max_steps", "3", "--save_steps", "3", "--logging_steps", "1", "--use_cpu"),
        *("--per_device_train_batch_size", "4", "--max_length", "32", "--bf16", "False"),
        *("--learning_rate", "1e-2", "--report_to", "none"),
    ]
    plain = started(trl, *words, "--output_dir", tmp_path / "plain", timeout=280)
    assert plain.returncode == 0, plain.stderr
    done = run(trl, *words, "--output_dir", tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == (
        "peft-moe-lora: 2 experts modules ran through peft_moe_lora in 1 process: 2 by torch"
    )
    found = {}
    for name in ("plain", "ours"):
        state = json.loads((tmp_path / name / "checkpoint-3" / "trainer_state.json").read_text())
        found[name] = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(found["ours"]) == 3
    assert found["ours"][-1] < found["ours"][0]
    assert found["ours"] == pytest.approx(found["plain"], rel=1e-5)
