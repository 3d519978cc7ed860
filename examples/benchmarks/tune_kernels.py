"""Time the operations and their whole forward and backward on one GPU, with the table's rows or with others.

    python examples/benchmarks/tune_kernels.py --shapes qwen3-30b olmoe
    python examples/benchmarks/tune_kernels.py --op shrink --calls "shrink x" --vary '{"BLOCK_M": [64, 128]}' --write

Without --op every operation is checked against its twin and timed. With it, the settings of one are varied; --write
puts the best into the table of `peft_moe_lora/ops/kernels/launching/table.py`, with the machine and the date.
"""

import argparse
import ast
import itertools
import json
import math
import statistics
from datetime import date
from pathlib import Path

import torch

from peft_moe_lora.ops import Activation, RankRows, composed, kernels, reference
from peft_moe_lora.ops.kernels.launching import launch, replay, table
from peft_moe_lora.ops.kernels.tiles import tile

# E, H, I, top_k
SHAPES = {
    "qwen3-30b": (128, 2048, 768, 8),
    "qwen3.5-35b": (256, 2048, 512, 8),
    "olmoe": (64, 2048, 1024, 8),
    "gpt-oss": (32, 2880, 2880, 4),
    "dsv3-slice": (64, 7168, 2048, 8),
    "mixtral": (8, 4096, 14336, 2),
}


def milliseconds(call, repeats=15, calls=4):
    """Median device time of one call: several in one CUDA graph, so that the host is not what is timed."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return eager_milliseconds(graph.replay, repeats) / calls


def eager_milliseconds(call, repeats=15):
    """Median time of one call as a program makes it, by events, after a warm-up."""
    for _ in range(3):
        call()
    pairs = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in pairs)


def ceilings():
    """(FLOP per ms, bytes per ms) of this machine: an 8192^3 bf16 product, a copy of 2 GiB."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**30, device="cuda", dtype=torch.bfloat16).normal_()
    target = torch.empty_like(source)
    return 2 * 8192**3 / eager_milliseconds(lambda: a @ b), 2 * 2**31 / eager_milliseconds(
        lambda: target.copy_(source)
    )


def roofline(T, E, H, I, top_k, r, flops, bandwidth):  # noqa: E741
    """Compulsory ms of forward and backward; the formula of the benchmark."""
    M = T * top_k
    W = 2 * min(E, M) * 3 * I * H
    base, rank = 2 * M * 3 * I * H, 2 * M * r * (2 * H + 3 * I)
    forward = max((base + rank) / flops, (W + 4 * T * H + 8 * M * I) / bandwidth)
    backward = max((base + 2 * rank) / flops, (W + 8 * T * H + 12 * M * I) / bandwidth)
    return forward + backward


