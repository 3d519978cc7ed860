"""Sweep one quantity of the experts layer at a time, and find where its cost jumps.

    python examples/benchmarks/sweep.py --out docs/pictures       all axes, in 4 minutes on an H200
    python examples/benchmarks/sweep.py --axis r dropout --quick
    python examples/benchmarks/sweep.py --draw sweep.json         only draws, without a GPU
    python examples/benchmarks/sweep.py --device cpu --tiny       tries the command; no numbers

Writes sweep.json and sweep.svg. The points are in axes.py, how they are measured is in turns.py:
all points of an axis are in memory, and each of five rounds times 20 steps in a row of every one.
The output and all gradients of a point are first compared with plain PyTorch in higher precision.
The floor of a point is the roofline of roofline.py, at ceilings that are measured in every round. A
point is flagged where it costs more than 10 % above the line between its neighbours, see smooth.py.
"""

import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from axes import AXES, Point
from cases import DTYPES, default_device
from options import parse
from report import Column, describe_machine, format_table, machine_line, write_json
from roofline import FORMULA, Ceilings, Probe, roof
from smooth import ALLOWED, above, is_flagged, line_between_neighbours
from sweep_picture import draw
from timing import Timer
from turns import Measured, clean, compile_ahead, measure

# of the probe's product and copy, in each round
PROBES = 5
QUICK = {"groups": 3, "steps": 10}

COLUMNS = {
    "label": Column("point", is_label=True),
    "ms": Column("ms", "{:.3f}"),
    "spread": Column("spread", "{:.0%}"),
    "floor": Column("floor ms", "{:.3f}"),
    "over_floor": Column("over floor", "{:.2f}"),
    "above": Column("above line", "{:+.1%}"),
    "flag": Column(""),
    "kept": Column("kept MiB", "{:.1f}"),
    "worst": Column("worst error", "{:.1e}"),
}


@dataclass
class Arguments:
    """The command line."""

    axis: list[str] = field(
        default_factory=lambda: list(AXES),
        metadata={"choices": list(AXES), "help": f"of: {', '.join(AXES)} (default: all)"},
    )
    quick: bool = field(
        default=False, metadata={"help": "fewer points, 3 groups of 10 steps by default"}
    )
    out: Path = field(
        default=Path(), metadata={"metavar": "FOLDER", "help": "of the two files (default: here)"}
    )
    draw: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "draw this sweep.json, measure nothing"}
    )
    groups: int = field(default=5, metadata={"help": "of steps, of each point (default: 5)"})
    steps: int = field(default=20, metadata={"help": "in a row in a group (default: 20)"})
    seconds: float = field(
        default=240, metadata={"help": "after so many, no further axis is begun (default: 240)"}
    )
    device: str = field(
        default_factory=default_device, metadata={"help": "default: cuda where there is one"}
    )
    tiny: bool = field(
        default=False, metadata={"help": "shrink all sizes, and run in fp32: tries the command"}
    )


def quick_defaults(args: Arguments) -> dict[str, Any]:
    """What is otherwise by default with --quick."""
    if args.quick:
        return QUICK
    return {}


def parse_arguments(argv: Sequence[str] | None) -> Arguments:
    """The command line."""
    parser, args = parse(Arguments, __doc__, argv, quick_defaults)
    if min(args.groups, args.steps) < 1:
        parser.error("--groups and --steps must be at least 1")
    return args


# ---- one axis ----------------------------------------------------------------------------------


