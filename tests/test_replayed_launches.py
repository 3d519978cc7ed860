"""A layer's launches on a Hopper GPU, replayed as they were composed; the kernels are fakes, so none is needed."""

import sys

import pytest
import torch
from triton.runtime.jit import JITFunction

from peft_moe_lora import fused
from peft_moe_lora.functional import Projection, experts
from peft_moe_lora.ops import Activation, kernels
from peft_moe_lora.ops.kernels import launch, replay

E, H, I, T, TOP_K, RANK = 8, 256, 128, 2048, 2, 16  # noqa: E741  # the intermediate size is I in every formula


class Driver:
    """A Triton driver that has one stream."""

    active = type("", (), {"get_current_stream": staticmethod(lambda device: 0)})


class Compiled:
    """What a launch compiles: run, it notes its arguments."""

    function = packed_metadata = None

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def run(self, gx, gy, gz, stream, function, metadata, launch_metadata, enter, leave, *arguments):
        self.launches.append((self.name, (gx, gy, gz), arguments))


def relative(arguments, inputs):
    """The arguments without addresses: an input and the bytes into it, or the order in which buffers come up.

    A descriptor is its class, its fields and where it points.
    """
    order, found = {}, []
    for argument in arguments:
        fields = {}
        if hasattr(argument, "base"):
            fields = {name: value for name, value in vars(argument).items() if name != "base"}
            fields["class"] = type(argument)
            argument = argument.base.data_ptr()
        if isinstance(argument, int) and argument >= 2**32:
            of = [
                (i, argument - t.data_ptr()) for i, t in enumerate(inputs) if 0 <= argument - t.data_ptr() < t.nbytes
            ]
            argument = ("input", *of[0]) if of else ("buffer", order.setdefault(argument, len(order)))
        found.append((argument, fields))
    return found


@pytest.fixture
def launches(monkeypatch):
    """The launches since it was last cleared."""
    found = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: Compiled(self.__name__, found))
    for name, module in list(sys.modules.items()):
        if name.startswith("peft_moe_lora.ops.kernels.") and hasattr(module, "device_facts"):
            monkeypatch.setattr(module, "device_facts", lambda device: (90, 132))
    for module in (launch, replay):
        monkeypatch.setattr(module, "driver", Driver)
    monkeypatch.setattr(launch, "_plans", {})
    monkeypatch.setattr(replay, "_kinds", {})
    monkeypatch.setattr(fused, "ops_for", lambda backend, device: kernels)
    return found


@pytest.mark.parametrize("transposed", [False, True])
def test_replayed_launches_are_those_composed(launches, transposed):
    def weight(N, K):
        return (
            torch.zeros(E, K, N, dtype=torch.bfloat16).transpose(1, 2)
            if transposed
            else torch.zeros(E, N, K).bfloat16()
        )

    def projection(N, K):
        lora = torch.zeros(RANK * E, K, requires_grad=True), torch.zeros(N, RANK * E, requires_grad=True)
        return Projection(weight(N, K), None, *lora)

    def step():
        launches.clear()
        x = torch.zeros(T, H, dtype=torch.bfloat16, requires_grad=True)
        dout, weights = torch.zeros(T, H, dtype=torch.bfloat16), torch.zeros(T, TOP_K, requires_grad=True)
        index = torch.zeros(T, TOP_K, dtype=torch.int64)
        up, down = projection(2 * I, H), projection(H, I)
        # all of them live through the step: no buffer comes where one of them will lie
        inputs = [x, weights, index, dout, *(t for p in (up, down) for t in (p.weight, p.lora_A, p.lora_B))]
        experts(x, index, weights, up, down, Activation()).backward(dout)
        return [(name, grid, relative(arguments, inputs)) for name, grid, arguments in launches]

    step()
    # from the second on, what a first launch compiled is run as the launcher is called
    composed, *replayed = (step() for _ in range(3))
    assert [type(kind) for kind in replay._kinds.values()] == [replay._Replay] * 2
    assert [name for name, *_ in composed].count("_linear_roles_kernel") == 2
    for launched in replayed:
        assert launched == composed
