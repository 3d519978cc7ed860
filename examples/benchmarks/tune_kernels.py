"""Time the operations on one GPU, and the layer that they make; tune the settings of one of them.

    python examples/benchmarks/tune_kernels.py --shapes qwen3-30b olmoe
    python examples/benchmarks/tune_kernels.py --op shrink --calls "shrink x" \\
        --vary '{"BLOCK_M": [64, 128]}' --write

Without --op, every operation is checked against its twin and timed with the settings of the table
in `peft_moe_lora/ops/kernels/launching/table.py`. With --op, the settings of one operation are
varied; --write puts the best into that table, with the machine and the date.
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch
from triton.errors import TritonError
from triton.testing import do_bench, do_bench_cudagraph

from cases import GPU_SHAPES, MIB, SHAPES, Case, Problem, shape_of
from checking import relative_error
from options import parse
from peft_moe_lora.ops import (
    Activation,
    Operations,
    RankRows,
    Routing,
    composed,
    kernels,
    reference,
)
from peft_moe_lora.ops.kernels.launching import table
from peft_moe_lora.ops.kernels.launching.table import Row
from report import Column, format_table
from roofline import Ceilings, Probe, measure_ceilings, roof
from table_rows import current_row, forget, launched, write_row
from timing import Timer

# |kernels' - twins'| / |twins'|: both round to bf16 after every operation, in other places
BOUND = 0.03
# what a setting that does not fit the kernel or the machine raises
SETTING_ERRORS = (TritonError, RuntimeError, ValueError)

Settings = dict[str, Any]
Result = TypeVar("Result")
Call = Callable[[str, Callable[[], Any]], Any]


def run_call(name: str, function: Callable[[], Result]) -> Result:
    """Run an operation and do nothing else."""
    return function()


def device_ms(function: Callable[[], object]) -> float:
    """Median device time of one call, of many in one CUDA graph: the host takes no part in it."""
    # it runs on a stream of its own, which waits for no other
    torch.cuda.synchronize()
    return do_bench_cudagraph(function, return_mode="median")


class TimedCalls:
    """Passed to `Layer.run`: the device time of every operation, or of those named.

    Attributes:
        ms: the times by the operation's name.
    """

    def __init__(self, names: list[str] | None = None) -> None:
        self.names = names
        self.ms: dict[str, float] = {}

    def __call__(self, name: str, function: Callable[[], Result]) -> Result:
        if self.names is None or name in self.names:
            self.ms[name] = device_ms(function)
        return function()


# ---- the layer ---------------------------------------------------------------------------------


class Layer:
    """The tensors of one experts layer, and the calls of its forward and backward by name."""

    def __init__(self, case: Case) -> None:
        problem = Problem(case)
        E, r = case.E, case.r
        self.E = E
        self.scaling = problem.scaling
        self.activation = Activation()
        self.x = problem.x.detach()
        self.dout = problem.dout
        self.index = problem.top_k_index
        self.row_weights = problem.top_k_weights.detach()
        self.up = problem.weights["gate_up"]
        self.down = problem.weights["down"]

        def by_expert(name: str) -> torch.Tensor:
            parameter = problem.adapter[name]
            if "lora_A" in name:
                return parameter.unflatten(0, (E, r))  # [E, r, K]
            return parameter.unflatten(1, (E, r)).transpose(0, 1)  # [E, N, r]

        self.up_A = by_expert("lora_A.gate_up")
        self.up_B = by_expert("lora_B.gate_up")
        self.down_A = by_expert("lora_A.down")
        self.down_B = by_expert("lora_B.down")
        self.d_up_A = torch.empty_like(self.up_A)
        self.d_up_B = torch.empty_like(self.up_B)
        self.d_down_A = torch.empty_like(self.down_A)
        self.d_down_B = torch.empty_like(self.down_B)

    def run(self, ops: Operations, call: Call = run_call) -> list[torch.Tensor]:
        """Every operation in order.

        Args:
            ops: the kernels or the twins.
            call: is given each operation's name and the function that runs it, and returns the
                function's result.
        Returns: the output, and the gradients of x, of the routing weights, and of A and B.
        """
        R = call("route", lambda: ops.route(self.index, self.E))
        out, xa, pre, ha = self._forward(ops, call, R)
        dx, d_row_weights = self._backward(ops, call, R, xa, pre, ha)
        gradients = [self.d_up_A, self.d_up_B, self.d_down_A, self.d_down_B]
        return [out, dx, d_row_weights, *gradients]

    def _forward(self, ops: Operations, call: Call, R: Routing) -> tuple[torch.Tensor, ...]:
        """The output, and what is kept for backward: x A^T, the pre-activation, act A^T."""
        s = self
        xa = call("shrink x", lambda: ops.expert_shrink(s.x, s.up_A, R, s.scaling, gather=True))
        pre, act = call(
            "gate_up",
            lambda: ops.expert_linear_act(
                s.x, s.up, R, s.activation, xa=xa, lora_B=s.up_B, gather=True
            ),
        )
        ha = call("shrink act", lambda: ops.expert_shrink(act, s.down_A, R, s.scaling))
        y = call("down", lambda: ops.expert_linear(act, s.down, R, xa=ha, lora_B=s.down_B))
        out = call("combine", lambda: ops.combine(y, R, s.row_weights))
        return out, xa, pre, ha

    def _backward(
        self, ops: Operations, call: Call, R: Routing, xa: torch.Tensor, pre: torch.Tensor,
        ha: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """The gradients of x and of the routing weights; those of A and B go into their buffers."""
        s = self
        down_BT = s.down_B.transpose(1, 2)
        down_AT = s.down_A.transpose(1, 2)
        down_T = s.down.transpose(1, 2)
        up_AT = s.up_A.transpose(1, 2)
        up_T = s.up.transpose(1, 2)
        yb2 = call(
            "shrink, outer dout",
            lambda: composed.expert_shrink_outer(
                ops, s.dout, down_BT, ha, R, s.scaling, s.d_down_B, row_weights=s.row_weights,
                gather=True,
            ),
        )  # fmt: skip
        draw = call(
            "d act",
            lambda: ops.expert_linear(s.dout, down_T, R, xa=yb2, lora_B=down_AT, gather=True),
        )
        rank_rows = RankRows(yb2, s.d_down_A, xa, s.up_B, s.scaling, s.d_up_B)
        dpre, yb1, d_row_weights = call(
            "act backward, outer act, shrink, outer dpre",
            lambda: composed.expert_act_backward_outer(
                ops, draw, pre, R, s.activation, s.row_weights, rank_rows
            ),
        )
        call("dA1", lambda: ops.expert_outer(yb1, s.x, R, s.d_up_A, gather_right=True))
        rows = call("dX", lambda: ops.expert_linear(dpre, up_T, R, xa=yb1, lora_B=up_AT))
        dx = call("combine dX", lambda: ops.combine(rows, R))
        return dx, d_row_weights


def worst_error(layer: Layer) -> float:
    """The largest relative error of any output against the twins'."""
    actual = [tensor.clone() for tensor in layer.run(kernels)]
    expected = layer.run(reference)
    return max(relative_error(a, ref.float()) for a, ref in zip(actual, expected, strict=True))


