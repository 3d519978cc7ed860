"""Which launches become a CUDA graph. No GPU is needed: the capture is a fake."""

from collections import OrderedDict

import pytest
import torch

from peft_moe_lora.ops.kernels.launching import graphs


class Graph:
    """The launches during a capture."""

    def __init__(self):
        self.launched, self.replays = [], 0

    def replay(self):
        self.replays += 1


@pytest.fixture
def capturing(monkeypatch):
    """A list with one bool: whether somebody else captures. No CUDA is needed."""
    state = [False]
    driver = type(
        "",
        (),
        {"active": type("", (), {"get_current_stream": staticmethod(lambda index: "stream")})},
    )
    monkeypatch.setattr(graphs, "driver", driver)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state[0])

    def captured(self, launch):
        graph = Graph()
        launch("aside")
        return graph

    monkeypatch.setattr(graphs.Graphs, "_captured", captured)
    monkeypatch.setattr(graphs, "_recent", OrderedDict())
    return state


@pytest.fixture
def call():
    """Calls with these addresses; returns the streams of the launches."""
    of_a_kind = graphs.Graphs(torch.device("cuda", 0))

    def call(*addresses):
        streams = []
        of_a_kind(list(addresses), streams.append)
        return streams

    call.graphs, call.found = of_a_kind, lambda *addresses: graphs._recent[of_a_kind, addresses]
    return call


def test_the_third_call_at_the_same_addresses_is_captured_and_replayed(capturing, call):
    assert [call(1, None) for _ in range(5)] == [["stream"], ["stream"], ["aside"], [], []]
    assert call.found(1, None).replays == 3


def test_other_addresses_have_another_graph(capturing, call):
    for n in (1, 2):
        assert [call(n, 3) for _ in range(4)] == [["stream"], ["stream"], ["aside"], []]
    assert call.found(1, 3) is not call.found(2, 3)


def test_while_somebody_captures_launches_go_out_one_by_one(capturing, call):
    for _ in range(4):
        call(1)
    capturing[0] = True
    assert call(1) == ["stream"]
    capturing[0] = False
    assert call(1) == []


def test_graphs_do_not_pile_up_and_those_in_use_stay(capturing, call, monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 4)
    others = graphs.Graphs(torch.device("cuda", 0))
    for n in range(20):
        for _ in range(4):
            call("in use")
            # of another kind of call: the limit holds for all kinds together
            others([n], list)
    assert len(graphs._recent) == 4
    assert call.found("in use").replays == 78
    assert [call(n) for n in (1, 1, 1)] == [["stream"], ["stream"], ["aside"]]
    graphs.forget()
    assert call("in use") == ["stream"]


def test_kinds_of_calls_do_not_share_graphs(capturing, call):
    launched, other = [], graphs.Graphs(torch.device("cuda", 0))
    for _ in range(4):
        call(1)
    other([1], launched.append)
    assert launched == ["stream"]


def test_where_capturing_fails_launches_go_on(capturing, call, monkeypatch):
    monkeypatch.setattr(graphs.Graphs, "_captured", lambda self, launch: None)
    assert [call(1) for _ in range(5)] == [["stream"]] * 5


def test_what_cuda_refuses_is_logged_and_launched(capturing, call, monkeypatch, caplog):
    class Refusing:
        def __init__(self):
            raise RuntimeError("no graphs here")

    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Refusing)
    assert call.graphs._captured(print) is None
    assert "no graphs here" in caplog.text


def test_a_cpu_has_none():
    assert graphs.Graphs(torch.device("cpu")).refused
