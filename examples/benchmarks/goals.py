"""Hold the experts layer against its goals, in one run on one H200, and print the table.

    python examples/benchmarks/goals.py --json goals.json
    python examples/benchmarks/goals.py --rows 'r = *' 'T = *'
    python examples/benchmarks/goals.py --device cpu --tiny       tries the command; no numbers

The rows are in goal_rows.py. How they are measured is in turns.py: in each of five rounds every row
has its turn of 20 steps in a row, after a short rest, and the median of the five is its number. A
row whose output or gradients are not those of plain PyTorch in higher precision has no number.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cases import DTYPES, default_device
from goal_rows import BEFORE, Situation, chosen
from options import parse
from report import describe_machine, machine_line, markdown_table, write_json
from turns import CALLS, Measured, compile_ahead, measure

MET = "met"
HALF_WAY = "half-way"
MISSED = "missed"
VERDICTS = (MET, HALF_WAY, MISSED)
# digits after the point with which a number is shown, and compared with its goal
DIGITS = {"ms": 2, "us": 0}
HEADER = ("situation", f"{BEFORE}", "goal", "now", "", "worst error")


@dataclass
class Arguments:
    """The command line."""

    rows: list[str] | None = field(
        default=None,
        metadata={"metavar": "PATTERN", "help": "names of rows, such as 'r = *' (default: all)"},
    )
    groups: int = field(default=5, metadata={"help": "of steps, of each row (default: 5)"})
    steps: int = field(default=20, metadata={"help": "in a row in a group (default: 20)"})
    rest: float = field(
        default=0.3,
        metadata={
            "metavar": "SECONDS",
            "help": "in which a GPU is left idle ahead of every group (default: 0.3)",
        },
    )
    device: str = field(
        default_factory=default_device, metadata={"help": "default: cuda where there is one"}
    )
    tiny: bool = field(
        default=False, metadata={"help": "shrink all sizes, and run in fp32: tries the command"}
    )
    json: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "write every number here"}
    )
    markdown: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "write the table here too"}
    )


def parse_arguments(argv: Sequence[str] | None) -> Arguments:
    """The command line; a pattern that matches no row is an error."""
    parser, args = parse(Arguments, __doc__, argv)
    if min(args.groups, args.steps) < 1:
        parser.error("--groups and --steps must be at least 1")
    if not 0 <= args.rest < math.inf:
        parser.error(f"--rest must be a number of seconds, got {args.rest}")
    try:
        chosen(args.rows or [])
    except ValueError as error:
        parser.error(f"--rows: {error}")
    return args


# ---- the table ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """A row and what it came to.

    Attributes:
        situation: the row.
        measured: its numbers.
        now: its number, rounded as it is shown; None if it failed.
        base: that of the row it is held against, and what that took before; None without one.
    """

    situation: Situation
    measured: Measured
    now: float | None
    base: tuple[float | None, float] | None = None

    @property
    def unit(self) -> str:
        """Of the number."""
        return CALLS[self.situation.call].unit

    @property
    def ratio(self) -> float | None:
        """The number over that of the other row, in steps of 0.1 %."""
        if self.base is None:
            return None
        return over(self.now, self.base[0])

    @property
    def ratio_before(self) -> float | None:
        """The same of the numbers before."""
        if self.base is None:
            return None
        return over(self.situation.before, self.base[1])

    @property
    def verdict(self) -> str | None:
        """Of VERDICTS; None without a goal. What has no number has missed its goal."""
        if self.situation.against is None:
            return verdict(self.situation.before, self.situation.goal, self.now)
        return verdict(self.ratio_before, self.situation.goal, self.ratio)


def over(number: float | None, base: float | None) -> float | None:
    """number / base in steps of 0.1 %; None where one is missing."""
    if number is None or base is None:
        return None
    return round(number / base, 3)


def verdict(before: float | None, goal: float | None, now: float | None) -> str | None:
    """How far the way from `before` to `goal` was gone: all, at least half, or less."""
    if goal is None:
        return None
    if now is None or before is None:
        return MISSED
    if now <= goal:
        return MET
    if now <= (before + goal) / 2:
        return HALF_WAY
    return MISSED


def outcomes(situations: Sequence[Situation], found: Sequence[Measured]) -> list[Outcome]:
    """The rows beside their numbers, each with that of the row it is held against."""
    now = {
        situation.name: rounded(measured.median, situation)
        for situation, measured in zip(situations, found, strict=True)
    }
    before = {situation.name: situation.before for situation in situations}
    rows = []
    for situation, measured in zip(situations, found, strict=True):
        base = None
        if situation.against is not None:
            base = (now[situation.against], before[situation.against])
        rows.append(Outcome(situation, measured, now[situation.name], base))
    return rows


def rounded(number: float | None, situation: Situation) -> float | None:
    """As it is shown."""
    if number is None:
        return None
    return round(number, DIGITS[CALLS[situation.call].unit])


def with_ratio(number: float | None, ratio: float | None, outcome: Outcome) -> str:
    """A number with its unit, and how much more than the other row that is."""
    if number is None:
        return "-"
    text = f"{number:.{DIGITS[outcome.unit]}f} {outcome.unit}"
    if ratio is not None:
        text += f" ({percent(ratio)})"
    return text


def percent(ratio: float) -> str:
    """1.093 as +9.3 %."""
    return f"{100 * (ratio - 1):+.1f} %"


def goal_text(outcome: Outcome) -> str:
    """The goal of a row."""
    situation = outcome.situation
    if situation.goal is None:
        return ""
    if situation.against is None:
        return with_ratio(situation.goal, None, outcome)
    return f"at most {percent(situation.goal)} of {situation.against}"


def cells(outcome: Outcome) -> list[str]:
    """The text of a row."""
    now = with_ratio(outcome.now, outcome.ratio, outcome)
    if outcome.measured.failed:
        now = f"FAILED: {outcome.measured.failed}"
    error = ""
    if outcome.measured.worst is not None:
        error = f"{outcome.measured.worst:.1e}"
    return [
        outcome.situation.name,
        with_ratio(outcome.situation.before, outcome.ratio_before, outcome),
        goal_text(outcome),
        now,
        outcome.verdict or "",
        error,
    ]


def summary(rows: Sequence[Outcome]) -> str:
    """How many goals were met, and how many were not."""
    verdicts = [row.verdict for row in rows if row.verdict]
    counts = ", ".join(f"{verdicts.count(name)} {name}" for name in VERDICTS)
    return f"{len(verdicts)} goals: {counts}."


def record(outcome: Outcome) -> dict[str, Any]:
    """A row of the JSON file."""
    situation = outcome.situation
    case = outcome.measured.layer.case
    return {
        "name": situation.name,
        "shape": [case.E, case.H, case.I, case.top_k],
        "T": case.T,
        "r": case.r,
        "dropout": case.dropout,
        "recompute": situation.recompute,
        "experts": situation.experts.__name__,
        "call": situation.call,
        "unit": outcome.unit,
        "before": situation.before,
        "goal": situation.goal,
        "against": situation.against,
        "now": outcome.now,
        "ratio": outcome.ratio,
        "verdict": outcome.verdict,
        "groups": outcome.measured.groups,
        "spread": outcome.measured.spread,
        "kept": outcome.measured.kept,
        "errors": outcome.measured.errors,
        "failed": outcome.measured.failed,
    }


# ---- the run -----------------------------------------------------------------------------------


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returns."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the rows; 1 if one failed."""
    if argv is None:
        argv = sys.argv[1:]
    args = parse_arguments(argv)
    device = torch.device(args.device)
    # the reference must be IEEE fp32
    torch.set_float32_matmul_precision("highest")
    dtype = DTYPES["bfloat16"]
    if args.tiny:
        dtype = DTYPES["float32"]
    started = datetime.now(UTC)
    situations = chosen(args.rows or [])
    layers = [situation.layer(dtype, device, args.tiny) for situation in situations]
    ahead, _ = timed(lambda: compile_ahead(layers))
    print(f"compiled ahead in {ahead:.0f} s", file=sys.stderr, flush=True)
    seconds, found = timed(lambda: measure(layers, args.groups, args.steps, rest=args.rest))
    print(f"measured in {seconds:.0f} s", file=sys.stderr, flush=True)
    rows = outcomes(situations, found)
    machine = describe_machine(device)
    table = markdown_table(HEADER, [cells(row) for row in rows])
    heading = f"{machine_line(machine)}; {started:%Y-%m-%d}; median of {args.groups} groups of "
    heading += f"{args.steps} calls in a row, {args.rest:g} s of rest ahead of every group."
    text = f"{heading}\n\n{table}\n\n{summary(rows)}"
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n")
    report = {
        "machine": machine,
        "date": started.isoformat(timespec="seconds"),
        "command": list(argv),
        "tiny": args.tiny,
        "seconds": {"compiling ahead": ahead, "measuring": seconds},
        "before": BEFORE,
        "rows": [record(row) for row in rows],
    }
    write_json(args.json, report)
    return int(any(row.measured.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