class Layer:
    """The tensors of one experts layer, and the calls of its forward and backward by name."""

    def __init__(self, T, E, H, I, top_k, r, skew=0.0, dtype=torch.bfloat16):  # noqa: E741
        torch.manual_seed(0)
        self.activation = Activation()

        def normal(*size, scale=1.0, dtype=dtype):
            return torch.empty(*size, device="cuda", dtype=dtype).normal_(std=scale)

        def lora(n, k):
            A = normal(r * E, k, scale=k**-0.5, dtype=torch.float32)
            B = normal(n, r * E, scale=r**-0.5, dtype=torch.float32)
            return A.view(E, r, k), B.view(n, E, r).permute(1, 0, 2)

        self.x, self.dout = normal(T, H), normal(T, H)
        self.index = torch.rand(T, E, device="cuda").topk(top_k).indices
        self.index[: int(T * skew), 0] = 0
        self.weights = torch.rand(T, top_k, device="cuda").softmax(-1)
        self.up, self.down = normal(E, 2 * I, H, scale=H**-0.5), normal(E, H, I, scale=I**-0.5)
        (self.up_A, self.up_B), (self.down_A, self.down_B) = lora(2 * I, H), lora(H, I)
        self.grads = [
            torch.empty(E, r, H, device="cuda"),
            torch.empty(2 * I, E, r, device="cuda").permute(1, 0, 2),
            torch.empty(E, r, I, device="cuda"),
            torch.empty(H, E, r, device="cuda").permute(1, 0, 2),
        ]
        self.E = E

    def run(self, ops, call=lambda name, function: function()):
        """Every operation in order; `call` gets its name and the function that runs it."""
        s = self
        R = call("route", lambda: ops.route(s.index, s.E))
        xa = call("shrink x", lambda: ops.expert_shrink(s.x, s.up_A, R, 2.0, gather=True))
        pre, act = call(
            "gate_up",
            lambda: ops.expert_linear_act(
                s.x, s.up, R, s.activation, xa=xa, lora_B=s.up_B, gather=True
            ),
        )
        ha = call("shrink act", lambda: ops.expert_shrink(act, s.down_A, R, 2.0))
        y = call("down", lambda: ops.expert_linear(act, s.down, R, xa=ha, lora_B=s.down_B))
        act = None
        out = call("combine", lambda: ops.combine(y, R, s.weights))
        w, (dA1, dB1, dA2, dB2) = s.weights, s.grads
        down_BT = s.down_B.transpose(1, 2)
        yb2 = call(
            "shrink, outer dout",
            lambda: composed.expert_shrink_outer(
                ops, s.dout, down_BT, ha, R, 2.0, dB2, row_weights=w, gather=True
            ),
        )
        draw = call(
            "d act",
            lambda: ops.expert_linear(
                s.dout,
                s.down.transpose(1, 2),
                R,
                xa=yb2,
                lora_B=s.down_A.transpose(1, 2),
                gather=True,
            ),
        )
        rank_rows = RankRows(yb2, dA2, xa, s.up_B, 2.0, dB1)
        dpre, yb1, dw = call(
            "act backward, outer act, shrink, outer dpre",
            lambda: composed.expert_act_backward_outer(
                ops, draw, pre, R, s.activation, s.weights, rank_rows
            ),
        )
        call("dA1", lambda: ops.expert_outer(yb1, s.x, R, dA1, gather_right=True))
        rows = call(
            "dX",
            lambda: ops.expert_linear(
                dpre, s.up.transpose(1, 2), R, xa=yb1, lora_B=s.up_A.transpose(1, 2)
            ),
        )
        dx = call("combine dX", lambda: ops.combine(rows, R))
        return out, dx, dw, *s.grads


GEMMS = ("gate_up", "down", "d act", "dX")


def check(layer):
    """The largest relative error of any output against the twins."""
    actual = [t.clone() for t in layer.run(kernels)]
    return max(
        (
            torch.linalg.vector_norm(a.float() - t.float()) / torch.linalg.vector_norm(t.float())
        ).item()
        for a, t in zip(actual, layer.run(reference), strict=True)
    )


def report(name, T, r, flops, bandwidth, skew=0.0, checked=True):
    """Print each operation in us, and the layer in ms and times the roof, eager and from a CUDA graph."""
    E, H, I, top_k = SHAPES[name]  # noqa: E741
    layer = Layer(T, E, H, I, top_k, r, skew)
    error = check(layer) if checked else float("nan")
    if error > 0.03:
        print(f"{name} T={T} r={r}: WRONG, error {error:.4f}")
        return
    times = {}

    def timed(op, function):
        times[op] = milliseconds(function)
        return function()

    total = eager_milliseconds(lambda: layer.run(kernels))
    captured = milliseconds(lambda: layer.run(kernels), calls=1)
    layer.run(kernels, timed)
    roof = roofline(T, E, H, I, top_k, r, flops, bandwidth)
    M = T * top_k
    work = {
        "gate_up": 4 * M * I * H,
        "down": 2 * M * I * H,
        "d act": 2 * M * I * H,
        "dX": 4 * M * I * H,
    }
    print(
        f"{name} T={T} r={r} skew={skew}: step {total:.3f} ms, graph {captured:.3f} ms, roof {roof:.3f} ms, "
        f"{total / roof:.2f} x, graph {captured / roof:.2f} x; GEMMs {sum(times[g] for g in GEMMS):.3f} ms, "
        f"error {error:.4f}, {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB"
    )
    print("   " + ", ".join(f"{op} {1000 * ms:.0f}" for op, ms in times.items()) + " us")
    print(
        "   " + ", ".join(f"{g} {work[g] / times[g] / 1e9:.0f}" for g in GEMMS) + " TFLOP/s",
        flush=True,
    )
    torch.cuda.reset_peak_memory_stats()


def forget():
    """Drop what was chosen and compiled by the table as it was."""
    for chosen in (table.lookup, tile._blocks):
        chosen.cache_clear()
    launch.forget()
    replay.forget()


def variants(vary):
    """Every combination of {"BLOCK_N": [..], ..} as a dict."""
    return [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]


def current_row(op, x, M, E):
    """The table's row for `op` on this device, at the tiles that M rows of E experts get."""
    arch, _ = table.device_facts(x.device)
    blocks = table.find(op, arch, x.element_size(), table.block_m_for(M, E, arch))
    return next(row for row in table.TABLE if row.blocks is blocks)