# ---- every operation ---------------------------------------------------------------------------

OP_COLUMNS = {
    "op": Column("operation", is_label=True),
    "us": Column("us", "{:.0f}"),
    "tflops": Column("TFLOP/s", "{:.0f}"),
}


def print_times(case: Case, ceilings: Ceilings, checked: bool) -> None:
    """Print the layer's time, eager and from a CUDA graph, and each operation's."""
    torch.cuda.reset_peak_memory_stats()
    layer = Layer(case)
    error = math.nan
    if checked:
        error = worst_error(layer)
        if not error <= BOUND:
            print(f"{case.label}: WRONG, error {error:.4f}")
            return
    eager = do_bench(lambda: layer.run(kernels), return_mode="median")
    graph = device_ms(lambda: layer.run(kernels))
    timed = TimedCalls()
    layer.run(kernels, timed)
    # GFLOP of the base's products; GFLOP / ms is TFLOP/s
    half = 2e-9 * case.T * case.top_k * case.I * case.H
    work = {"gate_up": 2 * half, "down": half, "d act": half, "dX": 2 * half}
    products = sum(timed.ms[name] for name in work)
    least = roof(case, ceilings)
    peak = torch.cuda.max_memory_allocated() / MIB
    print(
        f"{case.label}: step {eager:.3f} ms, graph {graph:.3f} ms, roof {least:.3f} ms, "
        f"{eager / least:.2f} x, graph {graph / least:.2f} x; base products {products:.3f} ms, "
        f"error {error:.4f}, {peak:.0f} MiB"
    )
    rows = []
    for name, ms in timed.ms.items():
        row = {"op": name, "us": 1000 * ms}
        if name in work:
            row["tflops"] = work[name] / ms
        rows.append(row)
    print(format_table(rows, OP_COLUMNS), flush=True)


# ---- one operation's settings ------------------------------------------------------------------


def variants(vary: dict[str, list]) -> list[Settings]:
    """Every combination of {"BLOCK_N": [..], ..} as a dict."""
    return [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]


