"""Time training steps of Qwen3-MoE on several GPUs: DDP, FSDP2 and expert parallelism.

    python examples/benchmarks/scale.py --gpus 1 2         8 layers at real widths, random weights
    python examples/benchmarks/scale.py --gpus 1 2 --tiny  a tiny model, processes on a CPU

A step is forward, backward and AdamW on the adapters (rank 16 on experts, fp32 on a bf16 base).
Every GPU has its own batch, and all engines have the same weights and the same batches. Before
anything is timed, each engine must give the loss and the norm of the gradients of one GPU that sees
all batches.

Engines: `alone` runs without communication and trains a model for each GPU, so it is the measure of
the others. `ddp`, and `fsdp2` with a shard for each layer; `fsdp2-kept` keeps the weights that
forward has gathered until backward has used them. `ep` divides the experts over all GPUs and shards
the other weights by FSDP2; rows travel by all-to-all.
"""

import gc
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.distributed import DistributedConfig

from cases import MIB, PROJECTIONS, TINY_QWEN3, dtype_name
from checking import CheckFailed
from models import build_dense
from options import parse
from peft_moe_lora import MoELoraConfig
from report import Column, describe_machine, format_table, machine_line, write_json
from step_cases import SLICE, Batch
from timing import peak_bytes, seconds_per_call

ENGINES = ("alone", "ddp", "fsdp2", "fsdp2-kept", "ep")
ROUTES = ("base", "peft", "moe_lora")
TINY_DEFAULTS = {"device": "cpu", "layers": 2, "batch": "4x32", "rounds": 2, "steps": 1}
# bf16 rounds the activations; the sums of several GPUs have another order
LOSS_TOLERANCE = {torch.bfloat16: 2e-3, torch.float32: 1e-5}
NORM_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


@dataclass
class Row:
    """Training steps of one route on one engine.

    Attributes:
        gpus: number of processes, each with its own GPU and its own batch.
        engine: how the model is spread over them.
        route: base is frozen, without adapter and optimizer.
        failed: why there are no numbers.
        ms: of a step, on the slowest process: the median over the rounds of each round's mean.
        tok_s: tokens a second of all processes together.
        efficiency: tok_s over that of `alone` on one GPU, times the number of GPUs.
        x_base: tok_s over that of `base` on the same engine and as many GPUs.
        peak: MiB, the most that a process holds during a step, weights included.
        adapter: MiB of A and B in a process.
        optimizer: MiB of AdamW's state in a process.
        spread: (slowest - fastest round) / median.
        nccl: ms in which NCCL's kernels run, beside others or alone.
        nccl_alone: ms of these in which no other kernel runs.
        idle: ms in which no kernel runs.
    """

    gpus: int
    engine: str
    route: str
    failed: str | None = None
    ms: float | None = None
    tok_s: float | None = None
    efficiency: float | None = None
    x_base: float | None = None
    peak: float | None = None
    adapter: float | None = None
    optimizer: float | None = None
    spread: float | None = None
    nccl: float | None = None
    nccl_alone: float | None = None
    idle: float | None = None


COLUMNS = {
    "gpus": Column("GPUs", is_label=True),
    "engine": Column("engine", is_label=True),
    "route": Column("route", is_label=True),
    "ms": Column("ms", "{:.1f}"),
    "tok_s": Column("tokens/s", "{:,.0f}"),
    "efficiency": Column("efficiency", "{:.0%}"),
    "x_base": Column("x base", "{:.2f}"),
    "peak": Column("peak MiB", "{:,.0f}"),
    "adapter": Column("A, B MiB", "{:,.1f}"),
    "optimizer": Column("AdamW MiB", "{:,.1f}"),
    "nccl": Column("NCCL ms", "{:.1f}"),
    "nccl_alone": Column("alone", "{:.1f}"),
    "idle": Column("idle ms", "{:.1f}"),
    "spread": Column("spread", "{:.0%}"),
}


