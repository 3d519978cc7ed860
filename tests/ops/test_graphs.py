"""Which launches become a CUDA graph. No GPU is needed: the capture is a fake."""

import random

import pytest
import torch

from peft_moe_lora.ops.kernels.launching import graphs
from peft_moe_lora.ops.kernels.launching.recent import Recent

DEVICE = torch.device("cuda", 0)
LAYERS = 48
# launches of a forward and of a backward
FORWARD, BACKWARD = 12, 16


class Graph:
    """A graph that counts its replays."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


@pytest.fixture
def capturing(monkeypatch):
    """A list with one bool: whether somebody else captures. No CUDA is needed."""
    state = [False]
    stream = staticmethod(lambda index: "stream")
    driver = type("", (), {"active": type("", (), {"get_current_stream": stream})})
    monkeypatch.setattr(graphs, "driver", driver)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state[0])
    kept = Recent(2**30)
    monkeypatch.setattr(graphs, "kept", lambda device: kept)
    monkeypatch.setattr(graphs, "_sightings", Recent(graphs.COUNTED))

    def captured(self, addresses):
        self.launch(addresses, "aside")
        return graphs._Captured(self, Graph())

    monkeypatch.setattr(graphs.Graphs, "_captured", captured)
    return state


@pytest.fixture
def new(capturing):
    """Makes the graphs of a new kind of call, as a function that returns the streams used."""

    def new(num_launches=1):
        streams = []
        of_a_kind = graphs.Graphs(DEVICE, lambda addresses, stream: streams.append(stream), 1)
        of_a_kind.nbytes = num_launches

        def call(*addresses):
            streams.clear()
            of_a_kind(list(addresses))
            return streams.copy()

        call.graphs = of_a_kind
        return call

    return new


def test_the_third_call_at_the_same_addresses_is_captured_and_replayed(new):
    call = new()
    assert [call(1, 7) for _ in range(5)] == [["stream"], ["stream"], ["aside"], [], []]
    (captured,) = graphs.kept(DEVICE).values()
    assert captured.graph.replays == 3


def test_other_addresses_have_another_graph(new):
    call = new()
    for n in (1, 2):
        assert [call(n, 3) for _ in range(4)] == [["stream"], ["stream"], ["aside"], []]
    first, second = graphs.kept(DEVICE).values()
    assert first.graph is not second.graph


def test_kinds_of_calls_do_not_share_graphs(new):
    call, other = new(), new()
    for _ in range(4):
        call(1)
    assert other(1) == ["stream"]


def test_while_somebody_captures_launches_go_out_one_by_one(new, capturing):
    call = new()
    for _ in range(4):
        call(1)
    capturing[0] = True
    assert call(1) == ["stream"]
    capturing[0] = False
    assert call(1) == []


def test_where_capturing_fails_launches_go_on(new, monkeypatch):
    call = new()
    monkeypatch.setattr(graphs.Graphs, "_captured", lambda self, addresses: None)
    assert [call(1) for _ in range(5)] == [["stream"]] * 5
    assert call.graphs.refused


def test_a_capture_that_fails_drops_the_graphs_of_the_same_call(new, monkeypatch):
    call, other = new(), new()
    for _ in range(4):
        call(1)
        other(1)
    kept = graphs.kept(DEVICE)
    assert len(kept) == 2
    monkeypatch.setattr(graphs.Graphs, "_captured", lambda self, addresses: None)
    for _ in range(3):
        call(2)
    assert call.graphs.refused
    assert [captured.owner for captured in kept.values()] == [other.graphs]


def test_what_cuda_refuses_is_logged_and_launched(new, monkeypatch, caplog):
    class Refusing:
        def __init__(self):
            raise RuntimeError("no graphs here")

    call = new()
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Refusing)
    assert call.graphs._captured([1]) is None
    assert "no graphs here" in caplog.text


def test_a_cpu_has_none():
    assert graphs.Graphs(torch.device("cpu"), print, 1).refused


def test_forgetting_drops_the_graphs_of_one_kind_or_all(new, monkeypatch):
    call, other = new(), new()
    for _ in range(4):
        call(1)
        other(1)
    call.graphs.forget()
    assert call(1) == ["stream"]
    assert other(1) == []
    kept = graphs.kept(DEVICE)
    cleared = []
    monkeypatch.setattr(graphs.kept, "cache_clear", lambda: cleared.append(kept), raising=False)
    graphs.forget()
    assert cleared == [kept]
    assert not len(graphs._sightings)


def test_the_memory_of_graphs_is_a_share_of_the_device(monkeypatch):
    properties = type("", (), {"total_memory": 80 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    graphs.kept.cache_clear()
    assert graphs.kept(DEVICE).limit == 80 * 2**30 // 180
    graphs.kept.cache_clear()
    one, two = (graphs.Graphs(DEVICE, print, n).nbytes for n in (1, 2))
    assert 0 < two - one < one


# ---- what is captured where not every graph has room


def test_a_graph_larger_than_the_limit_is_never_captured(new):
    graphs.kept(DEVICE).limit = 3
    call = new(num_launches=4)
    assert [call(1) for _ in range(50)] == [["stream"]] * 50


def test_graphs_in_use_stay_and_the_others_wait(new):
    graphs.kept(DEVICE).limit = 2
    call = new()
    for _ in range(100):
        streams = [call(n) for n in range(5)]
    assert streams == [[], [], ["stream"], ["stream"], ["stream"]]


def test_a_graph_of_the_past_makes_room_after_some_patience(new):
    graphs.kept(DEVICE).limit = 2
    call = new()
    for n in (1, 2) * 4:
        call(n)
    streams = [call(3) for _ in range(graphs.PATIENCE + 2)]
    assert streams == [["stream"]] * graphs.PATIENCE + [["aside"], []]
    # one went, the least recently used
    assert call(2) == []
    assert call(1) == ["stream"]


def test_one_use_of_the_graph_in_the_way_renews_the_wait(new):
    graphs.kept(DEVICE).limit = 1
    call = new()
    for _ in range(4):
        call(1)
    for _ in range(graphs.PATIENCE - 1):
        assert call(2) == ["stream"]
    assert call(1) == []
    streams = [call(2) for _ in range(2 * graphs.PATIENCE)]
    assert ["aside"] in streams
    assert streams.index(["aside"]) > graphs.PATIENCE


def test_a_large_graph_waits_for_all_that_it_would_drop(new):
    graphs.kept(DEVICE).limit = 3
    small, large = new(), new(num_launches=3)
    for n in (1, 2, 3) * 4:
        small(n)
    # 1 and 2 are of the past, 3 is in use
    for _ in range(5 * graphs.PATIENCE):
        assert large(9) == ["stream"]
        assert small(3) == []
    assert [large(9) for _ in range(3 * graphs.PATIENCE)][-1] == []
    assert small(3) == ["stream"]


# ---- whole runs


class Run:
    """A model whose layers call a forward and a backward for each length, and what became of it.

    Attributes:
        by: how many calls were {"launches", "capture", "graph"}.
        largest: the largest size that the graphs took, in bytes.
    """

    def __init__(self, limit, sets_of_addresses=1, backward=True):
        self.kept = graphs.kept(DEVICE)
        self.kept.limit = limit
        self.sets_of_addresses = sets_of_addresses
        self.streams = []
        self.by = {"launches": 0, "capture": 0, "graph": 0}
        self.largest = 0
        self.kinds = {}
        self.sizes = [FORWARD, BACKWARD][: 1 + backward]
        self.random = random.Random(0)

    def kind(self, length, num_launches):
        def launch(addresses, stream):
            self.streams.append(stream)

        key = length, num_launches
        if key not in self.kinds:
            self.kinds[key] = graphs.Graphs(DEVICE, launch, num_launches)
        return self.kinds[key]

    def step(self, length):
        """One call of each layer, at one of the sets of addresses that the length has."""
        chosen = self.random.randrange(self.sets_of_addresses)
        for num_launches in self.sizes:
            for layer in range(LAYERS):
                self.streams.clear()
                self.kind(length, num_launches)([layer, length, chosen, num_launches])
                how = {(): "graph", ("stream",): "launches", ("aside",): "capture"}
                self.by[how[tuple(self.streams)]] += 1
                self.largest = max(self.largest, self.kept.size)

    def steps(self, lengths):
        """The share of calls that a graph made in these steps."""
        before = self.by["graph"], self.calls
        for length in lengths:
            self.step(length)
        return (self.by["graph"] - before[0]) / (self.calls - before[1])

    @property
    def calls(self):
        return sum(self.by.values())

    def check(self):
        """The bounds that hold in every run."""
        fit = self.kept.limit // (graphs.GRAPH_BYTES + min(self.sizes) * graphs.NODE_BYTES)
        assert self.largest <= self.kept.limit
        assert self.by["capture"] <= fit + self.by["launches"] / graphs.PATIENCE
        assert len(graphs._sightings) <= graphs.COUNTED


def random_lengths(count, steps):
    return random.Random(1).choices(range(count), k=steps)


H200 = int(140 * 2**30 * graphs.SHARE)
SMALL_GPU = int(24 * 2**30 * graphs.SHARE)


def test_one_length_is_graphs_from_the_fourth_step_on(capturing):
    run = Run(SMALL_GPU)
    run.steps([0] * 3)
    assert run.steps([0] * 20) == 1
    assert run.by["capture"] == 2 * LAYERS
    run.check()


def test_forty_lengths_in_random_order_keep_their_graphs(capturing):
    run = Run(H200)
    run.steps(random_lengths(40, 200))
    assert run.by["capture"] <= 2 * LAYERS * 40
    assert run.steps(random_lengths(40, 200)) > 0.95
    run.check()


def test_where_a_third_of_them_fits_a_third_is_kept_and_nothing_is_captured_again(capturing):
    run = Run(SMALL_GPU)
    run.steps(random_lengths(40, 400))
    captures = run.by["capture"]
    share = run.kept.limit / (LAYERS * 40 * sum(kind.nbytes for kind in two_kinds(run)))
    assert 0.1 < share < 0.5
    assert run.steps(random_lengths(40, 400)) > 0.8 * share
    assert run.by["capture"] < 1.05 * captures
    run.check()


def two_kinds(run):
    return [run.kind(0, num_launches) for num_launches in run.sizes]


def test_lengths_in_a_circle_do_not_drive_each_other_out(capturing):
    run = Run(SMALL_GPU)
    run.steps(list(range(40)) * 5)
    captures = run.by["capture"]
    assert run.steps(list(range(40)) * 40) > 0.1
    assert run.by["capture"] == captures
    run.check()


def test_lengths_that_never_come_again_are_never_captured(capturing):
    run = Run(H200)
    run.steps(range(200))
    assert run.by["capture"] == run.by["graph"] == 0
    run.check()


def test_addresses_that_never_come_again_are_never_captured(capturing):
    run = Run(H200, sets_of_addresses=10**9)
    run.steps([0] * 200)
    assert run.by["capture"] == 0
    run.check()


def test_generation_of_one_to_sixty_four_tokens(capturing):
    """As many prompts as fit run together; each count of tokens comes many times."""
    run = Run(H200, backward=False)
    lengths = [1 + n for n in random_lengths(64, 640)]
    run.steps(lengths)
    assert run.steps(lengths) > 0.97
    assert run.by["capture"] <= LAYERS * 64
    run.check()


def test_a_frequent_length_that_comes_late_takes_the_place_of_rare_ones(capturing):
    run = Run(SMALL_GPU)
    run.steps(list(range(200)) * 3)
    full = run.largest
    # each of the others comes once in 200 steps, length 500 in every second step
    lengths = [n for i in range(200) for n in (i, 500)]
    run.steps(lengths)
    assert run.largest <= full + 2 * LAYERS * 2**20
    assert run.steps(lengths) >= 0.5
    run.check()


def test_after_a_change_of_lengths_the_new_ones_get_graphs_one_by_one(capturing):
    run = Run(SMALL_GPU)
    old, new = [0, 1, 2, 3] * 40, [10, 11, 12, 13] * 40
    run.steps(old)
    before = len(run.kept)
    run.steps(new[:60])
    assert len(run.kept) >= 0.9 * before, "nothing is thrown away at once"
    run.steps(new)
    assert run.steps(new) > 0.95
    run.check()
