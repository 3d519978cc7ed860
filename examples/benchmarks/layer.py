"""Time one experts layer with LoRA, forward and backward, beside its peers and the roofline.

    python examples/benchmarks/layer.py            the goals' shapes on a GPU, small ones on a CPU
    python examples/benchmarks/layer.py --json speed.json --plot speed.png
    python examples/benchmarks/layer.py --shapes qwen3-30b 64,4096,1024,6 --tokens 2048 --rank 16
    python examples/benchmarks/layer.py --shapes qwen3-30b --tokens 2048 8192 --rank 16 32 64 \\
        --markdown speed.md                    the published table, with other projects' columns
    python examples/benchmarks/layer.py --models openai/gpt-oss-20b ./my-model --tokens 2048

Routes, all in one run on one machine, on the same inputs, frozen base weights and fp32 adapters:
    moe_lora              `get_peft_model(model, MoELoraConfig(...))` on transformers' experts
    moe_lora-recompute    the same with recompute=True
    moe_lora-torch        the same with backend="torch"
    moe_lora-materialize  the same with backend="materialize": grouped_mm on W + scaling * B A
    peft                  PEFT's `LoraConfig(target_parameters=...)` on the same experts
    peft-applied          the same under `apply_to_peft()`
    torch                 plain PyTorch: sort, gather, grouped_mm for all products
    base                  transformers' experts on grouped_mm, without an adapter
    frozen                the same on this package's kernels: experts_implementation="moe_lora"

The output and every gradient of a route are first compared with a reference in higher precision.
A route that fails is named in the table and has no number. Before every timed step the L2 cache is
flushed, and A and B get new versions, as an optimizer step gives them: what a route prepares once
per version is part of its time.
"""

import gc
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cases import CPU_CASES, DTYPES, GPU_CASES, SHAPES, Case, default_device
from comparison import Setup, run_case
from layer_row import LEGEND, Row
from model_layers import ModelLayer, layers_of, named_layer
from options import parse
from published import published
from report import Column, describe_machine, format_table, machine_line, plot, write_json
from roofline import FORMULA, Ceilings, Probe, measure_ceilings
from routes import ROUTES
from timing import Timer

CPU_DEFAULTS = {"dtype": "float32", "repeat": 12, "routes": ["moe_lora", "base", "torch"]}

COLUMNS = {
    "config": Column("shape", is_label=True),
    "T": Column("T", is_label=True),
    "r": Column("r", is_label=True),
    "peer": Column("route", is_label=True),
    "fwd": Column("fwd ms", "{:.2f}"),
    "step": Column("fwd+bwd ms", "{:.2f}"),
    "roof": Column("roof ms", "{:.2f}"),
    "x_roof": Column("x roof", "{:.2f}"),
    "x_roof_idle": Column("idle x", "{:.2f}"),
    "goal_x_roof": Column("goal x", "{:.2f}"),
    "x_base": Column("x base+share", "{:.2f}"),
    "goal_x_base": Column("goal x", "{:.2f}"),
    "kept": Column("kept MiB", "{:.1f}"),
    "goal_kept": Column("goal MiB"),
    "peak": Column("peak MiB", "{:.1f}"),
    "first": Column("first s", "{:.2f}"),
    "host": Column("host ms", "{:.2f}"),
    "spread": Column("spread", "{:.0%}"),
    "worst": Column("worst error", "{:.1e}"),
}


@dataclass
class Arguments:
    """The command line."""

    shapes: list[str] | None = field(
        default=None,
        metadata={"metavar": "SHAPE", "help": f"E,H,I,top_k or of: {', '.join(SHAPES)}"},
    )
    models: list[str] | None = field(
        default=None,
        metadata={
            "metavar": "MODEL",
            "help": "folder with a config.json, or name on the hub: the layers of this model",
        },
    )
    tokens: list[int] | None = field(
        default=None, metadata={"metavar": "T", "help": "tokens (default: 8192, on a CPU 256)"}
    )
    rank: list[int] = field(
        default_factory=lambda: [16], metadata={"metavar": "r", "help": "ranks (default: 16)"}
    )
    routes: list[str] = field(
        default_factory=lambda: ["moe_lora", "peft", "torch"],
        metadata={
            "metavar": "ROUTE",
            "choices": list(ROUTES),
            "help": f"of: {', '.join(ROUTES)} "
            "(default: moe_lora peft torch, on a CPU moe_lora base torch)",
        },
    )
    skip_peft: bool = field(default=False, metadata={"help": "leave the slowest peer out"})
    skew: float = field(
        default=0.0,
        metadata={
            "metavar": "SHARE",
            "nargs": "?",
            "const": 0.9,
            "help": "share of the rows on one expert (default: 0, alone: 0.9)",
        },
    )
    dtype: str = field(
        default="bfloat16",
        metadata={
            "choices": list(DTYPES),
            "help": "of base and activations (default: bfloat16, on a CPU float32)",
        },
    )
    device: str = field(
        default_factory=default_device, metadata={"help": "default: cuda where there is one"}
    )
    repeat: int = field(
        default=24,
        metadata={"help": "timed steps per route and case (default: 24, on a CPU 12)"},
    )
    rest: float = field(
        default=0.0,
        metadata={
            "metavar": "SECONDS",
            "help": "idle ahead of every turn; the turns are short then (default: 0)",
        },
    )
    cold: bool = field(
        default=False,
        metadata={"help": "start with an empty Triton cache, so that the first step compiles"},
    )
    json: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "write every number here"}
    )
    markdown: Path | None = field(
        default=None,
        metadata={
            "metavar": "FILE",
            "help": "write times and errors here, beside other projects' from peers.json",
        },
    )
    plot: Path | None = field(
        default=None,
        metadata={"metavar": "FILE", "help": "draw the bars here (needs matplotlib)"},
    )

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")


