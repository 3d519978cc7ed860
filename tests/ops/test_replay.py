"""Replayed calls without a GPU: fake kernels that read and write memory by its address."""

import ctypes
from dataclasses import dataclass

import pytest
import torch

from peft_moe_lora.ops.kernels.launching import alike, graphs, launch, recording, replay
from peft_moe_lora.ops.kernels.launching.recent import Recent
from peft_moe_lora.ops.kernels.launching.replay import replayed

NOT_REPLAYED = replay._State.NOT_REPLAYED
# Triton calls a compiled kernel with the grid in x, y and z, the stream, the function, its
# metadata, the launch's metadata and the hooks before and after, then with the kernel's arguments
BEFORE_ARGUMENTS = 9


class Add:
    """A fake compiled kernel: out = a + b + n over `size` floats."""

    function = packed_metadata = None
    runs = 0

    def run(self, *launched):
        a, b, out, size, n = launched[BEFORE_ARGUMENTS:]
        self.runs += 1
        a, b, out = (p and (ctypes.c_float * size).from_address(p) for p in (a, b, out))
        for i in range(size):
            out[i] = a[i] + (b[i] if b else 0.0) + n


def kinds():
    """The classes of all kinds."""
    return [kind.__class__ for kind in replay._kinds.values()]


class NoDriver:
    """A Triton driver that has one stream."""

    active = type("", (), {"get_current_stream": staticmethod(lambda device: 0)})


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Every new buffer is full of NaN; the recording does not see that it is filled."""

    def poisoned(empty):
        def empty_of_nan(*args, **kwargs):
            out = empty(*args, **kwargs)
            ctypes.memset(out.data_ptr(), 0xFF, out.untyped_storage().nbytes())
            return out

        return empty_of_nan

    for name in ("empty", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setitem(replay._EMPTY, "cpu", poisoned(replay._EMPTY["cpu"]))


@pytest.fixture
def kernel(monkeypatch):
    for module in (launch, graphs):
        monkeypatch.setattr(module, "driver", NoDriver)
    monkeypatch.setattr(launch, "_plans", {})
    monkeypatch.setattr(replay, "_kinds", Recent(replay.KINDS_BYTES, replay._forget_graphs))
    monkeypatch.setattr(replay, "_tested", {})
    monkeypatch.setattr(replay, "_compiled", set())
    return Add()


def store(kernel, key, operands, *constants, sizes=1):
    """Let launches of this key find the fake kernel."""
    launch._plans[key, -1] = launch.plan_of(kernel, operands, sizes, (), constants)


@pytest.fixture
def add(kernel):
    """a + b + n by the fake kernel; b may be None."""

    def add(a, b, n=0.0):
        out = torch.empty(a.shape)
        store(kernel, ("add", n), (a, b, out), n)
        launch.launch(("add", n), None, (1, 1, 1), (a, b, out), None, (a.numel(),))
        return out

    return add


def test_later_calls_give_what_the_composition_gives(add, kernel):
    composed = []

    def compose(x, y, absent, n):
        composed.append(absent)
        a = add(x[0], y[0], n)
        b = add(a, None)
        c = add(b, x[1])
        del b
        d = add(c, y[1], 1.0)
        return add(d, a), None, c, 7, add(y[1], a.view(2, 8).flatten())

    for call in range(6):
        x, y = torch.randn(2, 16), torch.randn(2, 16)
        out, nothing, c, seven, last = replayed(compose, x, y, None, 2.5)
        a = x[0] + y[0] + 2.5
        for actual, expected in ((c, a + x[1]), (out, a + x[1] + y[1] + 1.0 + a), (last, y[1] + a)):
            torch.testing.assert_close(actual, expected)
        assert (nothing, seven) == (None, 7)
        assert kernel.runs == 6 * (call + 1)
        # composed once more before the first call, without launches
        assert len(composed) == 1 + min(call + 1, 2)


def test_another_kind_is_composed_anew(add):
    composed = []

    def compose(x, n):
        composed.append(n)
        torch.promote_types(x.dtype, torch.float32)  # what gradients' dtypes are found with
        return (add(x, None, n),)

    kinds = [
        (torch.ones(16), 1.0),
        (torch.ones(16), 2.0),
        (torch.ones(32), 1.0),
        (torch.ones(4, 32)[:, 4:20], 1.0),
    ]
    for x, n in kinds * 4:
        (out,) = replayed(compose, x, n)
        assert out.shape == x.shape
        assert (out.flatten() == 1 + n).all()
    assert len(composed) == 3 * len(kinds)


def test_kernels_are_asked_for_once_for_about_as_many_rows(add):
    composed = []

    def compose(x, y, n):
        composed.append((*x.shape, *y.shape, n))
        return (add(x, x, n),)

    def calls(rows, columns=4, more=16, n=1.0):
        """How often a call of a new kind is composed."""
        composed.clear()
        x = torch.ones(rows, columns)
        (out,) = replayed(compose, x, torch.ones(more), n)
        assert (out == 2 + n).all()
        return len(composed)

    assert calls(33) == 2
    assert calls(40) == calls(63) == 1
    assert calls(64) == 2
    # other widths, numbers of other rows and values need other kernels
    assert calls(40, columns=8) == calls(40, more=32) == calls(40, n=2.0) == 2


def test_arguments_off_sixteen_bytes_are_composed(add):
    def compose(x):
        return (add(x, None, 1.0),)

    memory = torch.randn(64)
    for _ in range(4):
        replayed(compose, memory[:16])
    assert kinds() == [replay._Replay]
    # Triton would specialize this launch; there is no Triton here
    with pytest.raises(TypeError, match="NoneType"):
        replayed(compose, memory[1:17])


@pytest.mark.parametrize(
    "compose",
    [
        lambda add, x, y: (add(x, y) * 2,),
        lambda add, x, y: (add(x, y), x),
        lambda add, x, y: (add(x, y)[8:],),
        lambda add, x, y: (add(x, OUTSIDE),),
    ],
    ids=[
        "another operator",
        "an argument as result",
        "part of a tensor as result",
        "a tensor from outside",
    ],
)
def test_what_cannot_be_replayed_is_always_composed(add, compose):
    calls = []

    def composition(x, y):
        calls.append(0)
        return compose(add, x, y)

    for _ in range(4):
        x, y = torch.randn(16), torch.randn(16)
        for actual, expected in zip(replayed(composition, x, y), compose(add, x, y), strict=True):
            assert torch.equal(actual, expected)
    assert len(calls) == 1 + 4
    assert replay._kinds.values() == [NOT_REPLAYED]


OUTSIDE = torch.ones(16)


def test_a_result_returned_twice_is_one_tensor_in_every_call(add):
    def compose(x):
        out = add(x, None, 1.0)
        return out, out

    for _ in range(4):
        x = torch.randn(16)
        first, second = replayed(compose, x)
        assert torch.equal(first, x + 1.0)
        assert second.data_ptr() == first.data_ptr()


def test_after_a_recording_that_failed_launches_are_recorded_nowhere(add):
    fails = []

    def compose(x):
        out = add(x, None, 1.0)
        if fails:
            raise RuntimeError("out of memory")
        return (out,)

    x = torch.randn(16)
    replayed(compose, x)
    fails.append(True)
    with pytest.raises(RuntimeError, match="out of memory"):
        replayed(compose, x)
    assert launch.recorder.current is None
    fails.clear()
    for _ in range(3):
        assert torch.equal(replayed(compose, x)[0], x + 1.0)
    assert kinds() == [replay._Replay]


def test_arguments_that_share_memory_are_not_recorded(add):
    def compose(x, y):
        return (add(x, y),)

    x = torch.randn(16)
    for _ in range(3):
        assert torch.equal(replayed(compose, x, x)[0], x + x)
    assert replay._kinds.values() == [NOT_REPLAYED]


@pytest.fixture
def looked_up(monkeypatch):
    """The calls whose kind was looked up, one entry for each."""
    calls = []
    look_up = replay._kind_and_tensors

    def counting(*call):
        calls.append(call)
        return look_up(*call)

    monkeypatch.setattr(replay, "_kind_and_tensors", counting)
    return calls


def test_a_recorded_call_is_looked_up_once(add, looked_up):
    def compose(x, y, n):
        return (add(x, y, n),)

    for _ in range(6):
        x, y = torch.randn(2, 16)
        torch.testing.assert_close(replayed(compose, x, y, 1.0)[0], x + y + 1.0)
    # composed, recorded, and found the first time
    assert len(looked_up) == 3


def test_calls_of_one_pattern_are_told_apart_by_their_tensors(add, looked_up):
    def compose(x, y):
        # what the host reads of y is a part of what is recorded
        return (add(x, None, float(y.stride(0) + 10 * y.shape[0] + 100 * y.element_size())),)

    x = torch.ones(16)
    others = [
        torch.zeros(4, 4),
        torch.zeros(5, 4),
        # of the shape of the first
        torch.zeros(4, 8)[:, :4],
        torch.zeros(4, 4).mT,
        torch.zeros(4, 4, dtype=torch.float64),
    ]
    for _ in range(5):
        for y in others:
            expected = 1 + y.stride(0) + 10 * y.shape[0] + 100 * y.element_size()
            assert (replayed(compose, x, y)[0] == expected).all()
    assert len(looked_up) == 3 * len(others)


def test_new_kinds_leave_the_tests_of_others_until_kinds_may_be_dropped(add, looked_up):
    def compose(x):
        return (add(x, None),)

    def looks(n):
        looked_up.clear()
        assert (replayed(compose, torch.ones(n))[0] == 1).all()
        return len(looked_up)

    replay._kinds.limit = 4 * (replay.KIND_BYTES + replay.LAUNCH_BYTES)
    assert [looks(16) for _ in range(4)] == [1, 1, 1, 0]
    # called once, it takes less than a recorded kind
    assert [looks(20), looks(16)] == [1, 0]
    # two recorded kinds are half of the limit, and the next one is more
    assert [looks(20), looks(24), looks(16), looks(16)] == [1, 1, 1, 0]


def test_more_calls_than_are_tested_are_still_replayed(add):
    composed = []

    def compose(x):
        composed.append(len(x))
        return (add(x, None),)

    lengths = range(17, 17 + 2 * replay.TESTED)
    for _ in range(5):
        for n in lengths:
            x = torch.randn(n)
            assert torch.equal(replayed(compose, x)[0], x)
    assert len(composed) == 2 * len(lengths) + len({n.bit_length() for n in lengths})
    assert all(len(known) <= replay.TESTED for known in replay._tested.values())


@pytest.fixture
def asked_anew():
    """PyTorch's test is asked its questions again, and once more after the test."""
    alike._answers_right.cache_clear()
    yield
    alike._answers_right.cache_clear()


