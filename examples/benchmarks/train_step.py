"""Time whole training steps of a slice of Qwen3-30B-A3B: no adapter, PEFT's own, peft_moe_lora's.

    python examples/benchmarks/train_step.py         8 layers at real widths, on a GPU of 48 GiB
    python examples/benchmarks/train_step.py --tiny  the same steps of a tiny model on a CPU

A step is forward, backward and AdamW on the adapters (LoRA of rank 16 on experts, q, k, v and o;
fp32 on a bf16 base; sdpa, experts on grouped_mm). Every route runs on the same weights in memory,
and in every route the embeddings' output requires a gradient, so that backward goes through every
layer; `base` has nothing to train and no optimizer. Before anything is timed, PEFT's adapter gets
the values of ours, and both must give the same logits and gradients.
"""

import gc
import inspect
import statistics
import sys
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.integrations.liger import apply_liger_kernel

from agreement import check
from cases import MIB, QWEN3_30B, TINY_QWEN3, dtype_name
from checking import CheckFailed
from models import MODEL_ROUTES, ModelRoute, build_dense, set_checkpointing
from options import parse
from report import Column, describe_machine, format_table, machine_line, write_json
from timing import peak_bytes, seconds_per_call

SLICE = QWEN3_30B | {"vocab_size": 32768}
TINY_DEFAULTS = {
    "device": "cpu",
    "layers": 2,
    "batches": ["4x32", "1x32"],
    "rounds": 2,
    "steps": 1,
}


# what moe_lora is held to on an H200: by batch, how many times as fast as PEFT; peak over PEFT's
GOAL_SPEED = {"4x2048": 1.6, "1x2048": 2.0}
GOAL_PEAK = 0.4


@dataclass
class Row:
    """Whole training steps of one route: forward, backward, AdamW on the adapters.

    Routes share the base weights and take turns in every round. What was not measured is null.

    Attributes:
        route: base is frozen, without adapter and optimizer: forward and backward alone.
        batch: sequences x tokens.
        ckpt: whether every layer is checkpointed.
        failed: why the route has no numbers.
        ms: of a step: the median over the rounds of each round's mean.
        tok_s: tokens per second.
        peak: MiB, the most allocated during a step above the base weights: the route's adapter,
            gradients and optimizer state are included.
        first: seconds of the route's first step of this case.
        spread: (slowest - fastest round) / median.
        x_base, x_peft: ms of the other route over this one's.
        peak_of_peft: this route's peak over PEFT's.
        goal_x_peft, goal_x_base, goal_peak_of_peft: what moe_lora is held to on an H200.
    """

    route: str
    batch: str
    ckpt: bool
    failed: str | None = None
    ms: float | None = None
    tok_s: float | None = None
    peak: float | None = None
    first: float | None = None
    spread: float | None = None
    x_base: float | None = None
    x_peft: float | None = None
    peak_of_peft: float | None = None
    goal_x_peft: float | None = None
    goal_x_base: float | None = None
    goal_peak_of_peft: float | None = None


COLUMNS = {
    "batch": Column("batch", is_label=True),
    "checkpointing": Column("checkpointing", is_label=True),
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
    "first": Column("first s", "{:.2f}"),
    "spread": Column("spread", "{:.0%}"),
}
YES_NO = {False: "no", True: "yes"}


# ---- the command line --------------------------------------------------------------------------


class Batch(NamedTuple):
    """So many sequences of so many tokens."""

    sequences: int
    length: int

    def __str__(self) -> str:
        return f"{self.sequences}x{self.length}"


@dataclass
class Arguments:
    """The command line."""

    tiny: bool = field(default=False, metadata={"help": "a tiny model in fp32 on a CPU"})
    device: str = field(default="cuda", metadata={"help": "default: cuda, with --tiny cpu"})
    layers: int = field(default=8, metadata={"help": "default: 8, with --tiny 2"})
    batches: list[str] = field(
        default_factory=lambda: ["4x2048", "1x2048"],
        metadata={"metavar": "BxT", "help": "sequences x tokens (default: 4x2048 1x2048)"},
    )
    rank: int = field(default=16, metadata={"help": "r; lora_alpha is 2 r (default: 16)"})
    routes: list[str] = field(
        default_factory=lambda: ["base", "peft", "moe_lora"],
        metadata={"choices": list(MODEL_ROUTES)},
    )
    checkpointing: list[str] = field(
        default_factory=lambda: ["no", "yes"], metadata={"choices": ["no", "yes"]}
    )
    rounds: int = field(
        default=6,
        metadata={"help": "in each every route takes its turn (default: 6, with --tiny 2)"},
    )
    steps: int = field(
        default=5, metadata={"help": "timed in a row per turn (default: 5, with --tiny 1)"}
    )
    liger: bool = field(
        default=False,
        metadata={"help": "every route with Liger's norms, rope and chunked loss (extra `liger`)"},
    )
    json: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "write every number here"}
    )

    @property
    def sizes(self) -> dict:
        """Of the model, as fields of its configuration."""
        if self.tiny:
            return TINY_QWEN3 | {"num_hidden_layers": self.layers}
        return SLICE | {"num_hidden_layers": self.layers}

    @property
    def dtype(self) -> torch.dtype:
        """Of the base weights."""
        if self.tiny:
            return torch.float32
        return torch.bfloat16

    def batch_list(self) -> list[Batch]:
        """The batches as numbers.

        Raises:
            ValueError: if one is not written as sequences x tokens, or has less than two tokens.
        """
        batches = []
        for text in self.batches:
            sequences, _, length = text.partition("x")
            batch = Batch(int(sequences), int(length))
            if batch.sequences < 1 or batch.length < 2:
                raise ValueError(f"{text} has no sequence or less than two tokens")
            batches.append(batch)
        return batches


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
    try:
        args.batch_list()
    except ValueError as error:
        parser.error(f"--batches must all be like 4x2048: {error}")
    return args


