"""benchmarks/layer.py on a CPU: every field, and no number for a route that is wrong."""

import json
import re
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import comparison
import layer
import timing
from cases import Case, Problem, shape_of
from comparison import Candidate, Setup
from helpers.scripts import run as run_script
from layer_row import NUMBERS, new_row
from roofline import Ceilings, Probe, roof
from routes import ROUTES, WITHOUT_ADAPTER, Route, base_route, torch_route
from timing import Series, Timer

CPU = torch.device("cpu")
IDLE = Ceilings(1e11, 1e10)
# E, H, I, top_k all differ
SHAPE = "6,64,32,2"
ARGUMENTS = f"--device cpu --shapes {SHAPE} --tokens 40 --rank 4 --repeat 2".split()
GRADIENTS = {f"d lora_{side}.{name}" for side in "AB" for name in ("gate_up", "down")}


@pytest.fixture(autouse=True)
def _ceilings_that_take_no_time_to_measure(monkeypatch):
    monkeypatch.setattr(layer, "measure_ceilings", lambda timer, probe: IDLE)


def tiny_case(T: int = 40, skew: float = 0.0) -> Case:
    return Case("tiny", *shape_of(SHAPE), T, 4, torch.float32, skew, CPU)


def run(tmp_path: Path, capsys, *arguments: str) -> tuple[int, dict, dict[str, str]]:
    """(exit status, report, table lines by route) of one run."""
    path = tmp_path / "b.json"
    status = layer.main([*ARGUMENTS, "--json", str(path), *arguments])
    table = capsys.readouterr().out.splitlines()
    lines = {line.split()[3]: line for line in table if line.startswith(SHAPE)}
    return status, json.loads(path.read_text()), lines


def test_report_has_every_field(tmp_path, capsys):
    routes = ["moe_lora", "moe_lora-materialize", "peft", "peft-applied"]
    routes += ["torch", "base", "frozen"]
    plot = tmp_path / "b.png"
    status, report, lines = run(tmp_path, capsys, "--routes", *routes, "--plot", str(plot))
    assert status == 0
    keys = "machine date what roofline command cold rest ceilings rows".split()
    assert report.keys() == set(keys)
    machine = {"device", "python", "torch", "triton", "transformers", "peft"}
    assert machine <= report["machine"].keys()
    assert [row["peer"] for row in report["rows"]] == routes == list(lines)
    for row in report["rows"]:
        check_row(row)
    assert plot.stat().st_size > 10_000


def check_row(row: dict) -> None:
    """Every number of a route that passed on the tiny shape."""
    sizes = {"E": 6, "H": 64, "I": 32, "top_k": 2, "T": 40, "r": 4}
    kind = {"dtype": "float32", "lora": "float32", "skew": 0, "failed": None}
    assert row.items() >= (sizes | kind).items()
    for name in "fwd step first held kept peak roof x_roof err edx".split():
        assert row[name] > 0, name
    assert row["peak"] > row["held"] > row["kept"]
    # on a CPU the ceilings are those at the start
    assert row["x_roof"] == row["x_roof_idle"] == pytest.approx(row["step"] / row["roof"])
    assert (row["flops"], row["bandwidth"]) == IDLE
    assert row["first_in_process"] is True
    without_adapter = row["peer"] in WITHOUT_ADAPTER
    assert (row["x_base"] is None) == without_adapter
    expected = {"out", "d x", "d top_k_weights"}
    if not without_adapter:
        expected |= GRADIENTS
    assert row["errors"].keys() == expected


def test_on_a_gpu_the_ceilings_take_their_turn_in_every_round():
    problem = Problem(tiny_case())
    probe = Probe(CPU, torch.float32)
    turns = []

    class GpuTimer:
        """A GPU that slows down: each product takes 1 ms longer, everything else 4 ms."""

        device = torch.device("cuda")
        rest = 0.0

        def __call__(self, call, repeat, before=None):
            turns.append({probe.product: "product", probe.copy: "copy"}.get(call, "route"))
            ms = 4.0
            if call is probe.product:
                ms = float(turns.count("product"))
            return Series([ms] * repeat, [0.1] * repeat)

    candidate = Candidate(ROUTES["torch"](problem), new_row(problem.case, "torch", True))
    setup = Setup(GpuTimer(), probe, IDLE, repeat=6)
    ceilings = comparison.measure_times(problem, [candidate], setup)
    assert turns == ["product", "copy", "route", "route"] * 3
    assert ceilings == probe.ceilings(2.0, 4.0)
    assert candidate.row.step == 4.0
    assert candidate.row.host == 0.1


def test_a_rested_card_is_timed_in_short_turns_after_a_pause(monkeypatch):
    slept = []
    monkeypatch.setattr(timing.time, "sleep", slept.append)
    problem = Problem(tiny_case())
    candidate = Candidate(ROUTES["torch"](problem), new_row(problem.case, "torch", True))
    setup = Setup(Timer(CPU, rest=0.25), Probe(CPU, torch.float32), IDLE, repeat=4)
    comparison.measure_times(problem, [candidate], setup)
    # forwards and steps, in each of two rounds
    assert slept == [0.25] * 4
    assert candidate.row.step > 0


