"""One case of the layer benchmark: every route is checked, then all of them are timed in turns."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from cases import Case, Problem
from checking import (
    BOUNDS,
    CheckFailed,
    Tensors,
    check,
    first_step,
    reference,
    relative_errors,
)
from layer_row import Row, new_row
from roofline import Ceilings, Probe, roof
from routes import ROUTES, WITHOUT_ADAPTER, Route, forward, low_rank, measure_memory, renew, step
from timing import Timer

# what a route may raise; anything else is a mistake of the benchmark's own
ROUTE_ERRORS = (CheckFailed, RuntimeError, ValueError, TypeError, ImportError)


@dataclass(frozen=True)
class Setup:
    """What every case is measured with.

    Attributes:
        idle: the ceilings before the first case, when the machine was idle.
        repeat: timed steps per route, over all rounds.
    """

    timer: Timer
    probe: Probe
    idle: Ceilings
    repeat: int

    @property
    def on_gpu(self) -> bool:
        """Whether device events tell the time."""
        return self.timer.device.type == "cuda"

    @property
    def rounds(self) -> int:
        """In each round every route takes its turn."""
        if self.on_gpu and not self.timer.rest:
            return 3
        # a CPU is shared with other programs: many short rounds compare better than few long ones
        return max(1, self.repeat // 2)


class Candidate(NamedTuple):
    """A route that computes the layer rightly, and its row."""

    route: Route
    row: Row


def run_case(case: Case, names: list[str], setup: Setup, seen: set[str]) -> list[Row]:
    """One row per route of `names`.

    Args:
        seen: the routes that ran before in this process; these are added.
    """
    problem = Problem(case)
    rows = [new_row(case, name, name not in seen) for name in names]
    seen.update(names)
    candidates = check_routes(problem, rows)
    ceilings = measure_times(problem, candidates, setup)
    steps = {row.peer: row.step for row in rows if row.step is not None}
    # the check of the torch route vouches for the rank-r products
    if {"base", "torch"} <= steps.keys():
        share = measure_share(problem, setup)
        for row in rows:
            if row.step is not None and row.peer not in WITHOUT_ADAPTER:
                row.share = share
                row.x_base = row.step / (steps["base"] + share)
    for row in rows:
        row.flops = ceilings.flops
        row.bandwidth = ceilings.bandwidth
        row.roof = roof(case, ceilings)
        if row.step is not None:
            row.x_roof = row.step / row.roof
            row.x_roof_idle = row.step / roof(case, setup.idle)
    return rows


# ---- checking ----------------------------------------------------------------------------------


def check_routes(problem: Problem, rows: list[Row]) -> list[Candidate]:
    """Build and check the route of every row, and fill in its first step and its memory.

    Returns: the routes that passed.
    """
    candidates = []
    references: dict[float, Tensors] = {}
    for row in rows:
        try:
            route = checked_route(problem, row, references)
            row.held, row.kept, row.peak = measure_memory(problem, route)
        except ROUTE_ERRORS as error:
            row.fail(error)
        else:
            candidates.append(Candidate(route, row))
    return candidates


def checked_route(problem: Problem, row: Row, references: dict[float, Tensors]) -> Route:
    """Build a route, compare its first step with the reference, and fill in seconds and errors.

    Args:
        references: {scaling: what the reference gives}, filled in when first needed.
    Raises:
        CheckFailed: naming what is wrong.
    """
    route = ROUTES[row.peer](problem)
    row.first, result = first_step(problem, route)
    scaling = problem.scaling
    if row.peer in WITHOUT_ADAPTER:
        scaling = 0.0
    if scaling not in references:
        references[scaling] = reference(problem, scaling)
    expected = references[scaling]
    # every gradient has to be there; without an adapter there are none of A and B
    names = [name for name in expected if row.peer not in WITHOUT_ADAPTER or "lora" not in name]
    row.errors = relative_errors({name: result.get(name) for name in names}, expected)
    row.err = row.errors["out"]
    row.edx = row.errors["d x"]
    check(row.errors, BOUNDS[problem.case.dtype])
    return route


# ---- timing ------------------------------------------------------------------------------------


class Rounds:
    """The medians of one route's rounds, in ms."""

    def __init__(self) -> None:
        self.fwd: list[float] = []
        self.step: list[float] = []
        self.host: list[float] = []

    def add(self, timer: Timer, problem: Problem, route: Route, repeat: int) -> None:
        """Time one round of a route."""
        before = partial(renew, problem, route)
        fwd = timer(partial(forward, problem, route), repeat, before)
        whole = timer(partial(step, problem, route), repeat, before)
        self.fwd.append(statistics.median(fwd.times))
        self.step.append(statistics.median(whole.times))
        if whole.host:
            self.host.append(statistics.median(whole.host))
        before()

    def fill(self, row: Row) -> None:
        """Put what came out into the row."""
        row.fwd = statistics.median(self.fwd)
        row.step = statistics.median(self.step)
        row.spread = (max(self.step) - min(self.step)) / row.step
        if self.host:
            row.host = statistics.median(self.host)