def device_defaults(args: Arguments) -> dict[str, Any]:
    """What is otherwise by default on the device of the options."""
    if args.on_gpu:
        return {}
    return CPU_DEFAULTS


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """The command line, with the defaults of its device."""
    parser, args = parse(Arguments, __doc__, argv, device_defaults)
    if args.skip_peft:
        args.routes = [name for name in args.routes if name != "peft"]
    if not args.routes:
        parser.error("--skip-peft leaves no route; name another one in --routes")
    if min(args.repeat, *args.rank, *(args.tokens or [])) < 1:
        parser.error("--repeat, --rank and --tokens must be at least 1")
    if not 0 <= args.skew <= 1:
        parser.error(f"--skew must be in [0, 1], got {args.skew}")
    if not 0 <= args.rest < math.inf:
        parser.error(f"--rest must be a number of seconds, got {args.rest}")
    try:
        list_cases(args)
    except ValueError as error:
        parser.error(f"--shapes, --models: {error}")
    return args


def list_cases(args: Arguments) -> list[Case]:
    """The default cases, or the product of what the command line names.

    Raises:
        ValueError: if a shape is unknown, or a model's layers cannot be measured.
    """
    dtype = DTYPES[args.dtype]
    device = torch.device(args.device)
    return [
        Case(layer.name, *layer.shape, T, r, dtype, args.skew, device, experts=layer.experts)
        for layer, T in layers_and_tokens(args)
        for r in args.rank
    ]


def layers_and_tokens(args: Arguments) -> list[tuple[ModelLayer, int]]:
    """Each layer that is timed, with its tokens."""
    pairs = CPU_CASES
    tokens = [256]
    if args.on_gpu:
        pairs = GPU_CASES
        tokens = [8192]
    if not (args.shapes or args.models or args.tokens):
        return [(named_layer(name), T) for name, T in pairs]
    layers = [named_layer(name) for name in args.shapes or []]
    for model in args.models or []:
        layers += layers_of(model)
    if not layers:
        layers = [named_layer(name) for name in dict(pairs)]
    return [(layer, T) for layer in layers for T in args.tokens or tokens]


@contextmanager
def empty_triton_cache() -> Iterator[None]:
    """Within it, Triton compiles everything anew."""
    before = os.environ.get("TRITON_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TRITON_CACHE_DIR"]
            if before is not None:
                os.environ["TRITON_CACHE_DIR"] = before


def run(args: Arguments, report: dict[str, object], setup: Setup) -> list[Row]:
    """Run every case. The report is written after each, so an interrupted run leaves one too."""
    rows: list[Row] = []
    seen: set[str] = set()
    for case in list_cases(args):
        print(f"{case.label} ...", file=sys.stderr, flush=True)
        rows += run_case(case, args.routes, setup, seen)
        gc.collect()
        if args.on_gpu:
            torch.cuda.empty_cache()
        write_json(args.json, {**report, "rows": [asdict(row) for row in rows]})
    return rows


def headline(args: Arguments, machine: dict, started: datetime, ceilings: Ceilings) -> str:
    """Machine, date and ceilings, above the table and the plot."""
    flops = f"{ceilings.flops / 1e12:.3g} TFLOP/s {args.dtype}"
    bandwidth = f"{ceilings.bandwidth / 1e12:.3g} TB/s"
    line = f"{started:%Y-%m-%d}, ceilings of the idle machine {flops}, {bandwidth}"
    if args.rest:
        line += f", {args.rest:g} s of rest ahead of every turn"
    return f"{machine_line(machine)}\n{line}"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 if a route failed."""
    if argv is None:
        argv = sys.argv[1:]
    args = parse_arguments(argv)
    device = torch.device(args.device)
    if device.index is not None:
        torch.cuda.set_device(device)
    # the reference must be IEEE fp32
    torch.set_float32_matmul_precision("highest")
    started = datetime.now(UTC)
    timer = Timer(device, args.rest)
    probe = Probe(device, DTYPES[args.dtype])
    ceilings = measure_ceilings(timer, probe)
    machine = describe_machine(device)
    report = {
        "machine": machine,
        "date": started.isoformat(timespec="seconds"),
        "what": LEGEND,
        "roofline": FORMULA,
        "command": argv,
        "cold": args.cold,
        "rest": args.rest,
        "ceilings": {"dtype": args.dtype, **ceilings._asdict()},
    }
    setup = Setup(timer, probe, ceilings, args.repeat)
    if args.cold:
        with empty_triton_cache():
            rows = run(args, report, setup)
    else:
        rows = run(args, report, setup)
    title = headline(args, machine, started, ceilings)
    table = [{**asdict(row), "worst": row.worst} for row in rows]
    print(title)
    print(format_table(table, COLUMNS))
    if args.markdown:
        args.markdown.write_text(published(f"{machine_line(machine)}; {started:%Y-%m-%d}", table))
    if args.plot:
        plot(table, args.plot, title)
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
