"""One case of the layer benchmark: every route is checked, then all of them are timed in turns."""

import inspect
import math
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from cases import CPU_GOAL, Case, Problem, dtype_name
from checking import BOUNDS, CheckFailed, check, first_step, reference, relative_errors
from roofline import Ceilings, Probe, roof
from routes import ROUTES, Route, forward, low_rank, measure_memory, renew, step
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
        # a CPU is shared with whatever else runs: many short rounds compare better than few long ones
        return max(1, self.repeat // 2)


@dataclass
class Row:
    """One route in one case of an MoE experts layer (SwiGLU, frozen base, LoRA on gate_up and down).

    Times are medians in ms, memory is in MiB. What was not measured is null, and a route that failed has no numbers.

    Attributes:
        config, E, H, I, top_k: the shape.
        T, r: tokens; rank of one expert's update.
        peer: the route.
        dtype, lora: dtype of base and activations; dtype of the adapter.
        skew: share of the rows on one expert; 0 routes uniformly.
        first_in_process: whether this is the route's first case in this process.
        goal_x_roof, goal_kept: what moe_lora is held to on an H200.
        goal_x_base: what moe_lora is held to on a CPU.
        failed: why the route has no numbers.
        errors: |a - ref| / |ref| of the output and of every gradient; the reference is fp32, fp64 for float32.
        err, edx: the errors of the output and of its gradient for the input.
        first: seconds of the first step at this shape.
        held: memory after forward above that before.
        kept: held, without the output.
        peak: the most memory during a step, above that before.
        fwd: forward with gradients enabled.
        step: forward and backward.
        host: the time in which the host issues a step; on a GPU only.
        spread: (largest - smallest) / median of the step, over the medians of the rounds.
        flops, bandwidth: the ceilings, FLOP/s and bytes/s. On a GPU they take turns with the routes, because a card at
            its power limit slows all of them; on a CPU they are those of the idle machine.
        roof: the roofline at these ceilings.
        x_roof: step / roof.
        x_roof_idle: step / the roofline at the ceilings of the idle machine.
        share: a step of the rank-r products alone.
        x_base: step / (the base's step + share).
    """

    config: str
    E: int
    H: int
    I: int  # noqa: E741  # the intermediate size is I in every formula
    top_k: int
    T: int
    r: int
    peer: str
    dtype: str
    lora: str
    skew: float
    first_in_process: bool
    goal_x_roof: float | None = None
    goal_kept: int | None = None
    goal_x_base: float | None = None
    failed: str | None = None
    errors: dict[str, float] | None = None
    err: float | None = None
    edx: float | None = None
    first: float | None = None
    held: float | None = None
    kept: float | None = None
    peak: float | None = None
    fwd: float | None = None
    step: float | None = None
    host: float | None = None
    spread: float | None = None
    flops: float | None = None
    bandwidth: float | None = None
    roof: float | None = None
    x_roof: float | None = None
    x_roof_idle: float | None = None
    share: float | None = None
    x_base: float | None = None

    @property
    def worst(self) -> float | None:
        """The largest error of a route that has passed."""
        if self.failed or self.errors is None:
            return None
        return max(self.errors.values())

    def fail(self, error: Exception) -> None:
        """Say on stderr why the route failed, and take its numbers away."""
        for name in NUMBERS:
            setattr(self, name, None)
        if isinstance(error, CheckFailed):
            self.failed = str(error)
        else:
            self.failed = f"raised {type(error).__name__}"
        print(f"{self.config} T={self.T} r={self.r}, {self.peer}: {self.failed}", file=sys.stderr)
        if isinstance(error, CheckFailed):
            errors = [f"{name} {e:.1e}" for name, e in (self.errors or {}).items()]
            print("  " + ", ".join(errors), file=sys.stderr)
        else:
            traceback.print_exception(error)


LEGEND = inspect.cleandoc(Row.__doc__ or "")
# the fields that a failed route does not have
NUMBERS = (
    "first",
    "held",
    "kept",
    "peak",
    "fwd",
    "step",
    "host",
    "spread",
    "x_roof",
    "x_roof_idle",
    "share",
    "x_base",
)


class Candidate(NamedTuple):
    """A route that computes the layer rightly, and its row."""

    route: Route
    row: Row


def new_row(case: Case, name: str, first_in_process: bool) -> Row:
    """A row without numbers."""
    row = Row(
        config=case.name,
        E=case.E,
        H=case.H,
        I=case.I,
        top_k=case.top_k,
        T=case.T,
        r=case.r,
        peer=name,
        dtype=dtype_name(case.dtype),
        lora="float32",
        skew=case.skew,
        first_in_process=first_in_process,
    )
    if name == "moe_lora" and case.goal:
        row.goal_x_roof = case.goal.x_roof
        row.goal_kept = case.goal.kept
    if name == "moe_lora" and case.device.type == "cpu":
        row.goal_x_base = CPU_GOAL
    return row


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
            if row.step is not None and row.peer != "base":
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


# ---- checking ----------------------------------------------------------------------------------------------


def check_routes(problem: Problem, rows: list[Row]) -> list[Candidate]:
    """Build and check the route of every row; those that pass, with their first step and memory filled in."""
    candidates = []
    references: dict[bool, dict[str, torch.Tensor]] = {}
    for row in rows:
        adapted = row.peer != "base"
        try:
            route = ROUTES[row.peer](problem)
            row.first, result = first_step(problem, route)
            if adapted not in references:
                scaling = problem.scaling if adapted else 0.0
                references[adapted] = reference(problem, scaling)
            check_result(row, result, references[adapted], BOUNDS[problem.case.dtype])
            row.held, row.kept, row.peak = measure_memory(problem, route)
        except ROUTE_ERRORS as error:
            row.fail(error)
        else:
            candidates.append(Candidate(route, row))
    return candidates


def check_result(
    row: Row,
    result: dict[str, torch.Tensor | None],
    expected: dict[str, torch.Tensor],
    bound: float,
) -> None:
    """Fill in the errors of a first step.

    Raises:
        CheckFailed: naming what is wrong.
    """
    # every gradient has to be there; without an adapter there are none of A and B
    names = [name for name in expected if row.peer != "base" or "lora" not in name]
    row.errors = relative_errors({name: result.get(name) for name in names}, expected)
    row.err = row.errors["out"]
    row.edx = row.errors["d x"]
    check(row.errors, bound)


# ---- timing ------------------------------------------------------------------------------------------------


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
    """ms of forward and backward of the rank-r products alone, on rows that are in expert order already."""
    products, before = rank_products(problem)
    return statistics.median(setup.timer(products, setup.repeat, before).times)


def rank_products(problem: Problem) -> tuple[Callable[[], None], Callable[[], None]]:
    """The call that runs the rank-r products forward and backward, and what has to be called before each of it."""
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
