"""Time one experts layer with LoRA, forward and backward, beside its peers and the roofline of the machine.

    python examples/benchmarks/layer.py                                the goals on a GPU, small shapes on a CPU
    python examples/benchmarks/layer.py --json speed.json --plot speed.png keep the numbers, draw them
    python examples/benchmarks/layer.py --shapes qwen3-30b 64,4096,1024,6 --tokens 2048 8192 --rank 16 64 --skew

Routes, all in one run on one machine, on the same inputs, frozen base weights and fp32 adapters:
    moe_lora              `get_peft_model(model, MoELoraConfig(...))` on transformers' experts, wrapper and all
    moe_lora-recompute    the same with recompute=True
    moe_lora-torch        the same with backend="torch"
    moe_lora-materialize  the same with backend="materialize": transformers' grouped_mm on W + scaling * B A
    peft                  PEFT's `LoraConfig(target_parameters=...)` on the same experts, grouped_mm
    torch                 plain PyTorch: sort, gather, grouped_mm for the base and for both rank-r products
    base                  transformers' grouped_mm experts without an adapter: what the adapter is added to

Output and every gradient of a route are compared with a reference in higher precision first: a route that fails has
its name in the table and no number. Every timed step starts with the L2 cache flushed and with new versions of A and
B, as after an optimizer step, so that what a route prepares once per version is part of its time.
"""

import argparse
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

# E, H, I, top_k; the last two are for a CPU: many small experts, few large ones
SHAPES = {
    "qwen3-30b": (128, 2048, 768, 8),
    "qwen3.5-35b": (256, 2048, 512, 8),
    "olmoe": (64, 2048, 1024, 8),
    "gptoss-shape": (32, 2880, 2880, 4),
    "dsv3-slice": (64, 7168, 2048, 8),
    "mixtral": (8, 4096, 14336, 2),
    "many-small": (32, 512, 256, 4),
    "few-large": (8, 1024, 1024, 2),
}
GPU_CASES = [
    *(
        (name, 8192)
        for name in ("qwen3-30b", "qwen3.5-35b", "olmoe", "gptoss-shape", "dsv3-slice", "mixtral")
    ),
    ("qwen3-30b", 2048),
    ("qwen3-30b", 32768),
]
CPU_CASES = [("many-small", 256), ("few-large", 256)]
# what moe_lora is held to on an H200 in bf16 at r = 16: forward + backward over the roofline, and MiB kept
GOALS = {
    ("qwen3-30b", 8192): (1.5, 205),
    ("qwen3-30b", 2048): (1.7, 52),
    ("qwen3-30b", 32768): (1.35, 815),
    ("qwen3.5-35b", 8192): (1.6, 140),
    ("olmoe", 8192): (1.4, 270),
    ("gptoss-shape", 8192): (1.3, 375),
    ("dsv3-slice", 8192): (1.18, 525),
    ("mixtral", 8192): (1.12, 910),
}
# and on a CPU: step over that of the base and the rank-r products alone
CPU_GOAL = 1.3

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# |a - ref| / |ref|: 8 and 11 bits of mantissa through two products and an activation; fp32 tells IEEE from tf32
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
PROJECTIONS = ("gate_up", "down")
MIB = 2**20

WHAT = (
    "one MoE experts layer (SwiGLU, base frozen), LoRA on gate_up and down, adapters fp32. Times in ms, medians: "
    "fwd = forward with gradients enabled, step = forward + backward, host = time in which the host issues a step "
    "(GPU only). roof = the roofline in ms, x_roof = step / roof, at the row's ceilings: on a GPU, those measured in "
    "turn with the routes, since a card at its power limit slows all of them; x_roof_idle = the same at the ceilings "
    "measured before the first case, when the card was idle. rest = seconds in which the card was left idle ahead of "
    "every turn, the ceilings' too. In MiB: held = memory after forward above that "
    "before, kept = held without the output, peak = highest during a step above its start. first = seconds of the "
    "first step at this shape, first_in_process whether it is the route's first at all. errors = |a - ref| / |ref| "
    "against a reference in fp32 (fp64 for float32), err and edx those of the output and of its gradient for the "
    "input. spread = (largest - smallest) / median over the rounds of the step's median. skew = share of rows on one "
    "expert, 0 for uniform routing. share = step of the rank-r products alone, x_base = step / (base + share). "
    "goal_x_roof, goal_kept: what moe_lora is held to on an H200; goal_x_base: on a CPU. failed = why a route has no "
    "numbers."
)
ROOFLINE = (
    "M = T*top_k, s = bytes per element, W = s*min(E, M)*3*I*H bytes. forward = max(FLOPs/peak, bytes/bandwidth) "
    "with FLOPs 2M*3IH + 2Mr(2H + 3I), bytes W + 2s*TH + 4s*MI; backward with FLOPs 2M*3IH + 4Mr(2H + 3I), bytes "
    "W + 4s*TH + 6s*MI; peak and bandwidth measured in the same run by a matrix product on random data and a copy "
    "counting bytes read and written, an 8192^3 product and 2 GiB on a GPU; roof is their sum in ms"
)


