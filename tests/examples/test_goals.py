"""benchmarks/goals.py on a CPU: what counts as met, the table, and no number for a wrong layer."""

import json
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch

import goals
import turns
from cases import Case, Problem, shape_of
from checking import CheckFailed, check_route, reference
from expert_modules import gpt_oss_experts, nemotron_experts, qwen3_experts
from goal_rows import SITUATIONS, chosen
from routes import Memory, moe_lora_route
from turns import Layer, Measured

CPU = torch.device("cpu")
# E, H, I, top_k all differ
CASE = Case("tiny", *shape_of("6,64,32,2"), 40, 4, torch.float32, 0.0, CPU)
TRY = "--device cpu --tiny --groups 2 --steps 1".split()


def test_a_goal_is_met_or_half_way_or_missed():
    assert goals.verdict(2.81, 2.6, 2.6) == "met"
    assert goals.verdict(2.81, 2.6, 2.61) == "half-way"
    assert goals.verdict(2.81, 2.6, 2.70) == "half-way"
    assert goals.verdict(2.81, 2.6, 2.71) == "missed"
    assert goals.verdict(2.81, 2.6, None) == "missed"
    assert goals.verdict(1.36, None, 1.0) is None


def outcome_table(numbers: dict[str, list[float]]) -> dict[str, goals.Outcome]:
    """Outcomes by name, of rows whose groups gave these numbers; no numbers is a failure."""
    situations = [s for s in SITUATIONS if s.name in numbers]
    found = []
    for situation in situations:
        measured = Measured(situation.layer(torch.float32, CPU, tiny=True), numbers[situation.name])
        measured.errors = {"out": 1e-3, "d x": 2e-3}
        if not measured.groups:
            measured.failed = "wrong out"
        found.append(measured)
    return {o.situation.name: o for o in goals.outcomes(situations, found)}


def test_a_row_is_held_against_another_by_the_ratio_of_their_medians():
    rows = outcome_table({"r = 16": [2.0, 9.0, 2.5], "r = 4": [2.56, 2.57, 2.58]})
    row = rows["r = 4"]
    assert row.ratio == pytest.approx(2.57 / 2.5, abs=5e-4)
    assert row.ratio_before == pytest.approx(3.07 / 2.81, abs=5e-4)
    assert row.verdict == "met"
    assert goals.cells(row) == [
        "r = 4",
        "3.07 ms (+9.3 %)",
        "at most +3.0 % of r = 16",
        "2.57 ms (+2.8 %)",
        "met",
        "2.0e-03",
    ]
    # half of the way from 9.3 % to 3 % is 6.1 %
    assert outcome_table({"r = 16": [2.5], "r = 4": [2.64]})["r = 4"].verdict == "half-way"
    assert outcome_table({"r = 16": [2.5], "r = 4": [2.66]})["r = 4"].verdict == "missed"


def test_a_number_is_compared_as_it_is_shown():
    assert outcome_table({"r = 16": [2.604]})["r = 16"].verdict == "met"
    assert outcome_table({"r = 16": [2.606]})["r = 16"].verdict == "half-way"
    assert outcome_table({"forward of T = 1, device": [45.4]}).popitem()[1].verdict == "met"


def test_a_failed_row_misses_its_goal_and_that_of_rows_held_against_it():
    rows = outcome_table({"r = 16": [], "r = 4": [2.5]})
    assert goals.cells(rows["r = 16"])[3:] == ["FAILED: wrong out", "missed", ""]
    assert goals.cells(rows["r = 4"])[3:5] == ["2.50 ms", "missed"]
    assert goals.summary(list(rows.values())) == "2 goals: 0 met, 0 half-way, 2 missed."


def test_patterns_choose_rows_and_what_they_are_held_against():
    assert [s.name for s in chosen(["r = 4", "T = 76?"])] == [
        "r = 16",
        "r = 4",
        "T = 768",
        "T = 767",
    ]
    assert chosen([]) == SITUATIONS
    with pytest.raises(ValueError, match=r"'r = 5' matches no row; the rows are: r = 16; "):
        chosen(["r = *", "r = 5"])


def test_every_row_has_its_own_name_and_starts_above_its_goal():
    by_name = {situation.name: situation for situation in SITUATIONS}
    assert len(by_name) == len(SITUATIONS)
    for situation in SITUATIONS:
        before = situation.before
        if situation.against is not None:
            before /= by_name[situation.against].before
        assert situation.goal is None or before > situation.goal, situation.name
        # other processes get it
        layer = situation.layer(torch.bfloat16, CPU, tiny=False)
        assert pickle.loads(pickle.dumps(layer)) == layer


