"""Train a deep stack of experts layers on batches of many lengths, with CUDA graphs and without.

    python examples/benchmarks/lengths.py                        48 layers, 40 lengths, on a GPU
    python examples/benchmarks/lengths.py --device cpu --tiny    tries the command

The layers share one set of frozen base weights, and each has an adapter of its own. The lengths
come in random order; one length alone is there for comparison.

    by graph, by launches, in Python    share of the calls, forward and backward, in the second half
                                        of the steps
    ms                                  wall time of a step there
    host ms                             time in which the host issues a step
    captures, capture ms                graphs captured in all steps, and the time of one
    graphs MiB, estimated MiB           device memory outside of PyTorch's pool that came with them,
                                        and what the package takes it for
"""

import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cases import MIB, Case, Problem, default_device, shape_of
from options import parse
from peft_moe_lora.ops.kernels.launching import graphs, replay
from report import Column, describe_machine, format_table, machine_line, write_json
from routes import moe_lora_route
from timing import synchronize

COLUMNS = {
    "case": Column("case", is_label=True),
    "graph": Column("by graph", "{:.1%}"),
    "launches": Column("by launches", "{:.1%}"),
    "python": Column("in Python", "{:.1%}"),
    "ms": Column("ms", "{:.2f}"),
    "host_ms": Column("host ms", "{:.2f}"),
    "captures": Column("captures"),
    "capture_ms": Column("capture ms", "{:.2f}"),
    "graphs_mib": Column("graphs MiB", "{:.1f}"),
    "estimated_mib": Column("estimated MiB", "{:.1f}"),
}
# numbers of kernels, and graphs of each, whose memory is measured
NODES = (1, 8, 16, 32)
GRAPHS = 128


@dataclass
class Arguments:
    """The command line."""

    layers: int = field(default=48, metadata={"help": "layers (default: 48)"})
    lengths: int = field(default=40, metadata={"help": "lengths (default: 40)"})
    longest: int = field(default=1024, metadata={"help": "tokens at most (default: 1024)"})
    steps: int = field(default=160, metadata={"help": "steps of each case (default: 160)"})
    shape: str = field(default="qwen3-30b", metadata={"help": "of the layers: a name of cases.py"})
    tiny: bool = field(default=False, metadata={"help": "small sizes, to try the command"})
    device: str = field(default_factory=default_device, metadata={"help": "default: a GPU"})
    json: Path | None = field(default=None, metadata={"help": "write every number here"})


def tiny_defaults(args: Arguments) -> dict[str, Any]:
    """Small sizes with --tiny."""
    if not args.tiny:
        return {}
    return {"layers": 3, "lengths": 4, "longest": 24, "steps": 12, "shape": "8,64,32,2"}


# ---- the model ---------------------------------------------------------------------------------


class Stack(nn.Module):
    """Layers one after the other, each added to what comes in."""

    def __init__(self, problem: Problem, num_layers: int) -> None:
        super().__init__()
        layers = [moe_lora_route(problem).forward for _ in range(num_layers)]
        self.layers = nn.ModuleList([layer for layer in layers if isinstance(layer, nn.Module)])

    def forward(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        for layer in self.layers:
            hidden = hidden + layer(hidden, top_k_index, top_k_weights)
            hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True))
        return hidden


def train_step(stack: Stack, problem: Problem, length: int) -> None:
    """Forward and backward of the first tokens of the problem; gradients are dropped before."""
    stack.zero_grad(set_to_none=True)
    x = problem.x.detach()[:length].clone().requires_grad_()
    index = problem.top_k_index[:length].clone()
    weights = problem.top_k_weights.detach()[:length].clone()
    stack(x, index, weights).backward(problem.dout[:length])


# ---- what is counted ---------------------------------------------------------------------------


@dataclass
class Counts:
    """How calls were made.

    Attributes:
        replays: calls that repeated recorded launches, one by one or as a graph.
        launches: those whose launches went out one by one.
        captures: seconds of each capture.
    """

    replays: int = 0
    launches: int = 0
    captures: list[float] = field(default_factory=list)


@contextmanager
def counting() -> Iterator[Counts]:
    """Within it, calls are counted."""
    counts = Counts()
    replayed = replay._Replay.__call__
    launched = graphs.Graphs._launch
    captured = graphs.Graphs._captured

    def replay_and_count(self: Any, arguments: Any) -> Any:
        counts.replays += 1
        return replayed(self, arguments)

    def launch_and_count(self: Any, addresses: Any) -> None:
        counts.launches += 1
        launched(self, addresses)

    def capture_and_count(self: Any, addresses: Any) -> Any:
        start = time.perf_counter()
        found = captured(self, addresses)
        counts.captures.append(time.perf_counter() - start)
        return found

    # types cannot be assigned to, so far as mypy knows
    classes: Any = (replay._Replay, graphs.Graphs)
    classes[0].__call__ = replay_and_count
    classes[1]._launch = launch_and_count
    classes[1]._captured = capture_and_count
    try:
        yield counts
    finally:
        classes[0].__call__ = replayed
        classes[1]._launch = launched
        classes[1]._captured = captured


