"""Two processes, each with its own batch, train as one process with both batches.

They run under DDP that does not look for unused parameters.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import FP32, DenseTwin, adapter_parameters, assert_close
from parallel.data_parallel import SCENARIOS, batches, build, loss_of, train

RANKS = [0, 1]
two_devices = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="one process per CUDA device, two of them"
)


@pytest.fixture(
    scope="module", params=["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, two_devices])]
)
def ranks(request, tmp_path_factory):
    """{"device": where they ran, rank: what data_parallel.py saved for it}."""
    folder = tmp_path_factory.mktemp(request.param)
    root = Path(__file__).parents[2]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "tests"), *sys.path]),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(Path(__file__).with_name("data_parallel.py"))]
    processes = [
        subprocess.Popen(
            [*command, str(rank), "2", str(folder), request.param], env=env, stderr=subprocess.PIPE
        )
        for rank in RANKS
    ]
    try:
        said = [process.communicate(timeout=240)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    device = torch.device("cuda" if request.param == "nccl" else "cpu")
    loaded = {rank: torch.load(folder / f"rank{rank}.pt", map_location=device) for rank in RANKS}
    return {"device": device, **loaded}


scenarios = pytest.mark.parametrize("name", SCENARIOS)


@scenarios
def test_experts_without_rows_are_what_is_tested(name, ranks):
    """In every layer some experts have rows on one rank only, and some on none."""
    for layer, first in ranks[0][name]["rows"].items():
        second = ranks[1][name]["rows"][layer]
        assert (first > 0).any()
        assert ((first == 0) & (second > 0)).any() or ((first > 0) & (second == 0)).any()


@scenarios
def test_every_parameter_gets_a_gradient_the_same_on_every_rank(name, ranks):
    for key, gradient in ranks[0][name]["gradients"].items():
        assert gradient is not None, key
        assert torch.equal(gradient, ranks[1][name]["gradients"][key].to(gradient.device)), key


@pytest.mark.engine("DDP", "train", "exact")
@scenarios
def test_gradients_are_those_of_one_process_with_both_batches(name, ranks):
    model = build(ranks["device"], **{**SCENARIOS[name], "use_reentrant": None})
    twin = DenseTwin(model)
    parts = batches(0, RANKS, SCENARIOS[name].get("micro_batches", 1))
    expected = twin.gradients(
        sum(loss_of(twin, ids.to(ranks["device"])) for ids in parts) / len(parts)
    )
    for key, gradient in ranks[0][name]["gradients"].items():
        assert expected[key].abs().max() > 0
        assert_close(gradient, expected[key], 5 * FP32, key)


@scenarios
def test_training_ends_where_one_process_ends(name, ranks):
    model = build(ranks["device"], **SCENARIOS[name])
    parameters = adapter_parameters(model)
    start = {key: parameter.detach().clone() for key, parameter in parameters.items()}
    train(model, parameters, ranks["device"], RANKS, **SCENARIOS[name])
    for key, parameter in parameters.items():
        ended = ranks[0][name]["parameters"][key]
        assert torch.equal(ended, ranks[1][name]["parameters"][key].to(ended.device)), key
        # relative to its change, not to its size
        assert_close(ended - start[key], parameter - start[key], 1e-3, key)


@pytest.mark.engine("DDP", "statistics", "exact")
def test_expert_loads_are_those_of_all_ranks(ranks):
    rows = [list(ranks[rank]["plain"]["rows"].values()) for rank in RANKS]
    for rank in RANKS:
        for load, first, second in zip(ranks[rank]["plain"]["load"].values(), *rows, strict=True):
            assert torch.equal(load, first + second)
    # the same count with checkpointing: tokens that run again are not counted
    for name in ("non-reentrant checkpointing", "reentrant checkpointing"):
        for load, plain in zip(
            ranks[0][name]["load"].values(), ranks[0]["plain"]["load"].values(), strict=True
        ):
            assert load.sum() == plain.sum()


def test_an_expert_that_no_rank_uses_stays_where_it_is(ranks):
    result = ranks[0]["plain"]
    unused = 0
    for layer, rows in ranks[0]["plain"]["rows"].items():
        for e in torch.where(rows + ranks[1]["plain"]["rows"][layer] == 0)[0].tolist():
            start = adapter_parameters(build(ranks["device"]))
            for projection in ("gate_up", "down"):
                key = f"{layer}.lora_A.default.{projection}"
                r = start[key].shape[0] // len(rows)
                mine = slice(e * r, (e + 1) * r)
                assert torch.equal(result["parameters"][key][mine], start[key][mine])
                assert not result["gradients"][key][mine].any()
                unused += 1
    assert unused, "every expert had rows: nothing was tested"
