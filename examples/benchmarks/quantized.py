"""Time LoRA on quantized experts beside LoRA on dense ones, and train a 30B model in 24 GB.

    python examples/benchmarks/quantized.py
        one layer: its step, its peak, and how long its codes take to decode
    python examples/benchmarks/quantized.py --scratch 32 128 1024
        the same with several bounds of the scratch for decoded weights, in MiB
    python examples/benchmarks/quantized.py --tokens 1 64 512
        few rows: codes decoded in the product, or before it
    python examples/benchmarks/quantized.py --model --loss-chunk 512 --rank 16
        48 layers of Qwen3-30B-A3B, random NF4 experts
    python examples/benchmarks/quantized.py --model --rank 16 --optimizer adamw_8bit
        the model with AdamW's moments in 8 bits, by bitsandbytes; all logits at once
    python examples/benchmarks/quantized.py --model --rank 16 --optimizer adamw_8bit \\
        --loss-chunk 256 --step-in-backward
        the model in the least memory: each parameter steps as soon as its gradient is there
    python examples/benchmarks/quantized.py --model --loss-chunk 256 --steps 6 --one-thread \\
        --compile-layers
        each decoder layer compiled by itself, and backward in the caller's thread

The layer: `get_peft_model` on transformers' Qwen3-MoE experts, forward and backward, dense and
quantized in turns in one run; outputs and gradients are first compared with a reference in higher
precision. The model: see `quantized_model.py`. On a CPU all sizes are small. bitsandbytes is
needed for adamw_8bit alone.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cases import DTYPES, MIB, SHAPES, Case, default_device, shape_of
from few_rows import time_few_rows, use_blocks
from models import FORMATS
from options import parse
from quantized_layer import time_layer
from quantized_model import OPTIMIZERS, Training, optimizer_class, train
from report import Column, format_table, write_json

LAYER_COLUMNS = {
    "case": Column("case", is_label=True),
    "route": Column("route", is_label=True),
    "scratch": Column("scratch MiB"),
    "step": Column("step ms", "{:.2f}"),
    "x_step": Column("x dense", "{:.2f}"),
    "peak": Column("peak MiB", "{:.0f}"),
    "x_peak": Column("x dense", "{:.2f}"),
    "weights": Column("weights MiB", "{:.0f}"),
    "decode_ms": Column("decoding ms", "{:.3f}"),
}
CPU_DEFAULTS = {"shape": "many-small", "dtype": "float32", "tokens": [256]}
MODEL_DEFAULTS = {"tokens": [2048], "rank": 4}
CPU_MODEL_DEFAULTS = {"tokens": [64], "rank": 4}


@dataclass
class Arguments:
    """The command line."""

    model: bool = field(
        default=False, metadata={"help": "train the whole model instead of timing a layer"}
    )
    shape: str = field(
        default="qwen3-30b",
        metadata={
            "help": f"E,H,I,top_k or of: {', '.join(SHAPES)} "
            "(default: qwen3-30b, many-small on a CPU)"
        },
    )
    formats: list[str] = field(
        default_factory=lambda: ["nf4"],
        metadata={"choices": list(FORMATS), "help": "(default: nf4)"},
    )
    tokens: list[int] = field(
        default_factory=lambda: [8192],
        metadata={
            "help": "(default: 8192 for a layer, 2048 for the model; 256, 64 on a CPU); "
            "several: times each with codes decoded in the product and into a scratch"
        },
    )
    blocks: str | None = field(
        default=None,
        metadata={"help": "with several --tokens: settings of the products, as JSON"},
    )
    rank: int = field(default=16, metadata={"help": "(default: 16 for a layer, 4 for the model)"})
    dtype: str = field(
        default="bfloat16",
        metadata={
            "choices": list(DTYPES),
            "help": "of a layer (default: bfloat16, float32 on a CPU)",
        },
    )
    scratch: list[int] | None = field(
        default=None, metadata={"help": "bounds of the scratch, MiB (default: the set one)"}
    )
    repeat: int = field(
        default=20, metadata={"help": "timed steps a round, three rounds (default: 20)"}
    )
    steps: int = field(default=3, metadata={"help": "of the model (default: 3)"})
    loss_chunk: int | None = field(
        default=None, metadata={"help": "tokens whose logits are formed at once (default: all)"}
    )
    optimizer: str = field(
        default="adamw_torch",
        metadata={
            "choices": list(OPTIMIZERS),
            "help": "of the model, by its name in TrainingArguments (default: adamw_torch)",
        },
    )
    step_in_backward: bool = field(
        default=False,
        metadata={"help": "of the model: an optimizer for each parameter, stepped in backward"},
    )
    one_thread: bool = field(
        default=False,
        metadata={"help": "of the model: backward runs in the caller's thread, not in autograd's"},
    )
    compile_layers: bool = field(
        default=False, metadata={"help": "of the model: each decoder layer is compiled by itself"}
    )
    json: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "keep the numbers here"}
    )


def other_defaults(args: Arguments) -> dict[str, Any]:
    """What is otherwise by default for a model, and on a CPU."""
    on_gpu = torch.cuda.is_available()
    if args.model and on_gpu:
        return MODEL_DEFAULTS
    if args.model:
        return CPU_MODEL_DEFAULTS
    if on_gpu:
        return {}
    return CPU_DEFAULTS


def parse_arguments(argv: list[str] | None = None) -> Arguments:
    """The command line, with the defaults of the machine."""
    parser, args = parse(Arguments, __doc__, argv, other_defaults)
    try:
        shape_of(args.shape)
    except ValueError as error:
        parser.error(f"--shape: {error}")
    try:
        optimizer_class(args.optimizer)
    except ValueError as error:
        parser.error(f"--optimizer: {error}")
    return args


def compare_ways(case: Case, args: Arguments) -> list[dict[str, Any]]:
    """Few rows: time every number of tokens, and print a table of each."""
    if args.blocks:
        use_blocks(json.loads(args.blocks))
    found = []
    for T in args.tokens:
        timed = time_few_rows(replace(case, T=T), args.formats[0], args.repeat)
        found.append(timed)
        print(f"{timed['case']}, {timed['rows_per_expert']:g} rows an expert")
        rows = [{"way": way, **times} for way, times in timed["ms"].items()]
        columns = {"way": Column("", is_label=True)}
        columns |= {kind: Column(f"{kind} ms", "{:.3f}") for kind in ("forward", "graph", "step")}
        print(format_table(rows, columns), flush=True)
    return found


def compare_formats(case: Case, args: Arguments) -> list[dict[str, Any]]:
    """One layer: time every format, and print a table for every bound of the scratch."""
    found = []
    bounds: list[int | None] = [None]
    if args.scratch:
        bounds = [*args.scratch]
    for scratch in bounds:
        if scratch is not None:
            from peft_moe_lora.ops.kernels import parts

            parts.SCRATCH_BYTES = scratch * MIB
        rows = [asdict(row) for row in time_layer(case, args.formats, args.repeat, scratch)]
        found += rows
        table = []
        for row in rows:
            decode = row["decode"] or {}
            ms = sum(projection["ms"] for projection in decode.values())
            table.append({**row, "decode_ms": ms or None})
        print(format_table(table, LAYER_COLUMNS), flush=True)
    return found


def main(argv: list[str] | None = None) -> None:
    """Time a layer, or train the model; print what was found."""
    args = parse_arguments(argv)
    device = torch.device(default_device())
    found: Any
    if args.model:
        training = Training(
            args.formats[0],
            args.rank,
            args.tokens[0],
            args.steps,
            args.loss_chunk,
            args.optimizer,
            args.step_in_backward,
            args.one_thread,
            args.compile_layers,
        )
        found = train(training, device)
        print(json.dumps(found, indent=2))
    else:
        shape = shape_of(args.shape)
        dtype = DTYPES[args.dtype]
        case = Case(args.shape, *shape, args.tokens[0], args.rank, dtype, 0.0, device)
        if len(args.tokens) > 1:
            found = compare_ways(case, args)
        else:
            found = compare_formats(case, args)
    write_json(args.json, found)


if __name__ == "__main__":
    main()