def other_memory(device: torch.device) -> int:
    """Bytes of the device that are in use, but not by PyTorch's pool; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


@contextmanager
def graphs_kept(wanted: bool, device: torch.device) -> Iterator[None]:
    """Within it, graphs are captured or not; it begins and ends without recorded calls."""
    share = graphs.SHARE
    replay.forget()
    if not wanted:
        graphs.SHARE = 0.0
    try:
        yield
    finally:
        synchronize(device)
        graphs.SHARE = share
        replay.forget()


def run_case(
    name: str, stack: Stack, problem: Problem, lengths: list[int], with_graphs: bool
) -> dict[str, Any]:
    """Run a step of each length; returns the numbers of `COLUMNS`."""
    device = problem.case.device
    # every kernel is compiled and loaded, so that loading counts as no graph's memory
    for length in sorted(set(lengths)):
        train_step(stack, problem, length)
    with graphs_kept(with_graphs, device), counting() as counts:
        before = other_memory(device)
        half = len(lengths) // 2
        for length in lengths[:half]:
            train_step(stack, problem, length)
        synchronize(device)
        replays, launches = counts.replays, counts.launches
        host = []
        start = time.perf_counter()
        for length in lengths[half:]:
            begin = time.perf_counter()
            train_step(stack, problem, length)
            host.append(time.perf_counter() - begin)
        synchronize(device)
        seconds = time.perf_counter() - start
        calls = 2 * len(stack.layers) * len(lengths[half:])
        replays = counts.replays - replays
        launches = counts.launches - launches
        estimated = 0
        if device.type == "cuda":
            estimated = graphs.kept(problem.x.device).size
        memory = other_memory(device) - before
    row = {
        "case": name,
        "graph": (replays - launches) / calls,
        "launches": launches / calls,
        "python": 1 - replays / calls,
        "ms": 1e3 * seconds / len(lengths[half:]),
        "host_ms": 1e3 * statistics.median(host),
        "captures": len(counts.captures),
    }
    if counts.captures:
        row["capture_ms"] = 1e3 * statistics.median(counts.captures)
        row["graphs_mib"] = memory / MIB
        row["estimated_mib"] = estimated / MIB
    return row


# ---- the memory of a graph ---------------------------------------------------------------------


def measure_graphs(device: torch.device) -> list[dict[str, float]]:
    """Device memory and times of graphs of few and many small kernels.

    Returns: for each number of kernels, "kernels", "KiB" of a graph, and "capture us" and "replay
        us" of the host.
    """
    x = torch.zeros(8, device=device)
    found = []
    for kernels in NODES:
        before = other_memory(device)
        made = []
        start = time.perf_counter()
        for _ in range(GRAPHS):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(torch.cuda.Stream(device)):
                graph.capture_begin(capture_error_mode="thread_local")
                for _ in range(kernels):
                    x.add_(1)
                graph.capture_end()
            made.append(graph)
        captured = time.perf_counter()
        for graph in made:
            graph.replay()
        replayed = time.perf_counter()
        found.append(
            {
                "kernels": kernels,
                "KiB": (other_memory(device) - before) / GRAPHS / 1024,
                "capture us": 1e6 * (captured - start) / GRAPHS,
                "replay us": 1e6 * (replayed - captured) / GRAPHS,
            }
        )
        del made
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark."""
    _, args = parse(Arguments, __doc__, argv, tiny_defaults)
    device = torch.device(args.device)
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.bfloat16
    case = Case("stack", *shape_of(args.shape), args.longest, 16, dtype, 0.0, device)
    problem = Problem(case)
    stack = Stack(problem, args.layers)
    draw = random.Random(0)
    lengths = sorted(draw.sample(range(args.longest // 16 + 1, args.longest + 1), args.lengths))
    many = draw.choices(lengths, k=args.steps)
    # few steps show what one length does
    one = [args.longest // 2] * max(args.steps // 4, 4)
    rows = []
    for name, chosen in ((f"{args.lengths} lengths", many), ("one length", one)):
        for word in ("with", "without"):
            label = f"{name}, {word} graphs"
            print(f"{label} ...", file=sys.stderr, flush=True)
            rows.append(run_case(label, stack, problem, chosen, word == "with"))
    single: list[dict[str, float]] = []
    if device.type == "cuda":
        single = measure_graphs(device)
    machine = describe_machine(device)
    print(machine_line(machine))
    print(f"{args.layers} layers of {args.shape}, r = 16, lengths {lengths[0]} to {lengths[-1]}")
    print(format_table(rows, COLUMNS))
    if single:
        print(format_table(single, {key: Column(key, "{:.1f}") for key in single[0]}))
    write_json(args.json, {"machine": machine, "rows": rows, "graphs": single})
    return 0


if __name__ == "__main__":
    sys.exit(main())
