"""The example on quantized experts learns, saves, loads and merges; its benchmark runs."""

import json
import sys

import pytest
import torch

import quantized
import quantized_model
from helpers.scripts import run_example

# the tests of examples run one after the other, on one worker
pytestmark = [pytest.mark.xdist_group("examples"), pytest.mark.timeout(600)]


def test_the_example_learns_on_quantized_experts(tmp_path):
    done = run_example("qlora.py", "--output", tmp_path, "--pretrain-steps", 120, "--steps", 50)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["after"] < results["before"] - 0.08
    # 260,000 weights in fp32 are 1.0 MiB; most of them are experts'
    assert results["bytes"] < 0.4 * 2**20
    assert results["base"] > 0.05  # the adapter has something to say
    assert results["reloaded"] < 1e-4
    # only the rounding of the quantized experts is left
    assert results["merged"] < 0.5 * results["base"]
    assert "2 experts modules, 16 experts, 32 projections adapted" in done.stdout
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_the_benchmark_of_a_layer_checks_what_it_times(tmp_path):
    run_example(
        "benchmarks/quantized.py",
        "--formats",
        "nf4",
        "int8",
        "--tokens",
        16,
        "--repeat",
        1,
        "--json",
        tmp_path / "o",
    )
    dense, *quantized = json.loads((tmp_path / "o").read_text())
    assert [row["route"] for row in (dense, *quantized)] == ["dense", "nf4", "int8"]
    assert all(row["step"] > 0 and row["peak"] > 0 for row in (dense, *quantized))
    assert quantized[0]["weights"] < 0.14 * dense["weights"]


def test_the_benchmark_of_few_rows_times_every_way(tmp_path):
    run_example(
        "benchmarks/quantized.py", "--tokens", 1, 4, "--repeat", 1, "--json", tmp_path / "o"
    )
    found = json.loads((tmp_path / "o").read_text())
    assert [row["tokens"] for row in found] == [1, 4]
    for row in found:
        assert all(ms > 0 for times in row["ms"].values() for ms in times.values())
        assert len(row["ms"]) >= 2


def test_the_benchmark_of_a_model_trains_it(tmp_path):
    run_example(
        "benchmarks/quantized.py",
        "--model",
        "--steps",
        8,
        "--loss-chunk",
        20,
        "--json",
        tmp_path / "o",
    )
    found = json.loads((tmp_path / "o").read_text())
    assert found["trained"] > 20_000
    assert found["optimizer"] == "adamw_torch"
    # beside the two moments, a counter for each tensor
    assert found["state_bytes"] == pytest.approx(8 * found["trained"], rel=1e-2)
    assert found["losses"][-1] < found["losses"][0]


def test_the_benchmark_of_a_model_takes_an_optimizer(tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra [bitsandbytes] is not installed")
    file = tmp_path / "o"
    words = ["--model", "--steps", 8, "--rank", 64, "--optimizer", "adamw_8bit", "--json", file]
    run_example("benchmarks/quantized.py", *words)
    found = json.loads(file.read_text())
    assert found["optimizer"] == "adamw_8bit"
    assert found["losses"][-1] < found["losses"][0]
    # two bytes a parameter, and eight for the small ones
    assert 2 * found["trained"] < found["state_bytes"] < 3 * found["trained"]


def test_the_benchmark_of_a_model_compiles_layers_and_uses_one_thread(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    many = []
    loss_of = quantized_model.loss_of

    def noting(*words):
        many.append(torch._C._is_multithreading_enabled())
        return loss_of(*words)

    monkeypatch.setattr(quantized_model, "loss_of", noting)
    training = quantized_model.Training("nf4", 4, 16, 2, one_thread=True, compile_layers=True)
    found = quantized_model.train(training, torch.device("cpu"))
    assert [type(module).__name__ for module in compiled] == ["Qwen3MoeDecoderLayer"] * 2
    assert many == [False] * 2
    assert torch._C._is_multithreading_enabled()
    assert (found["format"], found["one_thread"], found["compile_layers"]) == ("nf4", True, True)


@pytest.mark.parametrize(("name", "fused"), [("adamw_torch", None), ("adamw_torch_fused", True)])
def test_the_benchmarks_other_optimizers_are_pytorchs(name, fused):
    optimizer = quantized_model.optimizer_class(name)([torch.nn.Parameter(torch.ones(3))], lr=1)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"] == fused


def test_an_optimizer_that_steps_in_backward_steps_as_one_of_all_parameters_does():
    start = [torch.ones(3), torch.full((2,), 2.0)]
    moved = {}
    for in_backward in (False, True):
        trained = [torch.nn.Parameter(t.clone()) for t in start]
        made = quantized_model.optimizers_of(trained, torch.optim.AdamW, in_backward)
        assert len(made) == (2 if in_backward else 1)
        for _ in range(3):
            sum(t.square().sum() for t in trained).backward()
            if not in_backward:
                made[0].step()
                made[0].zero_grad(set_to_none=True)
            # no gradient is left for later
            assert all(t.grad is None for t in trained)
        moved[in_backward] = trained
        # two moments in fp32 and a counter a tensor
        assert quantized_model.state_bytes(made) == 2 * 4 * 5 + 2 * 4
    for together, alone, before in zip(moved[False], moved[True], start, strict=True):
        assert torch.equal(together, alone)
        assert not torch.equal(together, before)


def test_an_optimizer_of_bitsandbytes_without_it_is_refused(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(SystemExit):
        quantized.parse_arguments(["--model", "--optimizer", "adamw_8bit"])
    assert "adamw_8bit needs bitsandbytes: pip install" in capsys.readouterr().err