@dataclass
class Arguments:
    """The command line."""

    tiny: bool = field(default=False, metadata={"help": "a tiny model in fp32 on a CPU"})
    device: str = field(default="cuda", metadata={"help": "default: cuda, with --tiny cpu"})
    gpus: list[int] = field(
        default_factory=lambda: [1, 2], metadata={"help": "numbers of processes (default: 1 2)"}
    )
    layers: int = field(default=8, metadata={"help": "default: 8, with --tiny 2"})
    batch: str = field(
        default="4x2048",
        metadata={"metavar": "BxT", "help": "sequences x tokens of a GPU (default: 4x2048)"},
    )
    rank: int = field(default=16, metadata={"help": "r; lora_alpha is 2 r (default: 16)"})
    engines: list[str] = field(
        default_factory=lambda: list(ENGINES), metadata={"choices": list(ENGINES)}
    )
    routes: list[str] = field(
        default_factory=lambda: list(ROUTES), metadata={"choices": list(ROUTES)}
    )
    rounds: int = field(default=5, metadata={"help": "default: 5, with --tiny 2"})
    steps: int = field(default=4, metadata={"help": "in a row per round (default: 4, tiny 1)"})
    json: Path | None = field(
        default=None, metadata={"metavar": "FILE", "help": "write every number here"}
    )

    traces: Path | None = field(
        default=None, metadata={"metavar": "FOLDER", "help": "write a trace of every row here"}
    )

    @property
    def sizes(self) -> dict[str, Any]:
        """Of the model, as fields of its configuration."""
        sizes = SLICE
        if self.tiny:
            sizes = TINY_QWEN3
        return sizes | {"num_hidden_layers": self.layers}

    @property
    def dtype(self) -> torch.dtype:
        """Of the base weights."""
        if self.tiny:
            return torch.float32
        return torch.bfloat16

    @property
    def sequences(self) -> Batch:
        """The batch of a GPU as numbers."""
        sequences, _, length = self.batch.partition("x")
        return Batch(int(sequences), int(length))


def model_defaults(args: Arguments) -> dict[str, Any]:
    """What is otherwise by default for the model of the options."""
    if args.tiny:
        return TINY_DEFAULTS
    return {}


# ---- a model on an engine ------------------------------------------------------------------------


def adapted(base: nn.Module, route: str, rank: int) -> nn.Module:
    """The base with the adapter of a route, whose values are the same in every process."""
    torch.manual_seed(1)
    if route == "moe_lora":
        config = MoELoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=["experts"], init_lora_weights=False
        )
    elif route == "peft":
        parameters = [f"experts.{projection}_proj" for projection in PROJECTIONS]
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=[],
            target_parameters=parameters,
            init_lora_weights=False,
        )
    else:
        return base
    return get_peft_model(base, config)


def on_alone(args: Arguments, route: str, device: torch.device) -> nn.Module:
    base = build_dense(args.sizes, args.dtype, device)
    return adapted(base, route, args.rank)


def on_ddp(args: Arguments, route: str, device: torch.device) -> nn.Module:
    model = on_alone(args, route, device)
    model.enable_input_require_grads()
    if route == "base":
        # there is nothing whose gradients would be averaged
        return model
    return nn.parallel.DistributedDataParallel(model)


def on_fsdp2(args: Arguments, route: str, device: torch.device, reshard: bool = True) -> nn.Module:
    model = on_alone(args, route, device)
    decoder = model
    if isinstance(model, PeftModel):
        decoder = model.get_base_model()
    for layer in decoder.model.layers:
        fully_shard(layer, reshard_after_forward=reshard)
    fully_shard(model, reshard_after_forward=reshard)
    return model


def on_ep(args: Arguments, route: str, device: torch.device) -> nn.Module:
    """The loader divides a state dict, so the whole model is on every GPU for a moment."""
    base = build_dense(args.sizes, args.dtype, device)
    number = dist.get_world_size()
    divided = Qwen3MoeForCausalLM.from_pretrained(
        None,
        config=Qwen3MoeConfig(**args.sizes, use_cache=False),
        state_dict=base.state_dict(),
        dtype=args.dtype,
        distributed_config=DistributedConfig(fsdp_size=number, ep_size=number),
    )
    del base
    return adapted(divided.requires_grad_(False).train(), route, args.rank)


BUILD: dict[str, Callable[[Arguments, str, torch.device], nn.Module]] = {
    "alone": on_alone,
    "ddp": on_ddp,
    "fsdp2": on_fsdp2,
    "fsdp2-kept": partial(on_fsdp2, reshard=False),
    "ep": on_ep,
}


# ---- measuring, in each process ------------------------------------------------------------------


