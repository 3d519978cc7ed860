"""Time layers in turns, several calls in a row, so that a card that warms up slows all of them.

In each of several rounds every layer has its turn: a GPU rests for as long as it is told to, then
come calls to warm up and a group of calls in a row, whose mean is taken. A layer's number is
the median of its groups. Before every step the gradients are dropped, and A and B get new versions,
as an optimizer step gives them.
"""

import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

import torch

from cases import Case, Problem
from checking import BOUNDS, CheckFailed, check, first_step, reference, relative_errors
from comparison import ROUTE_ERRORS
from few_rows import captured_forward, forward_without_gradients
from routes import Route, measure_memory, moe_lora_route, renew, step
from timing import host_seconds_per_call, seconds_per_call

# calls ahead of each group; replayed launches become a CUDA graph at the third with the same
# addresses
WARM = 5
# seconds in which calls ahead of a group of a GPU raise the clocks of the device and of the host,
# which fall during a rest. Calls of 50 us alone would not
WARM_SECONDS = 0.02
# processes that compile ahead; each needs memory of the device
PROCESSES = 8


# ---- what is called ----------------------------------------------------------------------------


def train(problem: Problem, route: Route) -> None:
    """One step as training has it: new versions of A and B, forward, backward."""
    renew(problem, route)
    step(problem, route)


def train_call(problem: Problem, route: Route) -> Callable[[], object]:
    """Forward and backward."""
    return partial(train, problem, route)


def infer_call(problem: Problem, route: Route) -> Callable[[], object]:
    """Forward without gradients."""
    return partial(forward_without_gradients, problem, route)


def device_call(problem: Problem, route: Route) -> Callable[[], object]:
    """Forward without gradients; on a GPU as one CUDA graph, which leaves the host out."""
    if problem.case.device.type == "cuda":
        return captured_forward(problem, route)
    return infer_call(problem, route)


class Call(NamedTuple):
    """What is timed of a layer.

    Attributes:
        unit: of its numbers.
        per_second: how many of this unit a second has.
        make: is given problem and route, and returns the call.
        seconds: the mean of a group: (call, device, calls in a row) -> seconds.
        trains: whether it is a step with all gradients.
    """

    unit: str
    per_second: float
    make: Callable[[Problem, Route], Callable[[], object]]
    seconds: Callable[[Callable[[], object], torch.device, int], float]
    trains: bool


CALLS = {
    "step": Call("ms", 1e3, train_call, seconds_per_call, True),
    "forward, device": Call("us", 1e6, device_call, seconds_per_call, False),
    "forward, host": Call("us", 1e6, infer_call, host_seconds_per_call, False),
}