@dataclass(frozen=True)
class Case:
    """One problem: sizes (E experts, H and I widths, T tokens, r rank), dtype, share of rows on one expert, device."""

    name: str
    E: int
    H: int
    I: int  # noqa: E741  # the intermediate size is I in every formula
    top_k: int
    T: int
    r: int
    dtype: torch.dtype
    skew: float
    device: torch.device

    @property
    def label(self) -> str:
        return f"{self.name} T={self.T} r={self.r}" + (f" skew={self.skew:g}" if self.skew else "")

    def roof(self, ceilings: "Ceilings") -> float:
        """ms that forward and backward cannot fall below: compulsory FLOPs and bytes at the machine's ceilings."""
        M, s = self.T * self.top_k, self.dtype.itemsize
        base = 2 * M * 3 * self.I * self.H
        lora = 2 * M * self.r * (2 * self.H + 3 * self.I)
        weights = s * min(self.E, M) * 3 * self.I * self.H
        forward = base + lora, weights + 2 * s * self.T * self.H + 4 * s * M * self.I
        backward = base + 2 * lora, weights + 4 * s * self.T * self.H + 6 * s * M * self.I
        return 1e3 * sum(
            max(f / ceilings.flops, b / ceilings.bandwidth) for f, b in (forward, backward)
        )

    def goals(self) -> tuple[float, float] | tuple[None, None]:
        """(x roofline, MiB kept) that moe_lora is held to, where this case has a goal."""
        comparable = self.r == 16 and self.dtype == torch.bfloat16 and not self.skew
        return GOALS.get((self.name, self.T), (None, None)) if comparable else (None, None)


@dataclass(frozen=True)
class Ceilings:
    """What the machine reaches: FLOP/s of a matrix product, bytes/s of a copy (read + written)."""

    flops: float
    bandwidth: float


class Problem:
    """Random inputs, base weights and adapter of a case, scaled so that the adapter moves the output as the base does.

    Attributes:
        x: [T, H] leaf; top_k_index: [T, top_k] int64; top_k_weights: [T, top_k] leaf, dtype of x; dout: [T, H].
        weights: {"gate_up": [E, 2I, H], "down": [E, H, I]}, frozen.
        adapter: {"lora_A.gate_up": [r*E, H], "lora_B.gate_up": [2I, r*E], ...} fp32, expert-major: rows of A and
            columns of B e*r up to (e + 1)*r are expert e.
        scaling: lora_alpha / r.
    """

    def __init__(self, case: Case, seed: int = 0):
        self.case, self.scaling = case, 2.0
        generator = torch.Generator(case.device).manual_seed(seed)
        like = {"generator": generator, "device": case.device}

        def normal(*shape, std=1.0, dtype=case.dtype):
            return torch.randn(*shape, dtype=dtype, **like).mul_(std)

        self.x, self.dout = normal(case.T, case.H).requires_grad_(), normal(case.T, case.H)
        self.top_k_index = torch.rand(case.T, case.E, **like).topk(case.top_k, dim=-1).indices
        hot = torch.rand(case.T, case.top_k, **like) < case.skew
        self.top_k_index[hot] = case.E // 2
        logits = torch.randn(case.T, case.top_k, **like)
        self.top_k_weights = logits.softmax(-1).to(case.dtype).requires_grad_()
        self.weights, self.adapter = {}, {}
        for name, N, K in (("gate_up", 2 * case.I, case.H), ("down", case.H, case.I)):
            self.weights[name] = normal(case.E, N, K, std=K**-0.5)
            self.adapter[f"lora_A.{name}"] = normal(
                case.r * case.E, K, std=K**-0.5, dtype=torch.float32
            )
            # half of what the base adds to a row, in each projection
            std = 0.5 * case.r**-0.5 / self.scaling
            self.adapter[f"lora_B.{name}"] = normal(
                N, case.r * case.E, std=std, dtype=torch.float32
            )

    def reference(self, scaling: float) -> dict[str, torch.Tensor]:
        """Output and gradients, one expert and at most 4096 rows at a time, in fp32 (fp64 for a float32 case)."""
        case = self.case
        dtype = torch.float64 if case.dtype == torch.float32 else torch.float32
        out, dx = (torch.zeros(case.T, case.H, device=case.device, dtype=dtype) for _ in range(2))
        d_weights = torch.zeros(case.T * case.top_k, device=case.device, dtype=dtype)
        d_adapter = {name: torch.zeros_like(p, dtype=dtype) for name, p in self.adapter.items()}
        slots = self.top_k_index.flatten().argsort(stable=True)
        counts = self.top_k_index.flatten().bincount(minlength=case.E).tolist()
        for e, expert_slots in enumerate(slots.split(counts)):
            columns = slice(e * case.r, (e + 1) * case.r)
            pairs = {
                n: p[columns] if "lora_A" in n else p[:, columns] for n, p in self.adapter.items()
            }
            pairs = {n: p.to(dtype).requires_grad_() for n, p in pairs.items()}
            base = {name: weight[e].to(dtype) for name, weight in self.weights.items()}
            for slot in expert_slots.split(4096):
                token = slot // case.top_k
                rows = self.x.detach()[token].to(dtype).requires_grad_()
                weight = self.top_k_weights.detach().flatten()[slot].to(dtype).requires_grad_()
                y = rows
                for name in PROJECTIONS:
                    update = y @ pairs[f"lora_A.{name}"].T @ pairs[f"lora_B.{name}"].T
                    y = y @ base[name].T + scaling * update
                    if name == "gate_up":
                        gate, up = y.chunk(2, dim=-1)
                        y = F.silu(gate) * up
                y = weight[:, None] * y
                d_rows, d_weight, *d_pairs = torch.autograd.grad(
                    y, [rows, weight, *pairs.values()], self.dout[token].to(dtype)
                )
                out.index_add_(0, token, y.detach())
                dx.index_add_(0, token, d_rows)
                d_weights[slot] = d_weight
                for name, gradient in zip(pairs, d_pairs, strict=True):
                    full = d_adapter[name]
                    (full[columns] if "lora_A" in name else full[:, columns]).add_(gradient)
        result = {"out": out, "d x": dx, "d top_k_weights": d_weights.view(case.T, case.top_k)}
        return result | {f"d {name}": gradient for name, gradient in d_adapter.items()}


