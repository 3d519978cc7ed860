"""Compare the memory that `plan` predicts with the peaks of real training steps on a GPU.

    python examples/benchmarks/plan_calibration.py --json docs/plan_calibration.json
    python examples/benchmarks/plan_calibration.py --tiny    the same points of a tiny model, no GPU

Ten points: 8 and 48 layers of Qwen3-30B-A3B's widths, bf16 and NF4 experts, with and without
checkpointing. One model of 48 layers is made for each format, on the device; the points with 8
layers use its first 8. LoRA is on experts, q, k, v and o; fp32, fused AdamW. A measured peak is the
most that PyTorch allocates in the third step, without what a shallower point leaves unused.
Predictions need no GPU, and are made by other processes meanwhile.
"""

import gc
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
from peft import get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig

from cases import QWEN3_30B, TINY_QWEN3
from models import ATTENTION, build_dense, build_quantized, set_checkpointing
from options import parse
from peft_moe_lora import MoELoraConfig, plan
from report import Column, describe_machine, format_table, machine_line, write_json
from timing import seconds_per_call

GIB = 2**30
TARGETS = ["experts", *ATTENTION]
# processes that predict
PREDICTING = 5


@dataclass(frozen=True)
class Point:
    """One training step.

    Attributes:
        layers: of the model.
        quant: of the experts: "nf4", or None for bf16.
        checkpointing: whether every layer is computed again in backward.
        batch, length: sequences, and tokens of each.
        r: rank.
    """

    layers: int
    quant: str | None
    checkpointing: bool
    batch: int
    length: int
    r: int


# 48 layers in bf16 hold 57 GiB of weights, and at r = 16 10 GiB of A, B, gradients and AdamW
POINTS = (
    Point(8, None, False, 4, 2048, 16),
    Point(8, None, True, 4, 2048, 16),
    Point(8, None, False, 1, 2048, 64),
    Point(48, None, False, 1, 2048, 16),
    Point(48, None, True, 4, 2048, 16),
    Point(8, "nf4", False, 4, 2048, 16),
    Point(8, "nf4", True, 1, 4096, 16),
    Point(48, "nf4", False, 1, 2048, 16),
    Point(48, "nf4", True, 1, 2048, 4),
    Point(48, "nf4", True, 4, 2048, 16),
)


@dataclass
class Row:
    """A point with what was predicted and measured.

    Attributes:
        point: the step in words.
        predicted, measured: GiB at most; measured is null without a GPU.
        error: predicted / measured - 1.
        predicted_ms, ms: of a step; the measured one is the third.
        failed: why there is no measurement.
    """

    point: str
    predicted: float
    predicted_ms: float
    measured: float | None = None
    ms: float | None = None
    error: float | None = None
    failed: str | None = None


