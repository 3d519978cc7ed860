"""The rows of train_step.py: what is measured of a case and a route, and how routes compare."""

import statistics
from dataclasses import dataclass, field

from report import Column
from step_cases import Batch

# what moe_lora is held to on an H200, eager: by batch, how many times as fast as PEFT; peak of
# PEFT's
GOAL_SPEED = {"4x2048": 1.6, "1x2048": 2.0}
GOAL_PEAK = 0.4


@dataclass
class Row:
    """Whole training steps of one route: forward, backward, AdamW on the adapters.

    Routes share the base weights and take turns in every round. What was not measured is null.

    Attributes:
        route: base is frozen, without adapter and optimizer: forward and backward alone.
        batch: sequences x tokens.
        checkpointing: "no", "plain", or "experts" under `keep_experts`.
        variant: eager, or some of compile, layers, liger and one-thread, joined by +.
        vocabulary: tokens of the model's vocabulary.
        failed: why the route has no numbers.
        ms: of a step: the median over the rounds of each round's mean.
        tok_s: tokens per second.
        peak: MiB, the most allocated during a step above the base weights: the route's adapter,
            gradients and optimizer state are included.
        launches: how many times the host gives the GPU something to do in a step.
        host_us: microseconds by layer of a step of 4 tokens, which the GPU waits for; null if
            compiled.
        first: seconds of the route's first step of this case; with compile, the compilation.
        spread: (slowest - fastest round) / median.
        x_base, x_peft: ms of the other route over this one's.
        peak_of_peft: this route's peak over PEFT's.
        goal_x_peft, goal_x_base, goal_peak_of_peft: what moe_lora is held to on an H200.
        parts: ms by part of one step, see `step_parts`; empty if compiled.
    """

    route: str
    batch: str
    checkpointing: str
    variant: str
    vocabulary: int
    failed: str | None = None
    ms: float | None = None
    tok_s: float | None = None
    peak: float | None = None
    launches: int | None = None
    host_us: float | None = None
    first: float | None = None
    spread: float | None = None
    x_base: float | None = None
    x_peft: float | None = None
    peak_of_peft: float | None = None
    goal_x_peft: float | None = None
    goal_x_base: float | None = None
    goal_peak_of_peft: float | None = None
    parts: dict[str, float] = field(default_factory=dict)


COLUMNS = {
    "batch": Column("batch", is_label=True),
    "checkpointing": Column("checkpointing", is_label=True),
    "variant": Column("variant", is_label=True),
    "vocabulary": Column("vocabulary", "{:,}", is_label=True),
    "route": Column("route", is_label=True),
    "ms": Column("ms", "{:.1f}"),
    "tok_s": Column("tokens/s", "{:,.0f}"),
    "x_peft": Column("x PEFT", "{:.2f}"),
    "goal_x_peft": Column("goal", "{:.1f}"),
    "x_base": Column("x base", "{:.2f}"),
    "goal_x_base": Column("goal", "{:.1f}"),
    "peak": Column("peak MiB", "{:,.1f}"),
    "peak_of_peft": Column("of PEFT's", "{:.2f}"),
    "goal_peak_of_peft": Column("goal", "{:.1f}"),
    "launches": Column("launches", "{:,}"),
    "host_us": Column("host us/layer", "{:,.0f}"),
    "first": Column("first s", "{:.2f}"),
    "spread": Column("spread", "{:.0%}"),
}


def fill_in(row: Row, batch: Batch, times: list[float]) -> None:
    """Fill in what follows from the times of the rounds."""
    row.ms = statistics.median(times)
    row.tok_s = 1e3 * batch.sequences * batch.length / row.ms
    row.spread = (max(times) - min(times)) / row.ms


def compare_rows(rows: dict[str, Row]) -> None:
    """Fill in how each route compares with base and PEFT, and what moe_lora is held to."""
    measured = {name: row for name, row in rows.items() if not row.failed}
    base = measured.get("base")
    peft = measured.get("peft")
    for row in measured.values():
        if base and row is not base:
            row.x_base = base.ms / row.ms
        if peft and row is not peft:
            row.x_peft = peft.ms / row.ms
            row.peak_of_peft = row.peak / peft.peak
        if row.route != "moe_lora" or row.variant != "eager" or row.batch not in GOAL_SPEED:
            continue
        row.goal_x_peft = GOAL_SPEED[row.batch]
        row.goal_x_base = 1.0
        if row.checkpointing == "no":
            row.goal_peak_of_peft = GOAL_PEAK