class Step:
    """A training step of a model on this process's own batch."""

    def __init__(self, model: nn.Module, ids: torch.Tensor) -> None:
        self.model = model
        self.ids = ids
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer: torch.optim.Optimizer | None = None
        if self.trained:
            self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, fused=self.ids.is_cuda)

    def __call__(self) -> None:
        self.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def backward(self, share: float = 1.0) -> torch.Tensor:
        """Forward and backward of share * loss, which is returned."""
        loss = share * self.model(input_ids=self.ids, labels=self.ids).loss
        loss.backward()
        return loss.detach()

    def gradient_norm(self) -> float:
        """The norm of all gradients together; every process must call this."""
        norm = nn.utils.get_total_norm([p.grad for p in self.trained if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        return norm.item()

    def held(self) -> tuple[float, float]:
        """MiB of the trained parameters and of the optimizer's state in this process."""
        parameters = sum(here(p).nbytes for p in self.trained)
        state = 0
        if self.optimizer is not None:
            for values in self.optimizer.state.values():
                state += sum(here(v).nbytes for v in values.values() if v.ndim)
        return parameters / MIB, state / MIB


def here(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return tensor


def batch_of(args: Arguments, rank: int, device: torch.device) -> torch.Tensor:
    """[sequences, length] random token ids of one process."""
    generator = torch.Generator().manual_seed(100 + rank)
    ids = torch.randint(args.sizes["vocab_size"], args.sequences, generator=generator)
    return ids.to(device)


class Numbers(NamedTuple):
    """What every engine must agree on: the mean loss, and the norm of the gradients."""

    loss: float
    norm: float


def numbers_of_one(args: Arguments, route: str, number: int, device: torch.device) -> Numbers:
    """Those of one GPU that sees the batches of `number` GPUs one after the other."""
    model = on_alone(args, route, device)
    loss = 0.0
    for rank in range(number):
        step = Step(model, batch_of(args, rank, device))
        loss += step.backward(1 / number).item()
    return Numbers(loss, step.gradient_norm())


def check(step: Step, wanted: Numbers, args: Arguments) -> None:
    """Compare a first step with one GPU.

    Raises:
        CheckFailed: in every process, if they differ.
    """
    loss = step.backward()
    dist.all_reduce(loss)
    found = Numbers(loss.item() / dist.get_world_size(), step.gradient_norm())
    step.model.zero_grad(set_to_none=True)
    tolerances = Numbers(LOSS_TOLERANCE[args.dtype], NORM_TOLERANCE[args.dtype])
    for name in Numbers._fields:
        value = getattr(found, name)
        expected = getattr(wanted, name)
        if not abs(value - expected) <= getattr(tolerances, name) * abs(expected):
            raise CheckFailed(f"the {name} is {value:.6f}, but one GPU has {expected:.6f}")


def slowest(milliseconds: float, device: torch.device) -> float:
    """The longest time of any process."""
    if not dist.is_initialized():
        return milliseconds
    longest = torch.tensor(milliseconds, device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return longest.item()


def record(step: Step, row: Row, traces: Path | None) -> None:
    """Fill in where the time of a step goes, on this process's GPU."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [
        event
        for event in profile.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]
    spans = [Span(event.start_ns(), event.start_ns() + event.duration_ns()) for event in kernels]
    of_nccl = ["nccl" in event.name().lower() for event in kernels]
    everything = covered(spans)
    others = covered([span for span, is_nccl in zip(spans, of_nccl, strict=True) if not is_nccl])
    row.nccl = covered([span for span, is_nccl in zip(spans, of_nccl, strict=True) if is_nccl])
    row.nccl_alone = everything - others
    whole = max(span.end for span in spans) - min(span.start for span in spans)
    row.idle = whole / 1e6 - everything
    if traces is not None:
        traces.mkdir(exist_ok=True)
        profile.export_chrome_trace(str(traces / f"{row.gpus}_{row.engine}_{row.route}.json.gz"))


class Span(NamedTuple):
    """ns from start to end."""

    start: int
    end: int


def covered(spans: list[Span]) -> float:
    """ms in which at least one of the spans runs."""
    total = 0
    until = 0
    for span in sorted(spans):
        total += max(0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total / 1e6


def measure(args: Arguments, engine: str, route: str, device: torch.device) -> Row:
    """The row of one route on one engine; every process calls this and gets the same."""
    number = 1
    rank = 0
    if dist.is_initialized():
        number = dist.get_world_size()
        rank = dist.get_rank()
    row = Row(number, engine, route)
    wanted = None
    if route != "base" and engine != "alone":
        wanted = numbers_of_one(args, route, number, device)
        free()
    model = BUILD[engine](args, route, device)
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        model.enable_input_require_grads()
    step = Step(model, batch_of(args, rank, device))
    if wanted is not None:
        check(step, wanted, args)
    seconds_per_call(step, device, 2)
    measured = []
    for _ in range(args.rounds):
        milliseconds = 1e3 * seconds_per_call(step, device, args.steps)
        measured.append(slowest(milliseconds, device))
    row.ms = statistics.median(measured)
    row.spread = (max(measured) - min(measured)) / row.ms
    row.tok_s = 1e3 * number * args.sequences.sequences * args.sequences.length / row.ms
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        row.peak = slowest((before + peak_bytes(step, device)) / MIB, device)
    row.adapter, row.optimizer = step.held()
    if device.type == "cuda":
        traces = None
        if rank == 0:
            traces = args.traces
        record(step, row, traces)
    return row


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def process(rank: int, args: Arguments, number: int, folder: str) -> None:
    """What each process runs: every engine and route; the first one writes the rows."""
    device = torch.device(args.device)
    backend = "gloo"
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if number > 1:
        os.environ["LOCAL_RANK"] = os.environ["RANK"] = str(rank)
        os.environ["WORLD_SIZE"] = str(number)
        store = f"file://{folder}/rendezvous_{number}"
        dist.init_process_group(
            backend, init_method=store, rank=rank, world_size=number, timeout=timedelta(minutes=3)
        )
    rows = []
    for engine in args.engines:
        if number == 1 and engine != "alone":
            continue
        for route in args.routes:
            try:
                row = measure(args, engine, route, device)
            except (CheckFailed, torch.OutOfMemoryError, ValueError, RuntimeError) as error:
                said = str(error).partition("\n")[0]
                row = Row(number, engine, route, failed=f"{type(error).__name__}: {said}")
            free()
            rows.append(row)
            if rank == 0:
                print(asdict(row), file=sys.stderr, flush=True)
                torch.save([asdict(row) for row in rows], Path(folder) / f"rows_{number}.pt")
    if number > 1:
        dist.destroy_process_group()


def compare_rows(rows: list[Row]) -> None:
    """Fill in how each row compares with one GPU, and with the frozen model beside it."""
    measured = {(row.gpus, row.engine, row.route): row for row in rows if not row.failed}
    for (gpus, engine, route), row in measured.items():
        alone = measured.get((1, "alone", route))
        base = measured.get((gpus, engine, "base"))
        if alone is not None and row is not alone:
            row.efficiency = row.tok_s / (gpus * alone.tok_s)
        if base is not None and row is not base:
            row.x_base = row.tok_s / base.tok_s


def main(argv: list[str] | None = None) -> int:
    """Check, measure, print a table; 1 if something failed."""
    if argv is None:
        argv = sys.argv[1:]
    parser, args = parse(Arguments, __doc__, argv, model_defaults)
    if args.device.startswith("cuda") and torch.cuda.device_count() < max(args.gpus):
        parser.error(f"--gpus: this machine has {torch.cuda.device_count()}")
    started = datetime.now(UTC)
    machine = describe_machine(torch.device(args.device))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in args.gpus:
            run = partial(torch.multiprocessing.spawn, process, nprocs=number)
            run(args=(args, number, folder))
            rows += [Row(**row) for row in torch.load(Path(folder) / f"rows_{number}.pt")]
            compare_rows(rows)
            report = {
                "machine": machine,
                "date": started.isoformat(timespec="seconds"),
                "what": f"{args.layers} layers, {dtype_name(args.dtype)}, {args.batch} a GPU",
                "command": argv,
                "rows": [asdict(row) for row in rows],
            }
            write_json(args.json, report)
    line = f"{started:%Y-%m-%d}; {args.layers} layers, {args.batch} a GPU, r = {args.rank}"
    print(f"{machine_line(machine)}, {line}")
    print(format_table([asdict(row) for row in rows], COLUMNS))
    return int(any(row.failed for row in rows))


if __name__ == "__main__":
    sys.exit(main())
