"""benchmarks/lengths.py without a GPU: its counts add up, and everything is put back."""

import json

import pytest
import torch

import lengths
from cases import Case, Problem, shape_of
from peft_moe_lora.ops.kernels.launching.recent import Recent

CPU = torch.device("cpu")


def test_the_command_runs_on_a_cpu_and_writes_its_numbers(tmp_path, capsys):
    path = tmp_path / "lengths.json"
    assert lengths.main(["--device", "cpu", "--tiny", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [row["case"] for row in rows] == [
        "4 lengths, with graphs",
        "4 lengths, without graphs",
        "one length, with graphs",
        "one length, without graphs",
    ]
    # on a CPU nothing is replayed
    assert {row["python"] for row in rows} == {1.0}
    assert "in Python" in capsys.readouterr().out


@pytest.fixture
def stack(launches):
    """(a stack of layers whose kernels are fakes, its problem)."""
    case = Case("tiny", *shape_of("8,64,32,2"), 24, 4, torch.float32, 0.0, CPU)
    problem = Problem(case)
    return lengths.Stack(problem, 3), problem


def test_from_the_third_call_of_a_kind_on_launches_are_repeated(stack):
    row = lengths.run_case("fake kernels", *stack, [8, 16, 24, 8] * 4, with_graphs=True)
    assert row["launches"] == 1
    assert row["graph"] == row["python"] == row["captures"] == 0


def test_captures_and_launches_are_counted_and_nothing_else_changes(monkeypatch):
    graphs = lengths.graphs
    replayed = []
    graph = type("Graph", (), {"replay": lambda self: replayed.append(self)})()
    kept = Recent(2**30)
    monkeypatch.setattr(graphs, "kept", lambda device: kept)
    monkeypatch.setattr(graphs, "_sightings", Recent(8))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(graphs.Graphs, "_launch", lambda self, addresses: None)
    captured = graphs._Captured(None, graph)
    monkeypatch.setattr(graphs.Graphs, "_captured", lambda self, addresses: captured)
    before = dict(vars(graphs.Graphs)), dict(vars(lengths.replay._Replay))
    call = graphs.Graphs(torch.device("cuda", 0), print, 1)
    with lengths.counting() as counts:
        for _ in range(7):
            call([256])
    assert (counts.launches, len(counts.captures), len(replayed)) == (2, 1, 5)
    assert before == (dict(vars(graphs.Graphs)), dict(vars(lengths.replay._Replay)))


def test_without_graphs_the_share_is_zero_only_within():
    share = lengths.graphs.SHARE
    with lengths.graphs_kept(False, CPU):
        assert lengths.graphs.SHARE == 0
    assert lengths.graphs.SHARE == share > 0