COLUMNS = {
    "point": Column("step", is_label=True),
    "predicted": Column("predicted GiB", "{:.2f}"),
    "measured": Column("measured GiB", "{:.2f}"),
    "error": Column("error", "{:+.1%}"),
    "predicted_ms": Column("predicted ms", "{:.0f}"),
    "ms": Column("measured ms", "{:.0f}"),
    "failed": Column("failed", is_label=True),
}


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    tiny: bool = field(default=False, metadata={"help": "a tiny model of 2 and 4 layers, no GPU"})
    device: str = field(default="cuda", metadata={"help": "default: cuda, with --tiny cpu"})
    formats: list[str] = field(
        default_factory=lambda: ["bf16", "nf4"], metadata={"choices": ["bf16", "nf4"]}
    )
    seconds: float = field(default=110, metadata={"help": "start no point after so long"})
    json: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "write every number here"}
    )

    def points(self) -> list[Point]:
        """The points of the formats; with --tiny of few layers, few tokens and a low rank."""
        points = [point for point in POINTS if format_name(point) in self.formats]
        if not self.tiny:
            return points
        return [
            replace(point, layers=point.layers // 8 + 1, length=32, r=point.r // 4)
            for point in points
        ]

    def sizes(self, layers: int) -> dict:
        """Fields of the model's configuration."""
        sizes = QWEN3_30B
        if self.tiny:
            sizes = TINY_QWEN3
        return sizes | {"num_hidden_layers": layers}


def format_name(point: Point) -> str:
    """The format of a point's experts, as the command line names it."""
    return point.quant or "bf16"


def words(point: Point) -> str:
    """A point in words."""
    size = f"{point.batch} x {point.length} tokens, r = {point.r}"
    found = f"{point.layers} layers, {format_name(point)}, {size}"
    if point.checkpointing:
        found += ", checkpointing"
    return found


def predict(args: Arguments, point: Point) -> Row:
    """What `plan` says of a point."""
    found = plan(
        Qwen3MoeConfig(**args.sizes(point.layers)),
        r=point.r,
        length=point.length,
        batch=point.batch,
        quant=point.quant,
        checkpointing=point.checkpointing,
        target_modules=TARGETS,
    )
    return Row(words(point), found.peak_gib, found.milliseconds())


def build(args: Arguments, quant: str | None) -> nn.Module:
    """The deepest model of a format, made on the device."""
    layers = max(point.layers for point in args.points())
    device = torch.device(args.device)
    if quant is None:
        return build_dense(args.sizes(layers), torch.bfloat16, device)
    return build_quantized(args.sizes(layers), quant, torch.bfloat16, device)


@dataclass
class Measured:
    """What a GPU took: GiB at most and ms of the third step, or why there is none."""

    peak: float | None = None
    ms: float | None = None
    failed: str | None = None


def measure(base: nn.Module, point: Point) -> Measured:
    """The peak and the time of the third step; the base is left as it was."""
    body = base.model
    every = body.layers
    body.layers = every[: point.layers]
    unused = nbytes(every) - nbytes(body.layers)
    model = None
    try:
        config = MoELoraConfig(r=point.r, lora_alpha=2 * point.r, target_modules=TARGETS)
        model = get_peft_model(base, config)
        set_checkpointing(base, point.checkpointing)
        base.enable_input_require_grads()
        return train(model.train(), point, unused)
    except torch.OutOfMemoryError as error:
        return Measured(failed=str(error).splitlines()[0])
    finally:
        if model is not None:
            model.zero_grad(set_to_none=True)
            model.unload()
        base.disable_input_require_grads()
        body.layers = every
        free(base.device)


def free(device: torch.device) -> None:
    """Give the device's memory back."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def nbytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers of a module."""
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def train(model: nn.Module, point: Point, unused: int) -> Measured:
    """Three steps; the third is measured.

    Args:
        unused: bytes on the device that the step does not need.
    """
    device = model.device
    cuda = device.type == "cuda"
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=cuda)
    vocabulary = model.get_base_model().config.vocab_size
    ids = torch.randint(vocabulary, (point.batch, point.length), device=device)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(2):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    found = Measured(ms=1e3 * seconds_per_call(step, device, 1))
    if cuda:
        found.peak = (torch.cuda.max_memory_allocated() - unused) / GIB
    return found


def measure_format(args: Arguments, points: list[Point], clock: float) -> dict[Point, Measured]:
    """Measure the points of one format, one after another.

    Args:
        clock: when the run began, by time.monotonic.
    """
    found = {}
    base = build(args, points[0].quant)
    for point in points:
        if time.monotonic() - clock > args.seconds:
            found[point] = Measured(failed=f"not started after {args.seconds:.0f} s")
            continue
        found[point] = measure(base, point)
        took = time.monotonic() - clock
        print(f"{took:5.0f} s  {words(point)}: {found[point]}", file=sys.stderr, flush=True)
    del base
    free(torch.device(args.device))
    return found


def merged(row: Row, measured: Measured) -> Row:
    """A prediction and its measurement."""
    error = None
    if measured.peak is not None:
        error = row.predicted / measured.peak - 1
    return replace(row, measured=measured.peak, ms=measured.ms, error=error, failed=measured.failed)


def main(argv: list[str] | None = None) -> int:
    """Predict, measure, print a table; 1 if a point failed or was left out."""

    def tiny_defaults(given: Arguments) -> dict:
        if given.tiny:
            return {"device": "cpu", "seconds": 3600}
        return {}

    _, args = parse(Arguments, __doc__, argv, tiny_defaults)
    started = datetime.now(UTC)
    clock = time.monotonic()
    device = torch.device(args.device)
    points = args.points()
    # a process that holds a CUDA context cannot be forked
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(PREDICTING, len(points)), context) as pool:
        predicted = [pool.submit(predict, args, point) for point in points]
        measured = {}
        for name in args.formats:
            chosen = [point for point in points if format_name(point) == name]
            measured |= measure_format(args, chosen, clock)
        rows = [
            merged(future.result(), measured[point])
            for future, point in zip(predicted, points, strict=True)
        ]
    machine = describe_machine(device)
    report = {
        "machine": machine,
        "date": started.isoformat(timespec="seconds"),
        "what": "peak memory of a training step, predicted by plan and measured",
        "rows": [asdict(row) for row in rows],
    }
    write_json(args.json, report)
    print(f"{machine_line(machine)}, {started:%Y-%m-%d}")
    print(format_table([asdict(row) for row in rows], COLUMNS))
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
