"""examples/benchmarks/layer.py on a CPU: every field, and no number for a route that is wrong."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "examples" / "benchmarks" / "layer.py"
# E, H, I, top_k all differ
TINY = [
    "--device",
    "cpu",
    "--shapes",
    "6,64,32,2",
    "--tokens",
    "40",
    "--rank",
    "4",
    "--repeat",
    "2",
]


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module, with ceilings that take no time to measure."""
    spec = importlib.util.spec_from_file_location("layer", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "layer", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(
        module, "measure_ceilings", lambda timer, probe: module.Ceilings(1e11, 1e10)
    )
    return module


def run(benchmark, tmp_path, capsys, *arguments):
    """(exit status, report, table lines by route) of one run."""
    status = benchmark.main([*TINY, "--json", str(tmp_path / "b.json"), *arguments])
    report = json.loads((tmp_path / "b.json").read_text())
    table = capsys.readouterr().out.splitlines()
    return status, report, {line.split()[3]: line for line in table if line.startswith("6,64,32,2")}


def test_report_has_every_field(benchmark, tmp_path, capsys):
    routes = ["moe_lora", "moe_lora-materialize", "peft", "torch", "base"]
    status, report, lines = run(
        benchmark, tmp_path, capsys, "--routes", *routes, "--plot", str(tmp_path / "b.png")
    )
    assert status == 0
    assert report.keys() == {
        "machine",
        "date",
        "what",
        "roofline",
        "command",
        "cold",
        "rest",
        "ceilings",
        "rows",
    }
    assert {"device", "python", "torch", "triton", "transformers", "peft"} <= report[
        "machine"
    ].keys()
    assert [row["peer"] for row in report["rows"]] == routes == list(lines)
    for row in report["rows"]:
        assert (row["E"], row["H"], row["I"], row["top_k"], row["T"], row["r"]) == (
            6,
            64,
            32,
            2,
            40,
            4,
        )
        assert (row["dtype"], row["lora"], row["skew"], row["failed"]) == (
            "float32",
            "float32",
            0,
            None,
        )
        for name in (
            "fwd",
            "step",
            "first",
            "held",
            "kept",
            "peak",
            "roof",
            "x_roof",
            "err",
            "edx",
        ):
            assert row[name] > 0, name
        assert row["peak"] > row["held"] > row["kept"]
        # on a CPU the ceilings are those at the start
        assert row["x_roof"] == row["x_roof_idle"] == pytest.approx(row["step"] / row["roof"])
        assert (row["flops"], row["bandwidth"]) == (1e11, 1e10)
        assert row["first_in_process"] is True
        assert (row["x_base"] is None) == (row["peer"] == "base")
        gradients = {
            f"d lora_{side}.{projection}" for side in "AB" for projection in ("gate_up", "down")
        }
        expected = {"out", "d x", "d top_k_weights"} | (
            gradients if row["peer"] != "base" else set()
        )
        assert row["errors"].keys() == expected
    assert (tmp_path / "b.png").stat().st_size > 10_000


def test_on_a_gpu_the_ceilings_take_their_turn_in_every_round(benchmark):
    case = benchmark.Case("tiny", 6, 64, 32, 2, 40, 4, torch.float32, 0.0, torch.device("cpu"))
    problem, probe = benchmark.Problem(case), benchmark.Probe(torch.device("cpu"), torch.float32)
    turns = []

    class Timer:
        """Of a GPU that slows down: every product takes 1 ms longer than the one before, all else 4 ms."""

        device, rest = torch.device("cuda"), 0.0

        def __call__(self, call, before, repeat):
            name = {probe.calls[0]: "product", probe.calls[1]: "copy"}.get(call, "route")
            turns.append(name)
            return [turns.count("product") if name == "product" else 4.0] * repeat, [0.1] * repeat

    routes = {"torch": benchmark.ROUTES["torch"](problem)}
    rows, idle = {"torch": benchmark.new_row(case, "torch")}, benchmark.Ceilings(1e11, 1e10)
    ceilings = benchmark.measure_times(problem, routes, rows, idle, probe, Timer(), 6, 3)
    assert turns == ["product", "copy", "route", "route"] * 3
    assert ceilings == probe.ceilings(2.0, 4.0)
    assert rows["torch"]["step"] == 4.0


def test_a_rested_card_is_timed_in_short_turns_after_a_pause(benchmark, monkeypatch):
    slept = []
    monkeypatch.setattr(benchmark.time, "sleep", slept.append)
    case = benchmark.Case("tiny", 6, 64, 32, 2, 40, 4, torch.float32, 0.0, torch.device("cpu"))
    problem, timer = benchmark.Problem(case), benchmark.Timer(torch.device("cpu"), rest=0.25)
    routes = {"torch": benchmark.ROUTES["torch"](problem)}
    rows, idle = {"torch": benchmark.new_row(case, "torch")}, benchmark.Ceilings(1e11, 1e10)
    benchmark.measure_times(problem, routes, rows, idle, None, timer, 4, 2)
    # forwards and steps, in each of two rounds
    assert slept == [0.25] * 4
    assert rows["torch"]["step"] > 0


def swap_two_experts(benchmark, problem, route):
    forward = route.forward
    # 0 <-> 1
    route.forward = lambda x, index, weights: forward(
        x, torch.where(index < 2, 1 - index, index), weights
    )


def leave_the_adapter_out(benchmark, problem, route):
    route.forward = benchmark.base(problem).forward


def double_one_gradient(benchmark, problem, route):
    route.adapter["lora_B.down"].register_hook(lambda gradient: 2 * gradient)


def lose_the_last_token(benchmark, problem, route):
    forward = route.forward

    def last_row_is_nan(x, index, weights):
        out = forward(x, index, weights)
        return torch.cat([out[:-1], out[-1:] * float("nan")])

    route.forward = last_row_is_nan


def raise_an_error(benchmark, problem, route):
    raise RuntimeError("out of 17 MiB")


@pytest.mark.parametrize(
    "damage",
    [
        swap_two_experts,
        leave_the_adapter_out,
        double_one_gradient,
        lose_the_last_token,
        raise_an_error,
    ],
    ids=lambda damage: damage.__name__,
)
def test_a_wrong_route_gets_no_number(benchmark, monkeypatch, tmp_path, capsys, damage):
    def broken(problem):
        route = benchmark.plain_torch(problem)
        damage(benchmark, problem, route)
        return route

    monkeypatch.setitem(benchmark.ROUTES, "broken", broken)
    status, report, lines = run(benchmark, tmp_path, capsys, "--routes", "broken", "torch")
    assert status == 1
    wrong, right = report["rows"]
    assert wrong["failed"]
    assert not any(wrong[name] for name in benchmark.NUMBERS)
    # what is left are the case's own sizes, in front of the name
    after = lines["broken"].split("broken")[1]
    assert "FAILED" in after
    assert not re.search(r"\d", after)
    assert right["failed"] is None
    assert right["step"] > 0


def test_roofline_is_that_of_the_published_formula(benchmark):
    sizes = (*benchmark.SHAPES["qwen3-30b"], 8192, 16)
    case = benchmark.Case("qwen3-30b", *sizes, torch.bfloat16, 0.0, torch.device("cuda"))
    # by hand: 2 * 65536 * 3 * 768 * 2048 = 618.5 GFLOP each way, + 13.4 and 26.8 of LoRA, at 780 TFLOP/s
    assert case.roof(benchmark.Ceilings(780e12, 4.23e12)) == pytest.approx(
        (631.9 + 645.3) / 780, rel=1e-3
    )
    # by hand: weights 1208 MB, x and out 67 MB, rows 403 MB; twice 67 and 604 MB backward; nothing but bytes counts
    bytes_ms = (1208.0 + 67.1 + 402.7 + 1208.0 + 134.2 + 604.0) / 1e3
    assert case.roof(benchmark.Ceilings(1e30, 1e12)) == pytest.approx(bytes_ms, rel=1e-3)
    assert case.goals() == (1.5, 205)


def test_skew_puts_most_rows_on_one_expert(benchmark):
    case = benchmark.Case("tiny", 6, 16, 8, 2, 500, 4, torch.float32, 0.9, torch.device("cpu"))
    share = benchmark.Problem(case).top_k_index.flatten().bincount(minlength=6) / 1000
    assert 0.88 < share.max() < 0.94


def test_default_cases_are_the_goals(benchmark):
    assert set(benchmark.GPU_CASES) == set(benchmark.GOALS)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shapes", "qwen"],
        ["--shapes", "8,64,32"],
        ["--tokens", "0"],
        ["--skew", "2"],
        ["--rank", "0"],
    ],
    ids=" ".join,
)
def test_bad_arguments_are_refused(benchmark, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.parse_arguments(arguments)
    assert arguments[0] in capsys.readouterr().err
