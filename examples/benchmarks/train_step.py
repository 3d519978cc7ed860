"""Time whole training steps of a slice of Qwen3-30B-A3B: no adapter, PEFT's own, peft_moe_lora's.

    python examples/benchmarks/train_step.py         8 layers at real widths, on a GPU of 48 GiB
    python examples/benchmarks/train_step.py --tiny  the same steps of a tiny model on a CPU

A step is forward, backward and AdamW on the adapters (LoRA of rank 16 on experts, q, k, v and o;
fp32 on a bf16 base; sdpa, experts on grouped_mm). Every route runs on the same weights in memory,
and in every route the embeddings' output requires a gradient, so that backward goes through every
layer; `base` has nothing to train and no optimizer. Before anything is timed, PEFT's adapter gets
the values of ours, and both must give the same logits and gradients.

A case is a batch and how its steps run: eager, compiled as a whole or layer by layer, with Liger,
with backward in the caller's thread; with checkpointing, plain or under `keep_experts`; with a
vocabulary (`step_cases`). After each case all numbers are written, and
a row that fails leaves the others alone.
"""

import gc
import inspect
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.integrations.liger import apply_liger_kernel

from agreement import check
from cases import MIB, QWEN3_30B, TINY_QWEN3, dtype_name
from checking import CheckFailed
from models import MODEL_ROUTES, ModelRoute, build_dense, compile_layers, set_checkpointing
from options import parse
from report import (
    describe_machine,
    format_cells,
    format_table,
    machine_line,
    markdown_table,
    write_json,
)
from step_cases import DEFAULT, TINY, VOCABULARY, Batch, StepCase, in_groups, read_case
from step_parts import profile_step
from step_picture import draw
from step_rows import COLUMNS, Row, compare_rows, fill_in
from timing import peak_bytes, seconds_per_call

TINY_DEFAULTS = {
    "device": "cpu",
    "layers": 2,
    "cases": list(TINY),
    "rounds": 2,
    "steps": 1,
}
# so few that the host bounds a step on any GPU
HOST_BATCH = Batch(1, 4)
# what a route may raise that ends its row alone; an error of the device ends the process's others
MAY_FAIL = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, NotImplementedError)


# ---- the command line --------------------------------------------------------------------------


@dataclass
class Arguments:
    """The command line."""

    tiny: bool = field(default=False, metadata={"help": "a tiny model in fp32 on a CPU"})
    device: str = field(default="cuda", metadata={"help": "default: cuda, with --tiny cpu"})
    layers: int = field(default=8, metadata={"help": "default: 8, with --tiny 2"})
    cases: list[str] = field(
        default_factory=lambda: list(DEFAULT),
        metadata={
            "metavar": "CASE",
            "help": "sequences x tokens, then any of +plain or +experts (checkpointing), +compile "
            "or +layers (each decoder layer compiled), +liger, +one-thread (backward in the "
            f"caller's thread) and +vocabulary=N (default: {len(DEFAULT)} cases, 7 minutes on an "
            "H200)",
        },
    )
    rank: int = field(default=16, metadata={"help": "r; lora_alpha is 2 r (default: 16)"})
    routes: list[str] = field(
        default_factory=lambda: ["base", "peft", "moe_lora"],
        metadata={"choices": list(MODEL_ROUTES)},
    )
    compiled_routes: list[str] = field(
        default_factory=lambda: ["base", "moe_lora"],
        metadata={"choices": list(MODEL_ROUTES), "help": "those of --routes that are compiled too"},
    )
    rounds: int = field(
        default=3,
        metadata={"help": "in each every route takes its turn (default: 3, with --tiny 2)"},
    )
    steps: int = field(
        default=3, metadata={"help": "timed in a row per turn (default: 3, with --tiny 1)"}
    )
    seconds: float = field(
        default=400.0, metadata={"help": "no case begins once so many have passed (default: 400)"}
    )
    json: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "write every number here"}
    )
    markdown: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "write the table here"}
    )
    picture: Path | None = field(
        default=None,
        metadata={"metavar": "FILE", "help": "draw where the time goes, as SVG or PNG"},
    )
    draw: Path | None = field(
        default=None,
        metadata={
            "metavar": "JSON",
            "help": "measure nothing, and draw --picture from a file of --json; for a machine with "
            "matplotlib",
        },
    )

    def sizes(self, vocabulary: int) -> dict[str, Any]:
        """Of the model, as fields of its configuration."""
        sizes = QWEN3_30B
        if self.tiny:
            sizes = TINY_QWEN3
        return sizes | {"num_hidden_layers": self.layers, "vocab_size": vocabulary}

    @property
    def dtype(self) -> torch.dtype:
        """Of the base weights."""
        if self.tiny:
            return torch.float32
        return torch.bfloat16

    def case_groups(self) -> list[list[StepCase]]:
        """The cases of each model, in the order in which they are measured.

        Raises:
            ValueError: if one is not written as a case.
        """
        vocabulary = VOCABULARY
        if self.tiny:
            vocabulary = TINY_QWEN3["vocab_size"]
        return in_groups([read_case(text, vocabulary) for text in self.cases])