def sweep(
    case: Case, op: str, calls: list[str], settings: list[Settings]
) -> tuple[Row, list[float]]:
    """Print the time of the named calls under each of the settings of `op`, best first.

    Returns: the row that was varied; for each of `settings`, the us of all calls together.
    Raises:
        LookupError: if the layer does not run by that row, so that its settings change nothing.
    """
    layer = Layer(case)
    row = current_row(op, layer.x, case.T * case.top_k, case.E)
    kept = dict(row.blocks)
    results = []
    for setting in settings:
        row.blocks.update(setting)
        forget()
        timed = TimedCalls(calls)
        note = ""
        try:
            layer.run(kernels, timed)
        except SETTING_ERRORS as error:
            timed.ms = dict.fromkeys(calls, math.inf)
            note = str(error)[:60]
        finally:
            row.blocks.clear()
            row.blocks.update(kept)
        ran = launched()
        if not note and op.removesuffix("_gathered").removesuffix("_short") not in ran:
            raise LookupError(
                f"{op} does not run at {case.label}: of the table's operations {sorted(ran)} do."
            )
        results.append((timed.ms, setting, note))
    forget()
    for call in calls:
        print(f"{case.label} {call}:")
        for ms, setting, note in sorted(results, key=lambda result: result[0][call])[:6]:
            print(f"   {1000 * ms[call]:.0f} us  {setting} {note}".rstrip(), flush=True)
    return row, [1000 * sum(ms.values()) for ms, _, _ in results]


def tune(cases: list[Case], args: "Arguments") -> None:
    """Sweep over every case; print the best setting of each row, and write it with --write."""
    settings = variants(json.loads(args.vary))
    rows: dict[int, Row] = {}
    totals: dict[int, list[float]] = {}
    for case in cases:
        row, times = sweep(case, args.op, args.calls, settings)
        before = totals.get(row.block_m, [0.0] * len(settings))
        rows[row.block_m] = row
        totals[row.block_m] = [a + b for a, b in zip(before, times, strict=True)]
    for block_m, times in totals.items():
        row = rows[block_m]
        best = min(range(len(settings)), key=times.__getitem__)
        found = f"{settings[best]} {times[best]:.0f} us over all"
        print(f"{row.op}, tiles of {block_m} rows: {found}")
        if args.write and math.isfinite(times[best]):
            source = f"{torch.cuda.get_device_name()}, {date.today()}"
            write_row(Path(table.__file__), row, {**row.blocks, **settings[best]}, source)


# ---- the command line --------------------------------------------------------------------------


@dataclass
class Arguments:
    """The command line."""

    shapes: list[str] = field(
        default_factory=lambda: list(GPU_SHAPES),
        metadata={"metavar": "SHAPE", "help": f"E,H,I,top_k or of: {', '.join(SHAPES)}"},
    )
    tokens: list[int] = field(default_factory=lambda: [8192], metadata={"metavar": "T"})
    rank: int = 16
    skew: float = field(default=0.0, metadata={"help": "share of the rows on one expert"})
    op: str | None = field(
        default=None,
        metadata={"help": "vary one operation's settings: linear, linear_act, shrink, outer, ..."},
    )
    calls: list[str] | None = field(
        default=None, metadata={"help": "the calls to time then, by their names in the table"}
    )
    vary: str = field(default="{}", metadata={"help": "JSON: constexpr to list of values"})
    write: bool = field(
        default=False, metadata={"help": "put the setting of the least time over all in the table"}
    )
    no_check: bool = field(default=False, metadata={"help": "do not compare with the twins"})


def main(argv: list[str] | None = None) -> None:
    """Time every operation, or tune one."""
    parser, args = parse(Arguments, __doc__, argv)
    if args.op and not args.calls:
        parser.error("--op needs --calls, the calls to time")
    device = torch.device("cuda")
    dtype = torch.bfloat16
    try:
        cases = [
            Case(name, *shape_of(name), T, args.rank, dtype, args.skew, device)
            for name, T in itertools.product(args.shapes, args.tokens)
        ]
    except ValueError as error:
        parser.error(f"--shapes: {error}")
    if args.op:
        tune(cases, args)
        return
    ceilings = measure_ceilings(Timer(device), Probe(device, dtype))
    flops = f"{ceilings.flops / 1e12:.0f} TFLOP/s bf16"
    print(f"{torch.cuda.get_device_name()}: {flops}, {ceilings.bandwidth / 1e12:.2f} TB/s")
    for case in cases:
        print_times(case, ceilings, not args.no_check)


if __name__ == "__main__":
    main()
