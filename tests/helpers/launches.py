"""The launches of kernels on a GPU that is not there: names, grids and arguments, in order.

Importing this imports Triton, so `helpers` does not import it: tests of the kernels choose Triton's
interpreter first.
"""

import sys

from triton.runtime.jit import JITFunction

from peft_moe_lora.functional import steps, whole
from peft_moe_lora.ops import kernels
from peft_moe_lora.ops.kernels.launching import graphs, launch, replay
from peft_moe_lora.ops.kernels.launching.recent import Recent

# (compute capability, multiprocessors) of an H200
HOPPER = ((9, 0), 132)


class Driver:
    """A Triton driver that has one stream."""

    active = type(
        "",
        (),
        {
            "get_current_stream": staticmethod(lambda device: 0),
            "launcher_cls": staticmethod(lambda src, metadata: None),
        },
    )


class Compiled:
    """What a launch compiles: it does not run, and notes its arguments."""

    function = packed_metadata = src = metadata = None

    def __init__(self, name, launches):
        self.name = name
        self.launches = launches

    def run(
        self, gx, gy, gz, stream, function, metadata, launch_metadata, enter, leave, *arguments
    ):
        self.launches.append((self.name, (gx, gy, gz), arguments))


class Launches(list):
    """(name, grid, arguments) of each launch since the list was last cleared.

    A kernel's first launch goes through Triton and is not in the list.

    Attributes:
        ahead: names of the kernels that were compiled before their first launch.
        at_launch: names of the kernels whose first launch went through Triton.
    """

    def __init__(self):
        super().__init__()
        self.ahead = []
        self.at_launch = []


def record_launches(monkeypatch, gpu=HOPPER):
    """Replace Triton's compiler and the GPU by fakes; returns the launches from now on.

    Args:
        monkeypatch: pytest's.
        gpu: (compute capability, multiprocessors) of the GPU that the launchers see.
    """
    found = Launches()
    (major, minor), multiprocessors = gpu

    def run(self, *args, warmup, **kwargs):
        names = found.at_launch
        if warmup:
            names = found.ahead
        names.append(self.__name__)
        return Compiled(self.__name__, found)

    monkeypatch.setattr(JITFunction, "run", run)
    for name, module in list(sys.modules.items()):
        if name.startswith("peft_moe_lora.ops.kernels.") and hasattr(module, "device_facts"):
            facts = (10 * major + minor, multiprocessors)
            monkeypatch.setattr(module, "device_facts", lambda device, facts=facts: facts)
    for module in (launch, graphs):
        monkeypatch.setattr(module, "driver", Driver)
    monkeypatch.setattr(launch, "_plans", {})
    monkeypatch.setattr(replay, "_kinds", Recent(replay.KINDS_BYTES))
    monkeypatch.setattr(replay, "_tested", {})
    monkeypatch.setattr(replay, "_compiled", set())
    for module in (whole, steps):
        monkeypatch.setattr(module, "ops_for", lambda backend, device: kernels)
    return found
