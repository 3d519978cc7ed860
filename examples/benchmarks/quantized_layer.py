"""One layer on quantized experts beside the same layer on dense ones: checked, timed in turns."""

import statistics
from dataclasses import dataclass
from functools import partial

import torch

from cases import MIB, PROJECTIONS, Case, Problem
from checking import check_route, reference
from models import FORMATS
from peft_moe_lora.experts.decoding import store
from peft_moe_lora.ops import reference as twins
from peft_moe_lora.ops.quantize import quantize
from peft_moe_lora.ops.quantized import QuantizedWeight
from routes import Route, measure_memory, moe_lora_route, renew, step
from timing import Timer

ROUNDS = 3

Codes = dict[str, QuantizedWeight]


@dataclass
class LayerRow:
    """One layer, dense or in one format.

    Attributes:
        case, route: what was timed; the route is "dense" or the format.
        scratch: bound of the scratch into which codes are decoded, MiB; None for the package's own.
        step: ms of forward and backward.
        held, kept, peak: MiB, see `routes.Memory`.
        weights: MiB of the base weights.
        dense_step: ms of the dense layer, timed in turns with this one.
        x_step, x_peak: step and peak over those of that dense layer.
        decode: by projection, ms and GB/s of decoding every expert at once, see `decoding_speed`.
    """

    case: str
    route: str
    scratch: int | None
    step: float
    held: float
    kept: float
    peak: float
    weights: float
    dense_step: float | None = None
    x_step: float = 1.0
    x_peak: float = 1.0
    decode: dict[str, dict[str, float]] | None = None


def quantize_problem(problem: Problem, format: str) -> Codes:
    """The problem's weights quantized; its dense weights become what the codes stand for."""
    codes = {}
    for projection in PROJECTIONS:
        dense = problem.weights[projection]
        codes[projection] = quantize(dense, **FORMATS[format])
        dense.copy_(codes[projection].dense())
    return codes


def quantized_route(problem: Problem, codes: Codes) -> Route:
    """peft_moe_lora on the quantized weights."""
    route = moe_lora_route(problem)
    experts = route.forward.experts.base_layer
    for projection, weight in codes.items():
        store(experts, f"{projection}_proj", weight)
    return route


def time_layer(case: Case, formats: list[str], repeat: int, scratch: int | None) -> list[LayerRow]:
    """A row for the dense layer and one for each format.

    Raises:
        CheckFailed: if a route's output or gradients are not the reference's.
    """
    rows: list[LayerRow] = []
    for format in formats:
        dense, quantized = time_format(case, format, repeat, scratch)
        if not rows:
            rows.append(dense)
        rows.append(quantized)
    return rows


def time_format(
    case: Case, format: str, repeat: int, scratch: int | None
) -> tuple[LayerRow, LayerRow]:
    """The rows of the dense layer and of one format, timed in turns.

    Raises:
        CheckFailed: if a route's output or gradients are not the reference's.
    """
    problem = Problem(case)
    timer = Timer(case.device)
    codes = quantize_problem(problem, format)
    routes = {"dense": moe_lora_route(problem), format: quantized_route(problem, codes)}
    weights = {"dense": problem.weights, format: codes}
    expected = reference(problem, problem.scaling)
    for route in routes.values():
        check_route(problem, route, expected)
    del expected
    memory = {name: measure_memory(problem, route) for name, route in routes.items()}
    times: dict[str, list[float]] = {name: [] for name in routes}
    for _ in range(ROUNDS):
        for name, route in routes.items():
            before = partial(renew, problem, route)
            series = timer(partial(step, problem, route), repeat, before)
            times[name].append(statistics.median(series.times))
    dense, quantized = (
        LayerRow(
            case=case.label,
            route=name,
            scratch=scratch,
            step=statistics.median(times[name]),
            weights=sum(weight.nbytes for weight in weights[name].values()) / MIB,
            **memory[name]._asdict(),
        )
        for name in routes
    )
    quantized.dense_step = dense.step
    quantized.x_step = quantized.step / dense.step
    quantized.x_peak = quantized.peak / dense.peak
    if case.device.type == "cuda":
        quantized.decode = decoding_speed(problem, codes, timer, repeat)
    return dense, quantized


def decoding_speed(
    problem: Problem, codes: Codes, timer: Timer, repeat: int
) -> dict[str, dict[str, float]]:
    """How fast a GPU decodes every expert of each projection.

    Returns: by projection "ms" and "GB/s", counting codes read and dense weights written.
    Raises:
        SystemExit: if the kernel's weights are not bit for bit those of its twin.
    """
    from peft_moe_lora.ops import kernels

    offsets = twins.route(problem.top_k_index, problem.case.E).expert_offsets
    found = {}
    for projection, weight in codes.items():
        out = torch.empty(weight.stored_shape, dtype=weight.dtype, device=weight.device)
        decode = partial(kernels.dequantize, weight, offsets, 0, out)
        decode()
        if not torch.equal(out, weight.dense()):
            raise SystemExit(f"{projection}: the kernel's bits are not those of its twin.")
        ms = statistics.median(timer(decode, repeat).times)
        found[projection] = {"ms": ms, "GB/s": (weight.nbytes + out.nbytes) / ms / 1e6}
    return found