# ---- the routes ----------------------------------------------------------------------------------------------------


@dataclass
class Route:
    """One way to compute the layer.

    Attributes:
        forward: (x, top_k_index, top_k_weights) -> [T, H].
        adapter: its trainable parameters under the names of `Problem.adapter`; empty for a route without adapter.
        rank_major: whether column j*E + e of its B is rank j of expert e, as in PEFT's ParamWrapper.
    """

    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)
    rank_major: bool = False


class Block(nn.Module):
    """The smallest model that holds an experts module."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.experts, self.config = experts, experts.config

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return self.experts(hidden_states, top_k_index, top_k_weights)


def transformers_block(problem: Problem) -> Block:
    """transformers' Qwen3-MoE experts of the case's sizes on the problem's own weights, frozen, grouped_mm."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    case = problem.case
    config = Qwen3MoeConfig(
        num_experts=case.E,
        hidden_size=case.H,
        moe_intermediate_size=case.I,
        num_experts_per_tok=case.top_k,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    for name, weight in problem.weights.items():
        setattr(experts, f"{name}_proj", nn.Parameter(weight, requires_grad=False))
    return Block(experts)


def base(problem: Problem) -> Route:
    """transformers' experts without an adapter."""
    return Route(transformers_block(problem))


def moe_lora(problem: Problem, **settings) -> Route:
    """peft_moe_lora as a user gets it; `settings` are further fields of its configuration."""
    from peft import get_peft_model

    from peft_moe_lora import MoELoraConfig

    r = problem.case.r
    config = MoELoraConfig(
        r=r, lora_alpha=problem.scaling * r, target_modules=["experts"], **settings
    )
    model = get_peft_model(transformers_block(problem), config)
    # <experts>.lora_A.<adapter>.<projection>
    found = {
        ".".join((n.split(".")[-3], n.split(".")[-1])): p
        for n, p in model.named_parameters()
        if ".lora_" in n
    }
    adapter = {name: found[name] for name in problem.adapter}
    with torch.no_grad():
        for name, parameter in adapter.items():
            parameter.copy_(problem.adapter[name])
    return Route(model.base_model.model, adapter)


def peft(problem: Problem) -> Route:
    """PEFT's own: a ParamWrapper for each of the two parameters."""
    from peft import LoraConfig, get_peft_model

    case = problem.case
    targets = [f"experts.{name}_proj" for name in PROJECTIONS]
    config = LoraConfig(
        r=case.r,
        lora_alpha=problem.scaling * case.r,
        target_modules=[],
        target_parameters=targets,
        lora_dropout=0.0,
    )
    model = get_peft_model(transformers_block(problem), config)
    adapter, wrapper = {}, model.base_model.model.experts
    while hasattr(wrapper, "parameter_name"):
        name = wrapper.parameter_name.removesuffix("_proj")
        adapter[f"lora_A.{name}"] = wrapper.lora_A["default"].weight
        adapter[f"lora_B.{name}"] = wrapper.lora_B["default"].weight
        wrapper = wrapper.base_layer
    with torch.no_grad():
        for name, parameter in adapter.items():
            value = problem.adapter[name]
            if "lora_B" in name:
                value = (
                    value.unflatten(1, (case.E, case.r)).transpose(1, 2).flatten(1)
                )  # [N, E, r] -> [N, r, E]
            parameter.copy_(value)
    return Route(model.base_model.model, adapter, rank_major=True)


def low_rank(
    rows: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """B[e] A[e] x[m] for rows [M, K] in expert order, expert e's rows ending at ends[e]: [M, N], unscaled."""
    E = len(ends)
    A = lora_A.to(rows.dtype).unflatten(0, (E, -1))  # [E, r, K]
    B = lora_B.to(rows.dtype).unflatten(1, (E, -1)).permute(1, 2, 0).contiguous()  # [E, r, N]
    return F.grouped_mm(F.grouped_mm(rows, A.transpose(1, 2), offs=ends), B, offs=ends)


def plain_torch(problem: Problem) -> Route:
    """What one writes by hand: the base product, the update beside it, every step an operation of its own."""
    case, weights = problem.case, problem.weights
    adapter = {name: p.clone().requires_grad_() for name, p in problem.adapter.items()}

    def linear(rows, name, ends):
        update = low_rank(rows, adapter[f"lora_A.{name}"], adapter[f"lora_B.{name}"], ends)
        return (
            F.grouped_mm(rows, weights[name].transpose(1, 2), offs=ends) + problem.scaling * update
        )

    def forward(x, top_k_index, top_k_weights):
        expert, order = top_k_index.flatten().sort()
        ends = torch.searchsorted(
            expert, torch.arange(case.E, device=x.device), right=True, out_int32=True
        )
        gate, up = linear(x[order // case.top_k], "gate_up", ends).chunk(2, dim=-1)
        y = linear(F.silu(gate) * up, "down", ends) * top_k_weights.flatten()[order, None]
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=x.device)
        return y[inverse].view(*top_k_index.shape, -1).sum(1)

    return Route(forward, adapter)


def moe_lora_torch(problem: Problem) -> Route:
    return moe_lora(problem, backend="torch")


def moe_lora_materialize(problem: Problem) -> Route:
    return moe_lora(problem, backend="materialize")


def moe_lora_recompute(problem: Problem) -> Route:
    return moe_lora(problem, recompute=True)


ROUTES: dict[str, Callable[[Problem], Route]] = {
    "moe_lora": moe_lora,
    "moe_lora-recompute": moe_lora_recompute,
    "moe_lora-torch": moe_lora_torch,
    "moe_lora-materialize": moe_lora_materialize,
    "peft": peft,
    "torch": plain_torch,
    "base": base,
}


# ---- checking and measuring ----------------------------------------------------------------------------------------


class CheckFailed(Exception):
    """A route's result is not the reference's."""


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def renew(problem: Problem, route: Route) -> None:
    """No gradients, and adapter parameters of a new version, as an optimizer step leaves them."""
    for tensor in (problem.x, problem.top_k_weights, *route.adapter.values()):
        tensor.grad = None
    for parameter in route.adapter.values():
        torch.autograd.graph.increment_version(parameter)


def forward(problem: Problem, route: Route) -> torch.Tensor:
    return route.forward(problem.x, problem.top_k_index, problem.top_k_weights)


def step(problem: Problem, route: Route) -> torch.Tensor:
    out = forward(problem, route)
    out.backward(problem.dout)
    return out


def first_step(problem: Problem, route: Route) -> tuple[float, dict[str, torch.Tensor]]:
    """Seconds of the step, and its output and gradients, those of the adapter in expert-major order."""
    case = problem.case
    renew(problem, route)
    synchronize(case.device)
    start = time.perf_counter()
    out = step(problem, route)
    synchronize(case.device)
    seconds = time.perf_counter() - start
    result = {
        "out": out.detach(),
        "d x": problem.x.grad,
        "d top_k_weights": problem.top_k_weights.grad,
    }
    for name, parameter in route.adapter.items():
        gradient = parameter.grad
        if route.rank_major and "lora_B" in name and gradient is not None:
            gradient = gradient.unflatten(1, (case.r, case.E)).transpose(1, 2).flatten(1)
        result[f"d {name}"] = gradient
    return seconds, result


def relative_errors(
    result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> dict[str, float]:
    """|a - ref| / |ref| of everything in `result`; infinite for what is missing or of another shape."""
    errors = {}
    for name, a in result.items():
        ref = expected[name]
        wrong = a is None or a.shape != ref.shape
        errors[name] = math.inf if wrong else ((a.to(ref.dtype) - ref).norm() / ref.norm()).item()
    return errors


def check(errors: dict[str, float], bound: float) -> None:
    """Raises: CheckFailed, naming what is above the bound; NaN is."""
    above = [name for name, error in errors.items() if not error <= bound]
    if above:
        raise CheckFailed(f"wrong {', '.join(above)}")


def memory(problem: Problem, route: Route) -> dict[str, float]:
    """MiB held after forward, kept without the output, and the peak of a step, all above its start."""
    case = problem.case
    renew(problem, route)
    gc.collect()
    if case.device.type == "cuda":
        synchronize(case.device)
        start = torch.cuda.memory_allocated(case.device)
        torch.cuda.reset_peak_memory_stats(case.device)
        out = forward(problem, route)
        held = torch.cuda.memory_allocated(case.device) - start
        out.backward(problem.dout)
        peak = torch.cuda.max_memory_allocated(case.device) - start
    else:
        held = sum(allocations(lambda: forward(problem, route)))
        at, peak = 0, 0
        for nbytes in allocations(lambda: step(problem, route)):
            at += nbytes
            peak = max(peak, at)
        out = problem.x
    kept = held - out.numel() * out.element_size()
    return {"held": held / MIB, "kept": kept / MIB, "peak": peak / MIB}


def allocations(call: Callable[[], object]) -> list[int]:
    """Bytes of CPU memory taken (> 0) and given back (< 0) during a call whose result stays alive, in order."""
    # triggers: the profiler otherwise writes two lines to stderr each time
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        result = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    del result
    return [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]


class Timer:
    """Times calls one by one with the cache flushed before each: device events on a GPU, the wall clock on a CPU.

    Attributes:
        rest: seconds of idleness ahead of each series of calls.
    """

    def __init__(self, device: torch.device, rest: float = 0.0):
        self.device, self.rest = device, rest
        self.flush = torch.empty(
            256 * MIB if device.type == "cuda" else 64 * MIB, dtype=torch.int8, device=device
        )

    def __call__(self, call: Callable[[], object], before: Callable[[], object], repeat: int):
        """(ms of each call, ms in which the host issued it or None on a CPU) after one call to warm up."""
        if self.rest:
            synchronize(self.device)
            time.sleep(self.rest)
        before()
        call()
        if self.device.type != "cuda":
            times = []
            for _ in range(repeat):
                before()
                self.flush.zero_()
                start = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - start))
            return times, None
        events, host = [], []
        for _ in range(repeat):
            before()
            self.flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            start = time.perf_counter()
            call()
            host.append(1e3 * (time.perf_counter() - start))
            end.record()
            events.append((begin, end))
        synchronize(self.device)
        return [begin.elapsed_time(end) for begin, end in events], host


class Probe:
    """A large matrix product on random data and a large copy: what the machine reaches whenever they are timed."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.n, self.nbytes = (8192, 2**31) if device.type == "cuda" else (1024, 2**27)
        # on a CPU, shared with whatever else runs, the fastest one comes closest to what the machine can do
        self.typical = statistics.median if device.type == "cuda" else min
        a, b, c = (torch.randn(self.n, self.n, device=device, dtype=dtype) for _ in range(3))
        source, target = (
            torch.empty(self.nbytes, dtype=torch.int8, device=device).fill_(i) for i in (1, 2)
        )
        self.calls = partial(torch.mm, a, b, out=c), partial(target.copy_, source)

    def __call__(self, timer: Timer, products: int, copies: int) -> tuple[float, float]:
        """ms of a product and of a copy."""
        product, copy = (
            self.typical(timer(call, lambda: None, repeat)[0])
            for call, repeat in zip(self.calls, (products, copies), strict=True)
        )
        return product, copy

    def ceilings(self, product: float, copy: float) -> Ceilings:
        """What so many ms of a product and of a copy come to."""
        return Ceilings(2e3 * self.n**3 / product, 2e3 * self.nbytes / copy)


def measure_ceilings(timer: Timer, probe: Probe) -> Ceilings:
    """The ceilings of a machine that has done nothing before."""
    repeat = 20 if timer.device.type == "cuda" else 10
    return probe.ceilings(*probe(timer, repeat, repeat))


def measure_share(problem: Problem, timer: Timer, repeat: int) -> float:
    """ms of forward and backward of the rank-r products alone, on rows that lie in expert order already."""
    case = problem.case
    counts = problem.top_k_index.flatten().bincount(minlength=case.E)
    ends = counts.cumsum(0).to(torch.int32)
    route = Route(None, {name: p.clone().requires_grad_() for name, p in problem.adapter.items()})
    rows = {
        name: torch.randn(
            case.T * case.top_k, weight.shape[2], device=case.device, dtype=case.dtype
        ).requires_grad_()
        for name, weight in problem.weights.items()
    }
    d_rows = {
        name: torch.randn(len(rows[name]), w.shape[1]).to(rows[name])
        for name, w in problem.weights.items()
    }

    def products():
        for name, x in rows.items():
            y = low_rank(x, route.adapter[f"lora_A.{name}"], route.adapter[f"lora_B.{name}"], ends)
            torch.autograd.backward(y, d_rows[name])

    def before():
        renew(problem, route)
        for x in rows.values():
            x.grad = None

    return statistics.median(timer(products, before, repeat)[0])


def run_case(
    case: Case,
    names: list[str],
    idle: Ceilings,
    probe: Probe,
    timer: Timer,
    repeat: int,
    seen: set[str],
) -> list[dict]:
    """One row per route: checked, then measured in rounds in which every route takes its turn, on a GPU the probe too.

    Args:
        idle: the ceilings before the first case.
        seen: the routes that ran before, to which these are added.
    """
    problem = Problem(case)
    rows = {name: new_row(case, name) for name in names}
    routes, references = {}, {}
    for name, row in rows.items():
        row["first_in_process"] = name not in seen
        seen.add(name)
        try:
            routes[name], row["first"] = checked_route(problem, name, row, references)
            row.update(memory(problem, routes[name]))
        except Exception as error:
            fail(row, error)
    references.clear()
    # on a CPU, shared with whatever else runs, many short rounds compare better than few long ones
    rounds = 3 if case.device.type == "cuda" and not timer.rest else max(1, repeat // 2)
    ceilings = measure_times(problem, routes, rows, idle, probe, timer, repeat, rounds)
    passed = {name: row for name, row in rows.items() if not row["failed"]}
    # the torch route's check vouches for the rank-r products
    if {"base", "torch"} <= passed.keys():
        share = measure_share(problem, timer, repeat)
        for name in passed.keys() - {"base"}:
            rows[name].update(
                share=share, x_base=rows[name]["step"] / (rows["base"]["step"] + share)
            )
    for row in rows.values():
        row.update(flops=ceilings.flops, bandwidth=ceilings.bandwidth, roof=case.roof(ceilings))
        if not row["failed"]:
            row.update(x_roof=row["step"] / row["roof"], x_roof_idle=row["step"] / case.roof(idle))
    return list(rows.values())


def checked_route(problem: Problem, name: str, row: dict, references: dict) -> tuple[Route, float]:
    """A route whose first step gave the reference's output and gradients, and the seconds of that step.

    Args:
        row: receives the errors.
        references: {with adapter: what the reference gives}, filled when first needed.
    Raises:
        CheckFailed: naming what is wrong.
    """
    route = ROUTES[name](problem)
    seconds, result = first_step(problem, route)
    adapted = name != "base"
    if adapted not in references:
        references[adapted] = problem.reference(problem.scaling if adapted else 0.0)
    expected = references[adapted]
    # every gradient has to be there; without an adapter there are none of A and B
    names = [n for n in expected if adapted or "lora" not in n]
    row["errors"] = relative_errors({n: result.get(n) for n in names}, expected)
    row["err"], row["edx"] = row["errors"]["out"], row["errors"]["d x"]
    check(row["errors"], BOUNDS[problem.case.dtype])
    return route, seconds


def measure_times(
    problem: Problem, routes: dict[str, Route], rows: dict, idle: Ceilings, probe: Probe, timer: Timer, repeat: int,
    rounds: int,
) -> Ceilings:  # fmt: skip
    """Fill fwd, step, host and spread of the rows of `routes`; the ceilings meanwhile."""
    times, probed = {name: {"fwd": [], "step": [], "host": []} for name in routes}, []
    once = math.ceil(repeat / rounds)
    products = once
    if timer.device.type == "cuda" and not timer.rest:
        # for about as long as a fused route's forwards and steps: a short burst is not yet throttled
        products = math.ceil(2.5 * once * problem.case.roof(idle) * idle.flops / (2e3 * probe.n**3))
        products = min(max(products, once), 200)
    for _ in range(rounds):
        if timer.device.type == "cuda":
            probed.append(probe(timer, products, once))
        for name, route in routes.items():
            if rows[name]["failed"]:
                continue
            before = partial(renew, problem, route)
            try:
                fwd, _ = timer(partial(forward, problem, route), before, once)
                step_ms, host = timer(partial(step, problem, route), before, once)
            except Exception as error:
                fail(rows[name], error)
                continue
            for key, values in (("fwd", fwd), ("step", step_ms), ("host", host)):
                times[name][key] += [statistics.median(values)] if values else []
            before()
    for name, measured in times.items():
        row = rows[name]
        if not row["failed"]:
            row.update(
                {key: statistics.median(values) for key, values in measured.items() if values}
            )
            row["spread"] = (max(measured["step"]) - min(measured["step"])) / row["step"]
    return probe.ceilings(*map(statistics.median, zip(*probed, strict=True))) if probed else idle


NUMBERS = (
    "fwd", "step", "first", "held", "kept", "peak", "host", "spread", "x_roof", "x_roof_idle", "share", "x_base",
)  # fmt: skip


def new_row(case: Case, name: str) -> dict:
    """A row with every field there is; the numbers of a route that fails stay None."""
    goal_x_roof, goal_kept = case.goals() if name == "moe_lora" else (None, None)
    sizes = {
        "config": case.name,
        "E": case.E,
        "H": case.H,
        "I": case.I,
        "top_k": case.top_k,
        "T": case.T,
        "r": case.r,
    }
    rest = {
        "err": None,
        "edx": None,
        "errors": None,
        "goal_x_roof": goal_x_roof,
        "goal_kept": goal_kept,
    }
    rest["goal_x_base"] = CPU_GOAL if name == "moe_lora" and case.device.type == "cpu" else None
    kind = {
        "peer": name,
        "dtype": str(case.dtype).removeprefix("torch."),
        "lora": "float32",
        "skew": case.skew,
    }
    roofline = dict.fromkeys(("roof", "flops", "bandwidth"))
    return {**sizes, **kind, **roofline, **dict.fromkeys(NUMBERS), **rest, "failed": None}


def fail(row: dict, error: Exception) -> None:
    """Say why on stderr, and leave the row without a number."""
    row.update(dict.fromkeys(NUMBERS))
    row["failed"] = (
        str(error) if isinstance(error, CheckFailed) else f"raised {type(error).__name__}"
    )
    print(
        f"{row['config']} T={row['T']} r={row['r']}, {row['peer']}: {row['failed']}",
        file=sys.stderr,
    )
    if isinstance(error, CheckFailed):
        print(
            "  " + ", ".join(f"{name} {e:.1e}" for name, e in row["errors"].items()),
            file=sys.stderr,
        )
    else:
        traceback.print_exception(error)


# ---- what comes out ------------------------------------------------------------------------------------------------


def describe_machine(device: torch.device) -> dict[str, str]:
    """The device and the versions of what runs on it."""
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            driver = subprocess.run(
                query, capture_output=True, text=True, check=True
            ).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            driver = "unknown"
        machine = {
            "device": torch.cuda.get_device_name(device),
            "driver": driver,
            "cuda": torch.version.cuda,
        }
    else:
        machine = {"device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads"}
    machine |= {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "transformers", "peft"):
        try:
            machine[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            machine[package] = "none"
    return machine


COLUMNS = {
    "config": ("shape", "{}"),
    "T": ("T", "{}"),
    "r": ("r", "{}"),
    "peer": ("route", "{}"),
    "fwd": ("fwd ms", "{:.2f}"),
    "step": ("fwd+bwd ms", "{:.2f}"),
    "roof": ("roof ms", "{:.2f}"),
    "x_roof": ("x roof", "{:.2f}"),
    "x_roof_idle": ("idle x", "{:.2f}"),
    "goal_x_roof": ("goal x", "{:.2f}"),
    "x_base": ("x base+share", "{:.2f}"),
    "goal_x_base": ("goal x", "{:.2f}"),
    "kept": ("kept MiB", "{:.1f}"),
    "goal_kept": ("goal MiB", "{}"),
    "peak": ("peak MiB", "{:.1f}"),
    "first": ("first s", "{:.2f}"),
    "host": ("host ms", "{:.2f}"),
    "spread": ("spread", "{:.0%}"),
    "worst": ("worst error", "{:.1e}"),
}


def format_table(rows: list[dict]) -> str:
    """The rows under COLUMNS, without the columns nobody has; a failed route has a reason in place of numbers."""
    rows = [
        {**row, "worst": None if row["failed"] else max(row["errors"].values())} for row in rows
    ]
    columns = {key: c for key, c in COLUMNS.items() if any(row[key] is not None for row in rows)}
    lines = [[title for title, _ in columns.values()]]
    for row in rows:
        cells = [
            "" if row[key] is None else form.format(row[key]) for key, (_, form) in columns.items()
        ]
        if row["failed"]:
            names = ("config", "T", "r", "peer")
            cells = [
                cell if key in names else "-" for key, cell in zip(columns, cells, strict=True)
            ]
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = [key in ("config", "peer") for key in columns]
    text = []
    for cells, row in zip(lines, [None, *rows], strict=True):
        padded = [
            c.ljust(w) if is_left else c.rjust(w)
            for c, w, is_left in zip(cells, widths, left, strict=True)
        ]
        text.append(
            "  ".join(padded).rstrip()
            + (f"  FAILED: {row['failed']}" if row and row["failed"] else "")
        )
    return "\n".join(text)


def plot(rows: list[dict], path: Path, title: str) -> None:
    """Bars of forward + backward over the roofline, a group per case, a colour per route, a line at each goal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys((row["config"], row["T"], row["r"]) for row in rows))
    names = list(dict.fromkeys(row["peer"] for row in rows))
    found = {(row["config"], row["T"], row["r"], row["peer"]): row for row in rows}
    width = 0.8 / len(names)
    figure, axes = plt.subplots(figsize=(max(8, 1.5 * len(cases)), 4), layout="constrained")
    for i, name in enumerate(names):
        at = [c + (i - (len(names) - 1) / 2) * width for c in range(len(cases))]
        of_case = [found.get((*case, name), {}) for case in cases]
        bars = axes.bar(at, [row.get("x_roof") or math.nan for row in of_case], width, label=name)
        axes.bar_label(
            bars,
            [f"{row['x_roof']:.1f}" if row.get("x_roof") else "" for row in of_case],
            fontsize=7,
        )
        for x, row in zip(at, of_case, strict=True):
            if row.get("goal_x_roof"):
                axes.hlines(
                    row["goal_x_roof"], x - width / 2, x + width / 2, color="black", linewidth=1.5
                )
    axes.axhline(1, color="gray", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(cases)), [f"{name}\nT={T} r={r}" for name, T, r in cases], fontsize=8)
    axes.set_ylabel("forward + backward, times the roofline")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- the command line ----------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, what depends on the device filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shapes", nargs="+", metavar="SHAPE", help=f"E,H,I,top_k or of: {', '.join(SHAPES)}"
    )
    parser.add_argument(
        "--tokens", nargs="+", type=int, metavar="T", help="tokens (default: 8192, on a CPU 256)"
    )
    parser.add_argument(
        "--rank", nargs="+", type=int, metavar="r", default=[16], help="ranks (default: 16)"
    )
    parser.add_argument(
        "--routes",
        nargs="+",
        metavar="ROUTE",
        choices=sorted(ROUTES),
        help=f"of: {', '.join(ROUTES)}",
    )
    parser.add_argument("--skip-peft", action="store_true", help="leave the slowest peer out")
    parser.add_argument(
        "--skew",
        nargs="?",
        type=float,
        const=0.9,
        default=0.0,
        metavar="SHARE",
        help="of rows on one expert (0.9)",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of base and activations (default: bfloat16, on a CPU float32)",
    )
    parser.add_argument("--device", help="default: cuda where there is one")
    parser.add_argument(
        "--repeat", type=int, help="timed steps per route and case (default: 24, on a CPU 12)"
    )
    parser.add_argument(
        "--rest",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="idle ahead of every turn, all of them short (0)",
    )
    parser.add_argument(
        "--cold", action="store_true", help="start with an empty Triton cache, for the first step"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number here")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the bars here (needs matplotlib)"
    )
    args = parser.parse_args(argv)
    args.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = args.device.type == "cuda"
    args.dtype = DTYPES[args.dtype or ("bfloat16" if on_gpu else "float32")]
    args.repeat = (24 if on_gpu else 12) if args.repeat is None else args.repeat
    args.routes = args.routes or (
        ["moe_lora", "peft", "torch"] if on_gpu else ["moe_lora", "base", "torch"]
    )
    args.routes = [name for name in args.routes if not (args.skip_peft and name == "peft")]
    if (
        min(args.repeat, *args.rank, *(args.tokens or [1])) < 1
        or not 0 <= args.skew <= 1
        or not args.routes
    ):
        parser.error(
            "--repeat, --rank and --tokens are at least 1, --skew is in [0, 1], and one route has to be left"
        )
    if not 0 <= args.rest < math.inf:
        parser.error(f"--rest: {args.rest} is no number of seconds")
    for name in args.shapes or ():
        if name not in SHAPES and not (
            name.count(",") == 3 and all(n.isdecimal() for n in name.split(","))
        ):
            parser.error(
                f"--shapes: {name!r} is neither E,H,I,top_k nor one of {', '.join(SHAPES)}"
            )
    return args