class Floor:
    """The ceilings of the machine, measured in every round of an axis."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.timer = Timer(device)
        self.probe = Probe(device, dtype)
        self.rounds: list[tuple[float, float]] = []

    def add_round(self) -> None:
        """Time a product and a copy."""
        self.rounds.append(self.probe(self.timer, PROBES, PROBES))

    def ceilings(self) -> Ceilings:
        """Those of the median round."""
        products, copies = zip(*self.rounds, strict=True)
        return self.probe.ceilings(statistics.median(products), statistics.median(copies))


def record(point: Point, measured: Measured, floor: float) -> dict[str, Any]:
    """A point in the JSON file, without what its neighbours say of it."""
    case = measured.layer.case
    ms = measured.median
    over_floor = None
    if ms is not None:
        over_floor = ms / floor
    return {
        "x": point.x,
        "label": point.label,
        "curve": point.curve,
        "shape": [case.E, case.H, case.I, case.top_k],
        "T": case.T,
        "r": case.r,
        "dropout": case.dropout,
        "ms": ms,
        "groups": measured.groups,
        "spread": measured.spread,
        "floor": floor,
        "over_floor": over_floor,
        "kept": measured.kept,
        "errors": measured.errors,
        "worst": measured.worst,
        "failed": measured.failed,
    }


def add_flags(points: list[dict[str, Any]]) -> None:
    """Fill in line, above and flagged, on each curve of an axis."""
    for curve in dict.fromkeys(point["curve"] for point in points):
        of_curve = [point for point in points if point["curve"] == curve]
        costs = [point["ms"] for point in of_curve]
        lines = line_between_neighbours([point["x"] for point in of_curve], costs)
        for point, line in zip(of_curve, lines, strict=True):
            point["line"] = line
            point["above"] = above(point["ms"], line)
            point["flagged"] = is_flagged(point["ms"], line)


def run_axis(name: str, args: Arguments, dtype: torch.dtype) -> dict[str, Any]:
    """Measure the points of an axis.

    Returns: its ceilings, its seconds, and its points.
    """
    device = torch.device(args.device)
    start = time.perf_counter()
    points = AXES[name].points(args.quick)
    layers = [point.layer(dtype, device, args.tiny) for point in points]
    floor = Floor(device, dtype)
    found = measure(layers, args.groups, args.steps, floor.add_round)
    ceilings = floor.ceilings()
    records = [
        record(point, measured, roof(measured.layer.case, ceilings))
        for point, measured in zip(points, found, strict=True)
    ]
    add_flags(records)
    seconds = time.perf_counter() - start
    return {"ceilings": ceilings._asdict(), "seconds": seconds, "points": records}


# ---- the run -----------------------------------------------------------------------------------


def show(name: str, result: dict[str, Any]) -> None:
    """Print an axis."""
    table = [{**point, "flag": "<-- jumps" * point["flagged"]} for point in result["points"]]
    print(f"\n{AXES[name].title}, {result['seconds']:.0f} s")
    print(format_table(table, COLUMNS), flush=True)


def try_to_draw(report: dict[str, Any], path: Path) -> None:
    """Draw the report, where it has an axis and matplotlib is installed."""
    if not report["axes"]:
        return
    try:
        draw(report, path)
    except ImportError as error:
        print(f"no picture: {error}; elsewhere, run sweep.py --draw sweep.json", file=sys.stderr)


def sweep(args: Arguments, report: dict[str, Any]) -> None:
    """Measure the axes, and write the report after each."""
    device = torch.device(args.device)
    dtype = DTYPES["bfloat16"]
    if args.tiny:
        dtype = DTYPES["float32"]
    start = time.perf_counter()
    points = [point for name in args.axis for point in AXES[name].points(args.quick)]
    compile_ahead([point.layer(dtype, device, args.tiny) for point in points])
    report["compiling_ahead"] = time.perf_counter() - start
    print(f"compiled ahead in {report['compiling_ahead']:.0f} s", file=sys.stderr, flush=True)
    for name in args.axis:
        if time.perf_counter() - start > args.seconds:
            report["left_out"].append(name)
            continue
        report["axes"][name] = run_axis(name, args, dtype)
        show(name, report["axes"][name])
        write_json(args.out / "sweep.json", report)
        clean(device)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep; 1 if a point failed or an axis was left out."""
    if argv is None:
        argv = sys.argv[1:]
    args = parse_arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.draw is not None:
        draw(json.loads(args.draw.read_text()), args.out / "sweep.svg")
        return 0
    # the reference must be IEEE fp32
    torch.set_float32_matmul_precision("highest")
    machine = describe_machine(torch.device(args.device))
    started = datetime.now(UTC)
    print(f"{machine_line(machine)}; {started:%Y-%m-%d}")
    report: dict[str, Any] = {
        "machine": machine,
        "date": started.isoformat(timespec="seconds"),
        "command": list(argv),
        "what": __doc__,
        "floor": FORMULA,
        "allowed": ALLOWED,
        "axes": {},
        "left_out": [],
    }
    sweep(args, report)
    write_json(args.out / "sweep.json", report)
    try_to_draw(report, args.out / "sweep.svg")
    points = [point for result in report["axes"].values() for point in result["points"]]
    flagged = [point["label"] for point in points if point["flagged"]]
    failed = [point["label"] for point in points if point["failed"]]
    print(f"\n{len(points)} points; {len(flagged)} jump: {', '.join(flagged) or 'none'}")
    for title, names in (("failed", failed), ("left out", report["left_out"])):
        if names:
            print(f"{title}: {', '.join(names)}", file=sys.stderr)
    return int(bool(failed or report["left_out"]))


if __name__ == "__main__":
    sys.exit(main())