# ---- measuring ---------------------------------------------------------------------------------


def batch_of(args: Arguments, batch: Batch, seed: int = 0) -> torch.Tensor:
    """[sequences, length] random token ids on the device."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(args.sizes["vocab_size"], batch, generator=generator)
    return ids.to(args.device)


def peak_of_step(route: ModelRoute, ids: torch.Tensor) -> int:
    """Bytes allocated at most during a step, above the base weights; the adapter is included."""
    return peak_bytes(partial(route.step, ids), ids.device) + route.static_bytes()


def run_case(
    routes: dict[str, ModelRoute], batch: Batch, checkpointing: bool, args: Arguments
) -> list[Row]:
    """One row per route, measured in rounds in which every route takes its turn."""
    ids = batch_of(args, batch)
    rows = {name: Row(name, str(batch), checkpointing) for name in routes}
    for name, row in rows.items():
        warm_up(routes[name], ids, row)
    running = [name for name, row in rows.items() if not row.failed]
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(args.rounds):
        for name in running:
            seconds = seconds_per_call(partial(routes[name].step, ids), ids.device, args.steps)
            times[name].append(1e3 * seconds)
    for name, measured in times.items():
        row = rows[name]
        row.ms = statistics.median(measured)
        row.tok_s = 1e3 * batch.sequences * batch.length / row.ms
        row.spread = (max(measured) - min(measured)) / row.ms
    compare_rows(rows)
    return list(rows.values())


def warm_up(route: ModelRoute, ids: torch.Tensor, row: Row) -> None:
    """Fill in the first step's time and the peak; where memory does not suffice, say so."""
    set_checkpointing(route.model, row.ckpt)
    step = partial(route.step, ids)
    try:
        row.first = seconds_per_call(step, ids.device, 1)
        seconds_per_call(step, ids.device, 2)
        row.peak = peak_of_step(route, ids) / MIB
    except torch.OutOfMemoryError as error:
        row.first = None
        row.failed = f"raised {type(error).__name__}"
        print(f"  {row.route}: {row.failed}: {str(error).splitlines()[0]}", file=sys.stderr)
        route.model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()


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
        if row.route == "moe_lora" and row.batch in GOAL_SPEED:
            row.goal_x_peft = GOAL_SPEED[row.batch]
            row.goal_x_base = 1.0
            if not row.ckpt:
                row.goal_peak_of_peft = GOAL_PEAK


def main(argv: list[str] | None = None) -> int:
    """Check, measure, print a table; 1 if routes disagree or one failed."""
    if argv is None:
        argv = sys.argv[1:]
    args = parse_arguments(argv)
    started = datetime.now(UTC)
    base = build_dense(args.sizes, args.dtype, torch.device(args.device))
    routes = {name: MODEL_ROUTES[name](base, args.rank) for name in args.routes}
    print("Checking that the routes with an adapter agree", file=sys.stderr)
    try:
        losses = check(routes, base, args.rank, batch_of(args, args.batch_list()[-1], seed=99))
    except CheckFailed as error:
        print(f"No numbers: {error}.", file=sys.stderr)
        return 1
    if args.liger:
        # after the check, which needs logits; the experts stay each route's own
        for route in routes.values():
            apply_liger_kernel(route.model, {"swiglu": False})
    machine = describe_machine(torch.device(args.device))
    model = f"Qwen3-30B-A3B cut to {args.layers} layers, {dtype_name(args.dtype)}: {args.sizes}"
    report = {
        "machine": machine,
        "date": started.isoformat(timespec="seconds"),
        "what": f"{model}; LoRA of rank {args.rank}.\n{inspect.cleandoc(Row.__doc__ or '')}",
        "command": argv,
        "losses": losses,
    }
    rows: list[Row] = []
    for batch in args.batch_list():
        for checkpointing in args.checkpointing:
            print(f"{batch}, checkpointing: {checkpointing} ...", file=sys.stderr, flush=True)
            rows += run_case(routes, batch, checkpointing == "yes", args)
            # after every case, so that an interrupted run leaves what it has
            write_json(args.json, {**report, "rows": [asdict(row) for row in rows]})
    line = f"{started:%Y-%m-%d}; {args.layers} layers, r = {args.rank}"
    if args.liger:
        line += ", with Liger"
    print(f"{machine_line(machine)}, {line}")
    print(format_table([asdict(r) | {"checkpointing": YES_NO[r.ckpt]} for r in rows], COLUMNS))
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