def sweep(name, T, r, op, calls, settings):
    """Print the time of the named calls under each of the settings of `op`, best first.

    Returns: the row that was varied, and the us of all calls together by setting, in the order of `settings`.
    Raises:
        LookupError: where the layer does not run by that row, and its settings change nothing.
    """
    E, H, I, top_k = SHAPES[name]  # noqa: E741
    layer = Layer(T, E, H, I, top_k, r)
    row = current_row(op, layer.x, T * top_k, E)
    kept, results = dict(row.blocks), []
    for setting in settings:
        row.blocks.update(setting)
        forget()
        times = {}

        def timed(op, function, times=times):
            if op in calls:
                times[op] = milliseconds(function, 10)
            return function()

        try:
            layer.run(kernels, timed)
        except Exception as error:
            times = {call: float("inf") for call in calls}
            setting = {**setting, "error": str(error)[:60]}
        results.append((times, setting))
        ran = {key[0] for key, _ in launch._plans}
        row.blocks.clear()
        row.blocks.update(kept)
        if (
            "error" not in setting
            and op.removesuffix("_gathered").removesuffix("_short") not in ran
        ):
            raise LookupError(
                f"{op} does not run at {name}, {T} tokens: of the table's operations {sorted(ran)} do."
            )
    forget()
    for call in calls:
        print(f"{name} T={T} r={r} {call}:")
        for times, setting in sorted(results, key=lambda result: result[0][call])[:6]:
            print(f"   {1000 * times[call]:.0f} us  {setting}")
    print(end="", flush=True)
    return row, [1000 * sum(times.values()) for times, _ in results]


def write_row(path, row, blocks, source):
    """Replace a row's blocks and source in the table of the file at `path`.

    Raises:
        LookupError: if the table has no such row.
    """
    text = path.read_text()
    (table,) = (
        node.value
        for node in ast.parse(text).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "TABLE"
    )
    wanted = row.op, row.arch, row.itemsize, row.block_m
    for call in table.elts:
        if tuple(getattr(argument, "value", None) for argument in call.args[:4]) == wanted:
            break
    else:
        raise LookupError(f"{path} has no row {wanted}.")
    rest = {
        name: value for name, value in blocks.items() if name not in ("num_warps", "num_stages")
    }
    words = [*map(repr, (*wanted, source, blocks["num_warps"], blocks["num_stages"]))]
    words += [f"{name}={value!r}" for name, value in rest.items()]
    call_text = f"    _row({', '.join(words)}),".replace("'", '"')
    lines = text.splitlines()
    lines[call.lineno - 1 : call.end_lineno] = [call_text]
    path.write_text("\n".join(lines) + "\n")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="*", type=int, default=[8192])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--skew", type=float, default=0.0, help="share of the tokens whose first expert is expert 0"
    )
    parser.add_argument(
        "--op", help="vary the settings of one operation: linear, linear_act, shrink, outer, ..."
    )
    parser.add_argument(
        "--calls", nargs="*", help="the calls to time then, by their names in the report"
    )
    parser.add_argument(
        "--vary", type=json.loads, default={}, help="JSON: constexpr to list of values"
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="put the setting of the least time, over all, in the table",
    )
    parser.add_argument(
        "--no-check", action="store_true", help="skip the comparison with the twins"
    )
    args = parser.parse_args()
    flops, bandwidth = ceilings()
    print(
        f"{torch.cuda.get_device_name()}: {flops / 1e9:.0f} TFLOP/s bf16, {bandwidth / 1e9:.2f} TB/s"
    )
    settings, totals = variants(args.vary), {}
    for name, T in itertools.product(args.shapes, args.tokens):
        if args.op:
            row, times = sweep(name, T, args.rank, args.op, args.calls, settings)
            before = totals.get(row.block_m, (row, [0.0] * len(settings)))[1]
            totals[row.block_m] = row, [sum(pair) for pair in zip(before, times, strict=True)]
        else:
            report(name, T, args.rank, flops, bandwidth, args.skew, not args.no_check)
    for row, times in totals.values():
        best = min(range(len(settings)), key=times.__getitem__)
        print(
            f"{row.op}, tiles of {row.block_m} rows: {settings[best]} {times[best]:.0f} us over all"
        )
        if args.write and math.isfinite(times[best]):
            source = f"{torch.cuda.get_device_name()}, {date.today()}"
            write_row(Path(table.__file__), row, {**row.blocks, **settings[best]}, source)


if __name__ == "__main__":
    main()