def model_defaults(args: Arguments) -> dict[str, Any]:
    """What is otherwise by default for the model of the options."""
    if args.tiny:
        return TINY_DEFAULTS
    return {}


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """The command line, with the defaults of its model."""
    parser, args = parse(Arguments, __doc__, argv, model_defaults)
    if min(args.layers, args.rank, args.rounds, args.steps) < 1:
        parser.error("--layers, --rank, --rounds and --steps must be at least 1")
    if args.draw is not None and args.picture is None:
        parser.error("--draw needs --picture, the file to draw")
    try:
        args.case_groups()
    except ValueError as error:
        parser.error(f"--cases must all be like 4x2048+plain: {error}")
    return args


# ---- measuring ---------------------------------------------------------------------------------


def batch_of(args: Arguments, batch: Batch, vocabulary: int, seed: int = 0) -> torch.Tensor:
    """[sequences, length] random token ids on the device."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, batch, generator=generator)
    return ids.to(args.device)


def peak_of_step(route: ModelRoute, ids: torch.Tensor) -> int:
    """Bytes allocated at most during a step, above the base weights; the adapter is included."""
    return peak_bytes(partial(route.step, ids), ids.device) + route.static_bytes()


def run_case(routes: dict[str, ModelRoute], case: StepCase, args: Arguments) -> list[Row]:
    """One row per route, measured in rounds in which every route takes its turn."""
    ids = batch_of(args, case.batch, case.vocabulary)
    rows = {
        name: Row(name, str(case.batch), case.checkpointing, case.variant, case.vocabulary)
        for name in routes
        if not case.compiles or name in args.compiled_routes
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    with torch.autograd.set_multithreading_enabled(not case.one_thread):
        for name, row in rows.items():
            attempt(routes[name], row, partial(warm_up, routes[name], ids, case, row, args))
        for _ in range(args.rounds):
            for name, row in rows.items():
                attempt(routes[name], row, partial(time_turn, routes[name], ids, args, times[name]))
    for name, row in rows.items():
        if not row.failed:
            fill_in(row, case.batch, times[name])
    for name in rows:
        for module in routes[name].model.modules():
            module._compiled_call_impl = None
    torch._dynamo.reset()
    compare_rows(rows)
    return list(rows.values())


def attempt(route: ModelRoute, row: Row, measure: Callable[[], None]) -> None:
    """Measure, unless the row has failed; if it fails, note why and free what it holds."""
    if row.failed:
        return
    try:
        measure()
    except MAY_FAIL as error:
        row.failed = f"raised {type(error).__name__}"
        first_line = str(error).partition("\n")[0]
        print(f"  {row.route}: {row.failed}: {first_line}", file=sys.stderr)
    if row.failed:
        route.model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()


def warm_up(
    route: ModelRoute, ids: torch.Tensor, case: StepCase, row: Row, args: Arguments
) -> None:
    """Fill in the first step's time, the peak, and what one step consists of."""
    set_checkpointing(route.model, case.checkpointing != "no", case.checkpointing == "experts")
    if case.compiled:
        route.model.compile()
    if case.layers:
        compile_layers(route.model)
    step = partial(route.step, ids)
    first = seconds_per_call(step, ids.device, 1)
    seconds_per_call(step, ids.device, 2)
    row.peak = peak_of_step(route, ids) / MIB
    profile = profile_step(route, ids, with_parts=not case.compiles)
    row.launches = profile.launches
    row.parts = profile.parts
    if not case.compiles:
        few = partial(route.step, batch_of(args, HOST_BATCH, case.vocabulary))
        # new kinds of calls are learned and recorded in the first three
        seconds_per_call(few, ids.device, 3)
        row.host_us = 1e6 * seconds_per_call(few, ids.device, args.steps) / args.layers
    row.first = first