def test_an_absent_tensor_is_not_taken_for_another(add):
    def compose(x, first, second):
        return (add(x, second, 0.0 if first is None else 5.0),)

    for _ in range(5):
        x, y = torch.randn(2, 16)
        assert torch.equal(replayed(compose, x, None, y)[0], x + y)
        assert torch.equal(replayed(compose, x, y, None)[0], x + 5.0)


@pytest.mark.usefixtures("asked_anew")
def test_a_test_that_answers_wrong_is_not_used(add, looked_up, monkeypatch):
    class Always:
        """PyTorch's test, if it were another one."""

        def __init__(self, *tensors, **facts):
            self.check = lambda *others: True

    def compose(x):
        return (add(x, None),)

    monkeypatch.setattr(alike.guards, "TensorGuards", Always)
    for _ in range(4):
        for n in (16, 20):
            x = torch.randn(n)
            assert torch.equal(replayed(compose, x)[0], x)
    assert len(looked_up) == 8
    assert not replay._tested


@pytest.mark.usefixtures("asked_anew")
def test_without_a_test_of_pytorch_calls_are_replayed(add, monkeypatch):
    def compose(x):
        return (add(x, None),)

    monkeypatch.delattr(alike.guards, "TensorGuards")
    for _ in range(4):
        assert (replayed(compose, torch.ones(16))[0] == 1).all()
    assert kinds() == [replay._Replay]


