"""The recipes for many GPUs run as their README says, here on two processes without a GPU."""

import os
import re
import shlex
import socket
from dataclasses import fields

import pytest
from safetensors.torch import load_file
from transformers.distributed import DistributedConfig

from helpers import assert_close
from helpers.scripts import EXAMPLES, ROOT, run

RECIPES = EXAMPLES / "distributed"
STEPS = 4
# AdamW divides by the size of a gradient: where that is close to zero, rounding becomes a step
TOLERANCE = 1e-3
has_ep_size = "ep_size" in {field.name for field in fields(DistributedConfig)}
pytestmark = pytest.mark.timeout(600)


def command_of(script, config=""):
    """The command that the README gives for a script, for two processes and the tiny model."""
    words = rf"`([^`]*{config} [^`]*examples/distributed/{script} [^`]*)`"
    (command,) = re.findall(words, _readme())
    command = command.replace("--model NAME --data FILE.jsonl", f"--tiny --steps {STEPS}")
    return shlex.split(re.sub(r"(--num_processes|--nproc_per_node) 8", r"\1 2", command))


def _readme():
    return (RECIPES / "README.md").read_text("utf-8")


def free_port():
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def ran(command, output):
    """What a recipe printed, and the adapter that it wrote."""
    variables = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
    done = run([*command, "--output", output], variables=variables, cwd=ROOT)
    return done.stdout, load_file(output / "adapter" / "adapter_model.safetensors")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (tensor != 0).any(), f"{key} was not trained"
        assert_close(found[key], tensor, TOLERANCE, key)


@pytest.mark.parametrize(
    ("config", "engine"),
    [
        ("accelerate_fsdp2.yaml", "FSDP"),
        pytest.param("accelerate_zero3.yaml", "DEEPSPEED", marks=pytest.mark.long),
    ],
)
def test_the_trainer_by_accelerate_trains_what_one_process_trains(config, engine, tmp_path):
    script = "examples/distributed/train.py"
    words = command_of("train.py", config)
    assert words[:2] == ["accelerate", "launch"]
    at = words.index(script)
    # accelerate leaves both engines out on a CPU, and bf16 would round
    on_cpu = ["--main_process_port", free_port(), "--mixed_precision", "no"]
    on_cpu += ["--module", "parallel.on_cpu"]
    command = ["-m", "accelerate.commands.launch", *words[2:at], *on_cpu, *words[at:]]
    said, found = ran(command, tmp_path / "two")
    assert f"{engine}, 2 processes" in said
    _, expected = ran(words[at:], tmp_path / "one")
    assert_same(found, expected)


def losses_of(said):
    return [float(loss) for loss in re.findall(r"loss ([0-9.]+)", said)]


@pytest.mark.long
@pytest.mark.skipif(not has_ep_size, reason="this release of transformers has no ep_size")
def test_expert_parallelism_trains_what_one_process_trains(tmp_path):
    words = command_of("expert_parallel.py")
    assert words[0] == "torchrun"
    command = ["-m", "torch.distributed.run", *words[1:]]
    said, found = ran(command, tmp_path / "two")
    alone = [{"2": "1"}.get(word, word) for word in command]
    said_alone, expected = ran(alone, tmp_path / "one")
    losses = losses_of(said)
    assert len(losses) == STEPS
    assert losses == pytest.approx(losses_of(said_alone), abs=2e-4)
    assert_same(found, expected)