def list_cases(args: argparse.Namespace) -> list[Case]:
    """The default cases, or the product of what the command line names."""
    pairs = GPU_CASES if args.device.type == "cuda" else CPU_CASES
    if args.shapes or args.tokens:
        tokens = args.tokens or [8192 if args.device.type == "cuda" else 256]
        pairs = [(name, T) for name in args.shapes or dict(pairs) for T in tokens]
    sizes = {name: SHAPES.get(name) or tuple(map(int, name.split(","))) for name, _ in pairs}
    return [
        Case(n, *sizes[n], T, r, args.dtype, args.skew, args.device)
        for n, T in pairs
        for r in args.rank
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 1 if a route failed."""
    args = parse_arguments(argv)
    cache = tempfile.TemporaryDirectory() if args.cold else None
    if cache:
        os.environ["TRITON_CACHE_DIR"] = cache.name
    if args.device.index is not None:
        torch.cuda.set_device(args.device)
    # the reference must be IEEE fp32
    torch.set_float32_matmul_precision("highest")
    started = datetime.now(UTC)
    timer = Timer(args.device, args.rest)
    probe = Probe(args.device, args.dtype)
    ceilings = measure_ceilings(timer, probe)
    dtype = str(args.dtype).removeprefix("torch.")
    machine = describe_machine(args.device)
    headline = (
        f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}, transformers "
        f"{machine['transformers']}, peft {machine['peft']}\n{started:%Y-%m-%d}, ceilings of the idle machine "
        f"{ceilings.flops / 1e12:.3g} TFLOP/s {dtype}, {ceilings.bandwidth / 1e12:.3g} TB/s"
        + (f", {args.rest:g} s of rest ahead of every turn" if args.rest else "")
    )
    rows, seen = [], set()
    for case in list_cases(args):
        print(f"{case.label} ...", file=sys.stderr, flush=True)
        rows += run_case(case, args.routes, ceilings, probe, timer, args.repeat, seen)
        gc.collect()
        if args.device.type == "cuda":
            torch.cuda.empty_cache()
        if args.json:
            # after every case, so that an interrupted run leaves what it has
            report = {
                "machine": machine,
                "date": started.isoformat(timespec="seconds"),
                "what": WHAT,
            }
            report |= {"roofline": ROOFLINE, "command": sys.argv[1:] if argv is None else argv}
            report |= {"cold": args.cold, "rest": args.rest}
            report |= {
                "ceilings": {
                    "dtype": dtype,
                    "flops": ceilings.flops,
                    "bandwidth": ceilings.bandwidth,
                }
            }
            args.json.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")
    print(headline)
    print(format_table(rows))
    if args.plot:
        plot(rows, args.plot, headline)
    if cache:
        cache.cleanup()
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