def test_a_tensor_of_another_class_is_not_kept_alive(add):
    class Other(torch.Tensor):
        pass

    def compose(x, y):
        return (add(x, None),)

    for _ in range(4):
        other = torch.ones(16).as_subclass(Other)
        assert (replayed(compose, torch.ones(16), other)[0] == 1).all()
    assert not replay._tested


def test_a_value_that_has_no_hash_is_composed(add):
    for _ in range(3):
        (out,) = replayed(lambda x, ns: (add(x, None, ns[0]),), torch.zeros(16), [3.0])
        assert (out == 3).all()
    assert not replay._kinds.values()


def test_launches_are_not_repeated_on_another_device(add, kernel, monkeypatch):
    """New memory is that of the current device."""

    def compose(x):
        return (add(x, x),)

    x = torch.ones(16)
    elsewhere = x.to("meta")
    monkeypatch.setitem(replay._EMPTY, "cpu", lambda *made: elsewhere)
    for _ in range(2):
        replayed(compose, x)
    launched = kernel.runs
    with pytest.raises(AssertionError, match="another current device"):
        replayed(compose, x)
    assert kernel.runs == launched


def test_kinds_do_not_pile_up_and_those_in_use_stay(add):
    replay._kinds.limit = 4 * (replay.KIND_BYTES + replay.LAUNCH_BYTES)
    composed = []

    def compose(x):
        composed.append(len(x))
        return (add(x, None),)

    for n in range(20):
        for _ in range(3):
            replayed(compose, torch.zeros(17 + n))
        replayed(compose, torch.zeros(16))
    # kernels are asked for at 17 and at 32 rows, and every kind is composed twice
    assert composed.count(16) == 2
    assert len(composed) == 2 + 2 * 21
    assert len(replay._kinds) == 4
    assert replay._kinds.size <= replay._kinds.limit