def test_every_timed_step_finds_new_versions_of_A_and_B(monkeypatch):
    problem = Problem(tiny_case())
    route = ROUTES["moe_lora"](problem)
    versions = []
    forward = route.forward

    def watched(*inputs: torch.Tensor) -> torch.Tensor:
        versions.append([parameter._version for parameter in route.adapter.values()])
        assert all(parameter.grad is None for parameter in route.adapter.values())
        return forward(*inputs)

    route.forward = watched
    candidate = Candidate(route, new_row(problem.case, "moe_lora", True))
    setup = Setup(Timer(CPU), Probe(CPU, torch.float32), IDLE, repeat=4)
    comparison.measure_times(problem, [candidate], setup)
    assert len(versions) > 4
    for earlier, later in pairwise(versions):
        assert all(a < b for a, b in zip(earlier, later, strict=True))


def swap_two_experts(problem: Problem, route: Route) -> None:
    forward = route.forward
    # 0 <-> 1
    route.forward = lambda x, index, weights: forward(
        x, torch.where(index < 2, 1 - index, index), weights
    )


def leave_the_adapter_out(problem: Problem, route: Route) -> None:
    route.forward = base_route(problem).forward


def double_one_gradient(problem: Problem, route: Route) -> None:
    route.adapter["lora_B.down"].register_hook(lambda gradient: 2 * gradient)


def lose_the_last_token(problem: Problem, route: Route) -> None:
    forward = route.forward

    def last_row_is_nan(*inputs: torch.Tensor) -> torch.Tensor:
        out = forward(*inputs)
        return torch.cat([out[:-1], out[-1:] * float("nan")])

    route.forward = last_row_is_nan


def raise_an_error(problem: Problem, route: Route) -> None:
    raise RuntimeError("out of 17 MiB")


DAMAGES = [
    swap_two_experts,
    leave_the_adapter_out,
    double_one_gradient,
    lose_the_last_token,
    raise_an_error,
]


def broken_route(problem: Problem, damage: Callable[[Problem, Route], None]) -> Route:
    route = torch_route(problem)
    damage(problem, route)
    return route


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_wrong_route_gets_no_number(monkeypatch, tmp_path, capsys, damage):
    monkeypatch.setitem(ROUTES, "moe_lora", partial(broken_route, damage=damage))
    status, report, lines = run(tmp_path, capsys, "--routes", "moe_lora", "torch")
    assert status == 1
    wrong, right = report["rows"]
    assert wrong["failed"]
    assert not any(wrong[name] for name in NUMBERS)
    # the rest are the case's own sizes, in front of the name
    _, _, after = lines["moe_lora"].partition("moe_lora")
    assert "FAILED" in after
    assert not re.search(r"\d", after)
    assert right["failed"] is None
    assert right["step"] > 0


def test_roofline_is_that_of_the_published_formula():
    shape = shape_of("qwen3-30b")
    cuda = torch.device("cuda")
    case = Case("qwen3-30b", *shape, 8192, 16, torch.bfloat16, 0.0, cuda)
    # by hand: 2 * 65536 * 3 * 768 * 2048 = 618.5 GFLOP each way, + 13.4 and 26.8 of LoRA
    flops_ms = (631.9 + 645.3) / 780
    assert roof(case, Ceilings(780e12, 4.23e12)) == pytest.approx(flops_ms, rel=1e-3)
    # by hand: weights 1208 MB, x and out 67 MB, rows 403 MB; backward twice 67, and 604 MB
    bytes_ms = (1208.0 + 67.1 + 402.7 + 1208.0 + 134.2 + 604.0) / 1e3
    assert roof(case, Ceilings(1e30, 1e12)) == pytest.approx(bytes_ms, rel=1e-3)
    assert case.goal == (1.5, 205)


def test_skew_puts_most_rows_on_one_expert():
    problem = Problem(tiny_case(T=500, skew=0.9))
    share = problem.top_k_index.flatten().bincount(minlength=6) / 1000
    assert 0.88 < share.max() < 0.94


def test_the_product_of_shapes_tokens_and_ranks_is_timed():
    words = "--device cpu --shapes mixtral 6,64,32,2 --tokens 8 16 --rank 1 2 --skew"
    args = layer.parse_arguments(words.split())
    cases = layer.list_cases(args)
    assert len(cases) == 2 * 2 * 2
    assert cases[0].label == "mixtral T=8 r=1 skew=0.9"
    assert (cases[-1].E, cases[-1].H, cases[-1].I, cases[-1].top_k) == (6, 64, 32, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--shapes", "qwen"],
        ["--shapes", "8,64,32"],
        ["--tokens", "0"],
        ["--skew", "2"],
        ["--rank", "0"],
        ["--rest", "-1"],
        ["--routes", "unsloth"],
    ],
    ids=" ".join,
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        layer.parse_arguments(arguments)
    assert arguments[0] in capsys.readouterr().err


SCRIPTS = ["goals", "layer", "quantized", "sweep", "train_step", "tune_kernels"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_starts_from_any_folder(script, tmp_path):
    path = Path(layer.__file__).with_name(f"{script}.py")
    done = run_script([path, "--help"], cwd=tmp_path)
    assert f"python examples/benchmarks/{script}.py" in done.stdout