def measure_times(problem: Problem, candidates: list[Candidate], setup: Setup) -> Ceilings:
    """Fill in fwd, step, host and spread.

    Returns: the ceilings, on a GPU those measured in turn with the routes.
    """
    repeat = math.ceil(setup.repeat / setup.rounds)
    found = [Rounds() for _ in candidates]
    probed = []
    for _ in range(setup.rounds):
        if setup.on_gpu:
            probed.append(setup.probe(setup.timer, products_per_round(problem, setup), repeat))
        for (route, row), rounds in zip(candidates, found, strict=True):
            if row.failed:
                continue
            try:
                rounds.add(setup.timer, problem, route, repeat)
            except ROUTE_ERRORS as error:
                row.fail(error)
    for (_, row), rounds in zip(candidates, found, strict=True):
        if not row.failed:
            rounds.fill(row)
    if not probed:
        return setup.idle
    product_ms, copy_ms = (statistics.median(times) for times in zip(*probed, strict=True))
    return setup.probe.ceilings(product_ms, copy_ms)


def products_per_round(problem: Problem, setup: Setup) -> int:
    """How many of the probe's products are timed in one round."""
    repeat = math.ceil(setup.repeat / setup.rounds)
    if setup.timer.rest:
        return repeat
    # about as long as a fused route's forwards and steps: a short burst is not yet throttled
    route_ms = 2.5 * repeat * roof(problem.case, setup.idle)
    product_ms = 2e3 * setup.probe.n**3 / setup.idle.flops
    return min(max(math.ceil(route_ms / product_ms), repeat), 200)


def measure_share(problem: Problem, setup: Setup) -> float:
    """ms of forward and backward of the rank-r products alone, on rows in expert order."""
    products, before = rank_products(problem)
    return statistics.median(setup.timer(products, setup.repeat, before).times)


def rank_products(problem: Problem) -> tuple[Callable[[], None], Callable[[], None]]:
    """The rank-r products forward and backward, and what has to be called before each time."""
    case = problem.case
    M = case.T * case.top_k
    counts = problem.top_k_index.flatten().bincount(minlength=case.E)
    ends = counts.cumsum(0).to(torch.int32)
    adapter = {name: p.clone().requires_grad_() for name, p in problem.adapter.items()}

    def rows(width: int) -> torch.Tensor:
        return torch.randn(M, width, device=case.device, dtype=case.dtype)

    x = {name: rows(weight.shape[2]).requires_grad_() for name, weight in problem.weights.items()}
    dy = {name: rows(weight.shape[1]) for name, weight in problem.weights.items()}

    def products() -> None:
        for name in problem.weights:
            y = low_rank(x[name], adapter[f"lora_A.{name}"], adapter[f"lora_B.{name}"], ends)
            y.backward(dy[name])

    def before() -> None:
        for tensor in (*adapter.values(), *x.values()):
            tensor.grad = None

    return products, before