def test_the_graphs_of_a_dropped_kind_are_dropped(add, monkeypatch):
    replay._kinds.limit = 2 * replay.KIND_BYTES + replay.LAUNCH_BYTES
    dropped = []
    monkeypatch.setattr(graphs.Graphs, "forget", lambda self: dropped.append(self))

    def compose(x):
        return (add(x, None),)

    for _ in range(2):
        replayed(compose, torch.zeros(16))
    (kind,) = replay._kinds.values()
    replayed(compose, torch.zeros(17))
    assert not dropped
    replayed(compose, torch.zeros(18))
    assert dropped == [kind.graphs]


def test_forgetting_drops_kinds_and_graphs(add, monkeypatch):
    forgotten = []
    monkeypatch.setattr(replay, "forget_graphs", lambda: forgotten.append(True))

    def compose(x):
        return (add(x, None),)

    for _ in range(3):
        replayed(compose, torch.zeros(16))
    assert replay._tested
    replay.forget()
    assert not replay._kinds.values()
    assert not replay._tested
    assert not replay._compiled
    assert forgotten == [True]


def test_the_first_of_a_kernels_tensors_may_be_none(kernel):
    """A product that need not write its first output."""

    class Copy(Add):
        def run(self, *launched):
            before, (nothing, a, *rest) = launched[:BEFORE_ARGUMENTS], launched[BEFORE_ARGUMENTS:]
            assert nothing is None
            super().run(*before, a, None, *rest)

    copy = Copy()

    def compose(x):
        out = torch.empty(x.shape)
        store(copy, ("copy",), (None, x, out), 2.0)
        launch.launch(("copy",), None, (1, 1, 1), (None, x, out), None, (x.numel(),))
        return (out,)

    for _ in range(4):
        x = torch.randn(16)
        assert torch.equal(replayed(compose, x)[0], x + 2.0)
    assert kinds() == [replay._Replay]


