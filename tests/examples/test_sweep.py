"""benchmarks/sweep.py on a CPU: where a cost jumps, the axes, the files, and the picture."""

import json
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

import sweep
import turns
from axes import AXES, RANK, SHAPE, TOKENS, Point
from roofline import Ceilings
from routes import Memory
from smooth import above, is_flagged, line_between_neighbours
from sweep_picture import draw
from turns import Measured

TRY = "--device cpu --tiny --groups 1 --steps 1".split()
RED = "#d62728"


@pytest.fixture
def _matplotlib():
    """Of tests that draw."""
    pytest.importorskip("matplotlib")


# ---- smooth ------------------------------------------------------------------------------------


def test_the_line_between_two_neighbours_is_straight_in_x():
    line = line_between_neighbours([1, 2, 4, 8], [1.0, 9.0, 4.0, 8.0])
    assert line == pytest.approx([None, 2.0, 8.0 + 2 / 3, None])
    assert line_between_neighbours([3], [1.0]) == [None]
    assert line_between_neighbours([], []) == []


def test_what_was_not_measured_is_no_neighbour():
    line = line_between_neighbours([1, 2, 3, 5], [1.0, None, 7.0, 5.0])
    assert line == pytest.approx([None, None, 3.0, None])


def test_ten_percent_above_the_line_is_allowed_and_no_more():
    assert not is_flagged(1.1, 1.0)
    assert is_flagged(1.101, 1.0)
    assert not is_flagged(0.5, 1.0)
    assert not is_flagged(9.0, None)
    assert not is_flagged(None, 1.0)
    assert above(1.5, 1.0) == 0.5
    assert above(1.5, None) is above(None, 1.5) is None


@pytest.mark.parametrize(
    ("xs", "costs", "said"),
    [([1, 3, 2], [1.0] * 3, "2 follows 3"), ([1, 1], [1.0] * 2, "1 follows 1"), ([1], [], "1 xs")],
)
def test_points_out_of_order_are_refused(xs, costs, said):
    with pytest.raises(ValueError, match=said):
        line_between_neighbours(xs, costs)


# ---- the axes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AXES)
def test_an_axis_changes_one_quantity_and_x_increases(name):
    changed = {"r": "r", "T": "T", "E": "shape", "width": "shape", "dropout": "r"}[name]
    for quick in (False, True):
        points = AXES[name].points(quick)
        for point in points:
            usual = Point(point.x, point.label, point.curve, SHAPE, TOKENS, RANK, point.dropout)
            assert replace(point, **{changed: getattr(usual, changed)}) == usual
            assert point.shape.top_k == SHAPE.top_k
            assert (point.shape.E == SHAPE.E) or (name == "E" and point.shape.H == SHAPE.H)
        for left, right in pairwise(points):
            assert left.x < right.x or left.curve != right.curve
        assert len({point.label for point in points}) == len(points)
    quick_labels = {point.label for point in AXES[name].points(True)}
    labels = {point.label for point in AXES[name].points(False)}
    assert quick_labels < labels


def test_the_axes_reach_as_far_as_they_say():
    ends = {}
    for name, axis in AXES.items():
        points = axis.points(False)
        ends[name] = (points[0].x, points[-1].x)
    assert ends["r"] == (1, 256)
    assert ends["T"] == (64, 32768)
    assert ends["E"] == (8, 512)
    assert {point.dropout for point in AXES["dropout"].points(False)} == {0.0, 0.05}
    assert sum(len(axis.points(False)) for axis in AXES.values()) <= 105


# ---- the run -----------------------------------------------------------------------------------


def with_costs(monkeypatch, costs: dict[str, float | None]) -> None:
    """Layers of the sweep get these ms by label, others 2 ms; None is a failure."""

    def measure(layers, groups, steps, each_round):
        each_round()
        found = []
        for layer in layers:
            measured = Measured(layer, [costs.get(layer.case.name, 2.0)] * groups)
            measured.errors = {"out": 1e-3}
            if measured.groups[0] is None:
                measured.fail(RuntimeError("out of memory"))
            found.append(measured)
        return found

    class Floor:
        def __init__(self, *arguments):
            pass

        def add_round(self):
            pass

        def ceilings(self):
            return Ceilings(1e9, 1e9)

    monkeypatch.setattr(sweep, "measure", measure)
    monkeypatch.setattr(sweep, "Floor", Floor)


def run(tmp_path, *arguments: str) -> tuple[int, dict]:
    status = sweep.main([*TRY, "--out", str(tmp_path), *arguments])
    return status, json.loads((tmp_path / "sweep.json").read_text())