# ---- a layer and its numbers -------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """One layer that is measured.

    Attributes:
        case: the problem.
        recompute: whether backward computes the pre-activation again.
        call: which of CALLS is timed.
    """

    case: Case
    recompute: bool = False
    call: str = "step"

    def route(self, problem: Problem) -> Route:
        """peft_moe_lora as a user gets it."""
        return moe_lora_route(problem, recompute=self.recompute)


@dataclass
class Measured:
    """The numbers of a layer.

    Attributes:
        layer: what was measured.
        groups: the mean of each group of calls, in the unit of the call.
        errors: |a - ref| / |ref| of the output and, of a step, of every gradient. The reference is
            plain PyTorch in fp32, for a float32 case in fp64.
        kept: MiB that forward keeps for backward; None where nothing is.
        failed: why there are no numbers.
    """

    layer: Layer
    groups: list[float] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    kept: float | None = None
    failed: str | None = None

    @property
    def median(self) -> float | None:
        """The number; None if the layer failed."""
        if self.failed or not self.groups:
            return None
        return statistics.median(self.groups)

    @property
    def spread(self) -> float | None:
        """(largest - smallest) / median of the groups."""
        if self.median is None:
            return None
        return (max(self.groups) - min(self.groups)) / self.median

    @property
    def worst(self) -> float | None:
        """The largest error of a layer that passed its check."""
        if self.failed or not self.errors:
            return None
        return max(self.errors.values())

    def fail(self, error: Exception) -> None:
        """Take the numbers away, and say why."""
        self.groups.clear()
        self.kept = None
        self.failed = f"raised {type(error).__name__}: {error}"
        if isinstance(error, CheckFailed):
            self.failed = str(error)


# ---- measuring ---------------------------------------------------------------------------------


def checked_call(measured: Measured) -> Callable[[], object]:
    """Check a layer, and fill in its errors and what it keeps.

    Returns: the call that is to be timed.
    Raises:
        CheckFailed: if the layer's output or a gradient is not the reference's.
    """
    layer = measured.layer
    call = CALLS[layer.call]
    problem = Problem(layer.case)
    route = layer.route(problem)
    results = results_of(problem, route, call)
    expected = reference(problem, problem.scaling)
    if call.trains:
        results = {name: results.get(name) for name in expected}
    measured.errors = relative_errors(results, expected)
    check(measured.errors, BOUNDS[layer.case.dtype])
    del results, expected
    if call.trains:
        measured.kept = measure_memory(problem, route).kept
    return call.make(problem, route)


def results_of(problem: Problem, route: Route, call: Call) -> dict[str, torch.Tensor | None]:
    """Output and gradients of a step; of a forward without gradients, the output."""
    if call.trains:
        _, results = first_step(problem, route)
        return results
    return {"out": forward_without_gradients(problem, route)}


def measure(
    layers: Sequence[Layer],
    groups: int,
    calls: int,
    each_round: Callable[[], object] = lambda: None,
    rest: float = 0.0,
) -> list[Measured]:
    """The numbers of the layers, all of which are in memory at the same time.

    Args:
        groups: rounds, each with one group of calls of every layer.
        calls: in a row in one group.
        each_round: is called ahead of every round.
        rest: seconds in which a GPU is left idle ahead of every turn, so that it is not at its
            power limit from the turn before.
    """
    found = [Measured(layer) for layer in layers]
    ready: dict[int, Callable[[], object]] = {}
    for i, measured in enumerate(found):
        try:
            ready[i] = checked_call(measured)
        except ROUTE_ERRORS as error:
            measured.fail(error)
        clean(measured.layer.case.device)
    for _ in range(groups):
        each_round()
        for i, call in ready.items():
            if found[i].failed:
                continue
            if found[i].layer.case.device.type == "cuda":
                time.sleep(rest)
            add_group(found[i], call, calls)
    return found


def add_group(measured: Measured, call: Callable[[], object], calls: int) -> None:
    """Time one group of calls."""
    kind = CALLS[measured.layer.call]
    device = measured.layer.case.device
    try:
        warm_up(call, device)
        seconds = kind.seconds(call, device, calls)
    except ROUTE_ERRORS as error:
        measured.fail(error)
    else:
        measured.groups.append(kind.per_second * seconds)


def warm_up(call: Callable[[], object], device: torch.device) -> None:
    """Call it WARM times, on a GPU again and again for WARM_SECONDS."""
    end = time.perf_counter() + WARM_SECONDS
    seconds_per_call(call, device, WARM)
    while device.type == "cuda" and time.perf_counter() < end:
        seconds_per_call(call, device, WARM)


def clean(device: torch.device) -> None:
    """Give memory that nothing uses back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---- compiling ahead ---------------------------------------------------------------------------


def compile_ahead(layers: Sequence[Layer]) -> None:
    """Run every layer on a GPU once, in several processes that share Triton's cache on disk.

    A layer compiles its kernels in threads, but the part of it that is Python runs in one thread at
    a time. So the layers are shared by one process for every two cores, up to PROCESSES. Neighbours
    in the list often need the same kernels, which two processes would both compile: the order is a
    random one.
    """
    layers = [layer for layer in layers if layer.case.device.type == "cuda"]
    # only Linux has the GPU's kernels, and this count of cores
    if not layers:
        return
    random.Random(0).shuffle(layers)
    processes = min(len(layers), len(os.sched_getaffinity(0)) // 2, PROCESSES)
    if processes < 2:
        return
    try:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            list(pool.map(run_once, layers))
    except BrokenExecutor as error:
        # each layer compiles what is missing when it is measured
        print(f"not everything was compiled ahead: {error}", file=sys.stderr, flush=True)


def run_once(layer: Layer) -> None:
    """Run a layer's call once. What it raises is raised, and reported, when it is measured."""
    try:
        problem = Problem(layer.case)
        results_of(problem, layer.route(problem), CALLS[layer.call])
    except ROUTE_ERRORS:
        pass
    clean(layer.case.device)