def test_tensors_in_nested_tuples_come_again_at_other_addresses(kernel):
    seen = []

    class Nested(Add):
        def run(self, *launched):
            (a, stride), ((b, nothing), (out, scale)), *rest = launched[BEFORE_ARGUMENTS:]
            seen.append((stride, nothing, scale))
            super().run(*launched[:BEFORE_ARGUMENTS], a, b, out, *rest)

    nested_kernel = Nested()

    def compose(x, y):
        out = torch.empty(x.shape)
        b = y[4:]
        operands = (x, 3), ((b, None), (out, 0.5))
        store(nested_kernel, ("nested",), operands, 1.0)
        launch.launch(("nested",), None, (1, 1, 1), (x, None, b, out), None, (12,))
        return (out,)

    for _ in range(5):
        x, y = torch.randn(16), torch.randn(16)
        (out,) = replayed(compose, x, y)
        torch.testing.assert_close(out[:12], x[:12] + y[4:] + 1.0)
    assert kinds() == [replay._Replay]
    assert seen == [(3, None, 0.5)] * 5


def test_tensors_of_the_operands_in_another_order_are_refused(kernel):
    x, y = torch.zeros(16), torch.zeros(16)

    def arguments():
        return ((x, 1), y), (), {}

    with pytest.raises(AssertionError, match="not in their order"):
        launch.launch(("swapped",), None, (1, 1, 1), (y, x), arguments)


@dataclass
class Descriptor:
    """A descriptor like Triton's or Gluon's: its tensor and its fields."""

    base: torch.Tensor
    block_shape: list


class GluonDescriptor(Descriptor):
    """A descriptor of another language."""


def test_descriptors_come_again_in_their_class_at_another_address(kernel):
    seen = []

    class Described(Add):
        def run(self, *launched):
            left, none, right, *rest = launched[BEFORE_ARGUMENTS:]
            seen.append((type(left), left.block_shape, none, type(right), right.block_shape))
            addresses = left.base.data_ptr(), right.base.data_ptr()
            super().run(*launched[:BEFORE_ARGUMENTS], *addresses, *rest)

    described = Described()
    store(described, ("described",), (torch.zeros(16),), 1.0)

    def compose(x, y):
        out = torch.empty(x.shape)
        descriptors = Descriptor(x[4:], [4]), None, GluonDescriptor(y, [2, 2])
        launch.launch(("described",), None, (1, 1, 1), (out,), None, (12,), descriptors)
        return (out,)

    for _ in range(5):
        x, y = torch.randn(16), torch.randn(16)
        (out,) = replayed(compose, x, y)
        torch.testing.assert_close(out[:12], x[4:] + y[:12] + 1.0)
    assert kinds() == [replay._Replay]
    assert seen == [(Descriptor, [4], None, GluonDescriptor, [2, 2])] * 5


def test_the_workspace_holds_what_lives_at_once_and_no_more():
    sizes_and_launches = [
        (512, 0, 1),
        (1024, 1, 2),
        (512, 2, 3),
        (100, 0, 3),
        (512, 3, 3),
        (2048, 0, 3),
    ]
    buffers = [recording.Buffer(*b) for b in sizes_and_launches]
    offsets, total = recording.pack(buffers, {5: 0})
    assert set(offsets) == {0, 1, 2, 3, 4}
    spans = {i: (offsets[i], offsets[i] + buffers[i].nbytes) for i in offsets}
    for i, (start, end) in spans.items():
        for j, (other_start, other_end) in spans.items():
            one, other = buffers[i], buffers[j]
            together = one.first <= other.last and other.first <= one.last
            assert i == j or not together or end <= other_start or other_end <= start
    # at launches 1 and 2 a small, the large and the odd buffer live together
    assert total == 1024 + 512 + 512