@pytest.mark.usefixtures("_matplotlib")
def test_a_jump_is_flagged_on_its_own_curve_and_red(monkeypatch, tmp_path, capsys):
    with_costs(monkeypatch, {"r = 15": 2.3, "r = 24, dropout = 0.05": 3.0})
    status, report = run(tmp_path, "--axis", "r", "dropout")
    assert status == 0
    for name, flagged in (("r", ["r = 15"]), ("dropout", ["r = 24, dropout = 0.05"])):
        points = report["axes"][name]["points"]
        assert [point["label"] for point in points if point["flagged"]] == flagged
        (jump,) = (point for point in points if point["flagged"])
        assert jump["line"] == 2.0
        assert jump["above"] == pytest.approx(jump["ms"] / 2 - 1)
        for point in points:
            assert point["over_floor"] == pytest.approx(point["ms"] / point["floor"])
            assert point["floor"] > 0
    out = capsys.readouterr().out
    assert out.count("<-- jumps") == 2
    assert "2 jump: r = 15, r = 24, dropout = 0.05" in out
    picture = (tmp_path / "sweep.svg").read_text()
    assert picture.count(RED) >= 2
    assert "r = 15" in picture
    assert len(picture) < 100_000


@pytest.mark.usefixtures("_matplotlib")
def test_a_smooth_curve_has_no_red_point(monkeypatch, tmp_path):
    with_costs(monkeypatch, {})
    _, report = run(tmp_path, "--axis", "T", "--quick")
    assert not any(point["flagged"] for point in report["axes"]["T"]["points"])
    assert RED not in (tmp_path / "sweep.svg").read_text()


def test_a_failed_point_has_no_number_and_is_no_neighbour(monkeypatch, tmp_path, capsys):
    with_costs(monkeypatch, {"r = 15": None, "r = 16": 2.3})
    status, report = run(tmp_path, "--axis", "r", "--quick")
    assert status == 1
    points = {point["label"]: point for point in report["axes"]["r"]["points"]}
    failed = points["r = 15"]
    assert failed["failed"] == "raised RuntimeError: out of memory"
    assert failed["ms"] is failed["over_floor"] is failed["worst"] is failed["line"] is None
    assert not failed["flagged"]
    # between r = 12 and r = 17
    assert points["r = 16"]["line"] == 2.0
    assert points["r = 16"]["flagged"]
    assert "failed: r = 15" in capsys.readouterr().err


def test_an_axis_that_would_begin_too_late_is_left_out_and_named(monkeypatch, tmp_path, capsys):
    with_costs(monkeypatch, {})
    status, report = run(tmp_path, "--axis", "r", "E", "--seconds", "-1")
    assert status == 1
    assert report["left_out"] == ["r", "E"]
    assert "left out: r, E" in capsys.readouterr().err


@pytest.mark.usefixtures("_matplotlib")
def test_a_report_is_drawn_again_without_measuring(monkeypatch, tmp_path):
    with_costs(monkeypatch, {"E = 64": 3.0})
    _, report = run(tmp_path, "--axis", "E", "--quick")
    first = (tmp_path / "sweep.svg").read_bytes()
    (tmp_path / "sweep.svg").unlink()
    arguments = ["--draw", str(tmp_path / "sweep.json"), "--out", str(tmp_path)]
    assert sweep.main(arguments) == 0
    assert (tmp_path / "sweep.svg").read_bytes() == first
    draw(report, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_without_matplotlib_the_numbers_are_there_and_the_way_to_draw_them(
    monkeypatch, tmp_path, capsys
):
    with_costs(monkeypatch, {})
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, report = run(tmp_path, "--axis", "r", "--quick")
    assert status == 0
    assert report["axes"]["r"]["points"]
    assert not (tmp_path / "sweep.svg").exists()
    assert "run sweep.py --draw sweep.json" in capsys.readouterr().err


def test_points_are_measured_and_checked(monkeypatch, tmp_path):
    axis = replace(AXES["dropout"], values=(17,))
    monkeypatch.setitem(AXES, "dropout", axis)
    monkeypatch.setattr(turns, "measure_memory", lambda problem, route: Memory(3.0, 2.0, 4.0))
    monkeypatch.setattr(sweep, "Probe", lambda device, dtype: FakeProbe())
    status, report = run(tmp_path, "--axis", "dropout")
    assert status == 0
    result = report["axes"]["dropout"]
    assert result["ceilings"] == {"flops": 2e9, "bandwidth": 1e9}
    assert [point["dropout"] for point in result["points"]] == [0.0, 0.05]
    for point in result["points"]:
        assert point["ms"] > 0
        assert point["kept"] == 2.0
        assert 0 < point["worst"] < 1e-5
        assert len(point["errors"]) == 7
    assert {"machine", "date", "command", "what", "floor", "allowed"} <= report.keys()


class FakeProbe:
    """A machine whose ceilings take no time to measure."""

    def __call__(self, timer, products, copies):
        return 1.0, 2.0

    def ceilings(self, product_ms, copy_ms):
        return Ceilings(2e9 * product_ms, 2e9 / copy_ms)


def test_bad_arguments_are_refused(capsys):
    for arguments in (["--axis", "q"], ["--groups", "0"]):
        with pytest.raises(SystemExit, match="2"):
            sweep.parse_arguments(arguments)
        assert arguments[0] in capsys.readouterr().err