def test_every_kind_of_row_is_measured_and_written(tmp_path, capsys):
    path = tmp_path / "goals.json"
    markdown = tmp_path / "goals.md"
    rows = ["lora_dropout*", "recompute*", "gpt-oss", "forward of T = 1,*"]
    arguments = [*TRY, "--json", str(path), "--markdown", str(markdown), "--rows", *rows]
    assert goals.main(arguments) == 0
    report = json.loads(path.read_text())
    assert [row["name"] for row in report["rows"]] == [s.name for s in chosen(rows)]
    for row in report["rows"]:
        assert row["failed"] is None
        assert len(row["groups"]) == 2
        assert row["now"] > 0
        assert row["verdict"] in goals.VERDICTS
        assert 0 < max(row["errors"].values()) < 1e-5
        # a step has the gradients too
        assert (len(row["errors"]) == 7) == (row["call"] == "step") == (row["kept"] is not None)
    found = {row["name"]: row for row in report["rows"]}
    assert found["recompute=True"]["kept"] < found["r = 16"]["kept"]
    assert found["lora_dropout = 0.05"]["dropout"] == 0.05
    assert found["gpt-oss"]["experts"] == "gpt_oss_experts"
    assert report["machine"]["torch"] == torch.__version__
    lines = capsys.readouterr().out.splitlines()
    assert markdown.read_text().splitlines() == lines
    assert sum(line.startswith("| ") for line in lines) == len(report["rows"]) + 2


def test_a_wrong_layer_has_no_number(monkeypatch, tmp_path, capsys):
    def without_scaling(problem, **settings):
        route = moe_lora_route(problem, **settings)
        route.forward.experts.scaling["default"] = 0.0
        return route

    monkeypatch.setattr(turns, "moe_lora_route", without_scaling)
    path = tmp_path / "goals.json"
    rows = ["r = 16", "forward of T = 1, device"]
    assert goals.main([*TRY, "--json", str(path), "--rows", *rows]) == 1
    for row in json.loads(path.read_text())["rows"]:
        assert row["failed"].startswith("wrong out")
        assert row["groups"] == []
        assert row["now"] is None
        assert row["verdict"] == "missed"
    assert "2 goals: 0 met, 0 half-way, 2 missed." in capsys.readouterr().out


@pytest.mark.parametrize("experts", [qwen3_experts, gpt_oss_experts, nemotron_experts])
def test_the_reference_is_that_of_the_experts_class_and_its_dropout(experts):
    case = replace(CASE, experts=experts, dropout=0.3)
    problem = Problem(case)
    expected = reference(problem, problem.scaling)
    check_route(problem, moe_lora_route(problem), expected)
    problem.case = CASE
    with pytest.raises(CheckFailed, match="wrong out"):
        check_route(problem, moe_lora_route(problem), expected)
    problem.case = case
    for name in problem.biases:
        problem.biases[name] = problem.biases[name].roll(1, 0)
        with pytest.raises(CheckFailed, match="wrong out"):
            check_route(problem, moe_lora_route(problem), expected)


def test_all_layers_have_a_turn_in_every_round(monkeypatch):
    turn_order = []
    make = partial(partial, turn_order.append)
    call = turns.CALLS["step"]._replace(make=lambda problem, route: make(problem.case.r))
    monkeypatch.setitem(turns.CALLS, "step", call)
    monkeypatch.setattr(turns, "measure_memory", lambda problem, route: Memory(0.0, 0.0, 0.0))
    layers = [Layer(replace(CASE, r=r)) for r in (1, 2)]
    rounds = []
    found = turns.measure(layers, 2, 1, lambda: rounds.append(len(turn_order)))
    once = [1] * (turns.WARM + 1) + [2] * (turns.WARM + 1)
    assert turn_order == 2 * once
    assert rounds == [0, len(once)]
    assert [len(measured.groups) for measured in found] == [2, 2]


def test_bad_arguments_are_refused(capsys):
    for arguments in (["--rows", "r = 5"], ["--steps", "0"], ["--rest", "-1"], ["--rest", "nan"]):
        with pytest.raises(SystemExit, match="2"):
            goals.parse_arguments(arguments)
        assert arguments[0] in capsys.readouterr().err


def test_a_shrunk_shape_keeps_its_kind():
    (situation,) = chosen(["widths *"])
    case = situation.layer(torch.float32, CPU, tiny=True).case
    assert (case.H % 16, case.I % 16) == (2000 % 16, 760 % 16) == (0, 8)
    assert case.T < 100 > case.H