def time_turn(route: ModelRoute, ids: torch.Tensor, args: Arguments, times: list[float]) -> None:
    """Append the ms of a step."""
    times.append(1e3 * seconds_per_call(partial(route.step, ids), ids.device, args.steps))


# ---- the run -----------------------------------------------------------------------------------


class Run:
    """A run of the command: its report, and what it has left out.

    Args:
        args: the command line.
        argv: the same in words.
    """

    def __init__(self, args: Arguments, argv: list[str]) -> None:
        self.args = args
        self.started = datetime.now(UTC)
        self.ends = time.monotonic() + args.seconds
        self.rows: list[Row] = []
        self.left_out: list[StepCase] = []
        model = f"Qwen3-30B-A3B cut to {args.layers} layers, {dtype_name(args.dtype)}"
        what = f"{model}; LoRA of rank {args.rank}.\n{inspect.cleandoc(Row.__doc__ or '')}"
        self.report: dict[str, Any] = {
            "machine": describe_machine(torch.device(args.device)),
            "date": self.started.isoformat(timespec="seconds"),
            "what": what,
            "command": argv,
            "losses": {},
        }

    def measure(self, cases: list[StepCase]) -> None:
        """Measure cases of one group.

        Raises:
            CheckFailed: if the routes do not agree.
        """
        args = self.args
        vocabulary = cases[0].vocabulary
        gc.collect()
        base = build_dense(args.sizes(vocabulary), args.dtype, torch.device(args.device))
        routes = {name: MODEL_ROUTES[name](base, args.rank) for name in args.routes}
        print("Checking that the routes with an adapter agree", file=sys.stderr)
        # one sequence, because the check holds the logits of all routes
        short = Batch(1, min(case.batch.length for case in cases))
        ids = batch_of(args, short, vocabulary, seed=99)
        self.report["losses"][str(vocabulary)] = check(routes, base, args.rank, ids)
        if cases[0].liger:
            # after the check, which needs logits; the experts stay each route's own
            give_liger([route.model for route in routes.values()])
        for case in cases:
            if time.monotonic() > self.ends:
                self.left_out.append(case)
                continue
            print(f"{case} ...", file=sys.stderr, flush=True)
            self.rows += run_case(routes, case, args)
            # after every case, so that an interrupted run leaves what it has
            self.write()

    def write(self) -> None:
        """Write the files that are asked for."""
        rows = [asdict(row) for row in self.rows]
        report = {**self.report, "rows": rows}
        write_json(self.args.json, report)
        if self.args.markdown is not None:
            columns = {
                key: column
                for key, column in COLUMNS.items()
                if any(row[key] is not None for row in rows)
            }
            titles = [column.title for column in columns.values()]
            cells = [format_cells(row, columns) for row in rows]
            self.args.markdown.write_text(markdown_table(titles, cells) + "\n")

    def show(self) -> int:
        """Print the table, draw the picture; 1 if a row failed or a case was left out."""
        args = self.args
        for case in self.left_out:
            print(f"Left out after {args.seconds:.0f} s: {case}", file=sys.stderr)
        if not self.rows:
            return 1
        line = f"{self.started:%Y-%m-%d}; {args.layers} layers, r = {args.rank}"
        print(f"{machine_line(self.report['machine'])}, {line}")
        rows = [asdict(row) for row in self.rows]
        print(format_table(rows, COLUMNS))
        if args.picture is not None:
            try_to_draw({**self.report, "rows": rows}, args.picture)
        return int(bool(self.left_out) or any(row.failed for row in self.rows))


def give_liger(models: list[nn.Module]) -> None:
    """Liger's norms, rope and loss in chunks."""
    for model in models:
        apply_liger_kernel(model, {"swiglu": False})


def try_to_draw(report: dict[str, Any], picture: Path) -> None:
    """Draw, or say that matplotlib is missing: a run on a GPU is not lost for a picture."""
    try:
        draw(report, picture)
    except ModuleNotFoundError as error:
        print(f"No picture: {error}. Elsewhere: --draw JSON --picture FILE.", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Check, measure, print a table; 1 if routes disagree, one failed, or time ran out."""
    if argv is None:
        argv = sys.argv[1:]
    args = parse_arguments(argv)
    if args.draw is not None:
        draw(json.loads(args.draw.read_text()), args.picture)
        return 0
    run = Run(args, argv)
    disagree = False
    for cases in args.case_groups():
        try:
            run.measure(cases)
        except CheckFailed as error:
            disagree = True
            print(f"No numbers: {error}.", file=sys.stderr)
    return max(int(disagree), run.show())


if __name__ == "__main__":
    sys.exit(main())
