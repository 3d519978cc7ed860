"""What the layer benchmark finds out about one route in one case."""

import inspect
import sys
import traceback
from dataclasses import dataclass

from cases import CPU_GOAL, Case, dtype_name
from checking import CheckFailed


@dataclass
class Row:
    """One route in one case of an experts layer (SwiGLU, frozen base, LoRA on gate_up and down).

    Times are medians in ms, memory is in MiB. What was not measured is null, and a route that
    failed has no numbers.

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
        errors: |a - ref| / |ref| of the output and of every gradient. The reference is fp32, for a
            float32 case fp64.
        err, edx: the errors of the output and of its gradient for the input.
        first: seconds of the first step at this shape.
        held: memory after forward above that before.
        kept: held, without the output.
        peak: the most memory during a step, above that before.
        fwd: forward with gradients enabled.
        step: forward and backward.
        host: the time in which the host issues a step; on a GPU only.
        spread: (largest - smallest) / median of the step, over the medians of the rounds.
        flops, bandwidth: the ceilings, FLOP/s and bytes/s. On a GPU they are measured in turns with
            the routes, because a card at its power limit slows all of them; on a CPU they are those
            of the idle machine.
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
