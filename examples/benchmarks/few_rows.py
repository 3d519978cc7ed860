"""A layer with few rows an expert: its 4-bit codes are decoded in the product, or before it."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from cases import Case, Problem
from checking import check_route, reference
from quantized_layer import ROUNDS, quantize_problem, quantized_route
from routes import Route, forward, moe_lora_route, renew, step
from timing import Timer


class Way(NamedTuple):
    """A route, and where its codes are decoded.

    Attributes:
        max_block_m: products over tiles of at most so many rows decode their codes themselves; None
            leaves the package's own bound.
    """

    route: Route
    max_block_m: int | None


@contextmanager
def decoding(max_block_m: int | None) -> Iterator[None]:
    """Within it, products over tiles of at most so many rows decode their codes themselves."""
    if max_block_m is None:
        yield
        return
    from peft_moe_lora.ops.kernels.codes import product_4bit
    from peft_moe_lora.ops.kernels.launching import replay

    kept = product_4bit.MAX_BLOCK_M
    product_4bit.MAX_BLOCK_M = max_block_m
    # the recorded launches decode elsewhere
    replay.forget()
    try:
        yield
    finally:
        product_4bit.MAX_BLOCK_M = kept
        replay.forget()


def use_blocks(blocks: dict[str, Any]) -> None:
    """Give every row of the table for products of codes these settings.

    Args:
        blocks: such as {"BLOCK_K": 32, "num_warps": 8}.
    """
    from peft_moe_lora.ops.kernels.launching import table
    from table_rows import forget

    for row in table.TABLE:
        if row.op.endswith("4bit") and row.arch:
            row.blocks.update(blocks)
    forget()


def ways_to_decode(problem: Problem, format: str) -> dict[str, Way]:
    """The dense layer, and the quantized one in two ways on a GPU, in one on a CPU."""
    codes = quantize_problem(problem, format)
    ways = {"dense": Way(moe_lora_route(problem), None)}
    route = quantized_route(problem, codes)
    if problem.case.device.type == "cuda":
        # a tile has at most 128 rows: all products decode, or none
        ways["in the product"] = Way(route, 128)
        ways["into a scratch"] = Way(route, 0)
    else:
        ways["quantized"] = Way(route, None)
    return ways


@torch.no_grad()
def forward_without_gradients(problem: Problem, route: Route) -> torch.Tensor:
    """The layer's output, as inference computes it."""
    return forward(problem, route)


def _repeat(graph: torch.cuda.CUDAGraph, *held: object) -> None:
    """Repeat a graph, whose memory `held` keeps alive."""
    graph.replay()


def captured_forward(problem: Problem, route: Route) -> Callable[[], None]:
    """The layer's forward without gradients as one CUDA graph.

    Returns: a call that repeats the graph. It holds problem and route, because a graph reads their
        memory and does not keep it.
    """
    # compiled, recorded and replayed before it is captured
    for _ in range(3):
        forward_without_gradients(problem, route)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        forward_without_gradients(problem, route)
    return partial(_repeat, graph, problem, route)


def time_few_rows(case: Case, format: str, repeat: int) -> dict[str, Any]:
    """ms of forward without gradients, of forward in a CUDA graph and of a step, each way in turns.

    Returns: "case", "tokens", "rows_per_expert" and "ms" by way and call.
    Raises:
        CheckFailed: if a way's output or gradients are not the reference's.
    """
    problem = Problem(case)
    timer = Timer(case.device)
    ways = ways_to_decode(problem, format)
    expected = reference(problem, problem.scaling)
    calls: dict[str, dict[str, Callable[[], object]]] = {}
    for name, (route, max_block_m) in ways.items():
        with decoding(max_block_m):
            check_route(problem, route, expected)
            calls[name] = {
                "forward": partial(forward_without_gradients, problem, route),
                "step": partial(step, problem, route),
            }
            if case.device.type == "cuda":
                calls[name]["graph"] = captured_forward(problem, route)
    times: dict[str, dict[str, list[float]]] = {
        name: {kind: [] for kind in kinds} for name, kinds in calls.items()
    }
    for _ in range(ROUNDS):
        for name, (route, max_block_m) in ways.items():
            before = partial(renew, problem, route)
            with decoding(max_block_m):
                for kind, call in calls[name].items():
                    series = timer(call, repeat, before)
                    times[name][kind].append(statistics.median(series.times))
    ms = {
        name: {kind: statistics.median(values) for kind, values in kinds.items()}
        for name, kinds in times.items()
    }
    rows = case.T * case.top_k / case.E
    return {"case": case.label, "tokens": case.T, "rows_per_expert": rows, "ms": ms}
