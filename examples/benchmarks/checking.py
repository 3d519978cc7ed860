"""Whether a route computes the layer: its output and gradients, against higher precision."""

import math
import time

import torch

from cases import PROJECTIONS, Case, Problem
from peft_moe_lora.ops.dropout import Dropout, dropout_mask
from routes import Route, renew, step, to_expert_major
from timing import synchronize

# of |a - ref| / |ref|: 8 and 11 bits of mantissa go through two products and an activation; the
# bound of float32 is one that tf32 does not meet
BOUNDS = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
# rows of one expert that the reference takes at a time
ROWS = 4096
# of the generator that draws the seeds of dropout's masks
SEED = 1

Tensors = dict[str, torch.Tensor]


class CheckFailed(Exception):
    """A route's result is not the reference's."""


def relative_error(a: torch.Tensor, ref: torch.Tensor) -> float:
    """|a - ref| / |ref|, in the precision of `ref`."""
    return ((a.to(ref.dtype) - ref).norm() / ref.norm()).item()


def relative_errors(result: dict[str, torch.Tensor | None], expected: Tensors) -> dict[str, float]:
    """The relative error of each result; infinite for one that is missing or has another shape."""
    errors = {}
    for name, a in result.items():
        ref = expected[name]
        if a is None or a.shape != ref.shape:
            errors[name] = math.inf
        else:
            errors[name] = relative_error(a, ref)
    return errors


def check(errors: dict[str, float], bound: float) -> None:
    """Compare the errors with the bound.

    Raises:
        CheckFailed: naming each result whose error is above the bound or NaN.
    """
    above = [name for name, error in errors.items() if not error <= bound]
    if above:
        raise CheckFailed(f"wrong {', '.join(above)}")


def first_step(problem: Problem, route: Route) -> tuple[float, dict[str, torch.Tensor | None]]:
    """Run a step, compilation included.

    Returns: its seconds; its output and gradients under the names of `reference`. Those of B are
        expert-major.
    """
    case = problem.case
    renew(problem, route)
    torch.manual_seed(SEED)
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
            gradient = to_expert_major(gradient, case.r)
        result[f"d {name}"] = gradient
    return seconds, result


def check_route(problem: Problem, route: Route, expected: Tensors) -> None:
    """Run a step of a route that has an adapter, and compare it with the reference.

    Raises:
        CheckFailed: naming what is wrong.
    """
    _, result = first_step(problem, route)
    check(relative_errors(result, expected), BOUNDS[problem.case.dtype])


def reference(problem: Problem, scaling: float) -> Tensors:
    """The layer's output and gradients in fp32 (fp64 for a float32 case), expert by expert.

    Args:
        scaling: of the update; 0 gives the layer without an adapter.
    Returns: "out" and "d x" [T, H]; "d top_k_weights" [T, top_k]; "d lora_A.gate_up" and so on, of
        the shapes of A and B.
    """
    case = problem.case
    dtype = torch.float32
    if case.dtype == torch.float32:
        dtype = torch.float64

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, device=case.device, dtype=dtype)

    total = {
        "out": zeros(case.T, case.H),
        "d x": zeros(case.T, case.H),
        "d top_k_weights": zeros(case.T, case.top_k),
    }
    total |= {f"d {name}": zeros(*p.shape) for name, p in problem.adapter.items()}
    slots = problem.top_k_index.flatten().argsort(stable=True)
    counts = problem.top_k_index.flatten().bincount(minlength=case.E).tolist()
    dropouts = _dropouts(case)
    for e, slots_of_expert in enumerate(slots.split(counts)):
        _add_expert(total, problem, scaling, dropouts, e, slots_of_expert)
    return total


def _add_expert(
    total: Tensors,
    problem: Problem,
    scaling: float,
    dropouts: dict[str, Dropout],
    e: int,
    slots: torch.Tensor,
) -> None:
    """Add what one expert contributes to the reference, at most ROWS rows at a time.

    Args:
        total: the tensors that `reference` returns.
        dropouts: by projection; empty without dropout.
        slots: flat (token, slot) indices routed to expert e.
    """
    case = problem.case
    dtype = total["out"].dtype
    base = {name: weight[e].to(dtype) for name, weight in problem.weights.items()}
    biases = {name: bias[e].to(dtype) for name, bias in problem.biases.items()}
    pairs = _pairs_of_expert(problem.adapter, e, case.r)
    pairs = {name: p.to(dtype).requires_grad_() for name, p in pairs.items()}
    d_adapter = {name: total[f"d {name}"] for name in pairs}
    d_pairs = _pairs_of_expert(d_adapter, e, case.r)
    for part in slots.split(ROWS):
        token = part // case.top_k
        x = problem.x.detach()[token].to(dtype).requires_grad_()
        row_weight = problem.top_k_weights.detach().flatten()[part].to(dtype).requires_grad_()
        y = x
        for name in PROJECTIONS:
            kept = y
            if name in dropouts:
                kept = y * dropout_mask(dropouts[name], part, y.shape[1])
            update = kept @ pairs[f"lora_A.{name}"].T @ pairs[f"lora_B.{name}"].T
            y = y @ base[name].T + scaling * update
            if name in biases:
                y = y + biases[name]
            if name == "gate_up":
                y = problem.activation(y)
        y = row_weight[:, None] * y
        inputs = [x, row_weight, *pairs.values()]
        dx, d_weight, *gradients = torch.autograd.grad(y, inputs, problem.dout[token].to(dtype))
        total["out"].index_add_(0, token, y.detach())
        total["d x"].index_add_(0, token, dx)
        total["d top_k_weights"].view(-1)[part] = d_weight
        for name, gradient in zip(pairs, gradients, strict=True):
            d_pairs[name].add_(gradient)


def _dropouts(case: Case) -> dict[str, Dropout]:
    """The dropout of each projection, with the seeds that a layer draws in `first_step`."""
    if not case.dropout:
        return {}
    torch.manual_seed(SEED)
    # as peft_moe_lora.functional.draw_seeds does
    seeds = torch.randint(2**31 - 1, (2, 2), device=case.device)
    return {name: Dropout(case.dropout, seeds[i, :1]) for i, name in enumerate(PROJECTIONS)}


def _pairs_of_expert(adapter: Tensors, e: int, r: int) -> Tensors:
    """Views of expert e's own A [r, K] and B [N, r]."""
    columns = slice(e * r, (e + 1) * r)
    views = {}
    for name, parameter in adapter.items():
        if "lora_A" in name:
            views[name] = parameter[columns]
        else:
            views[name] = parameter[:, columns]
    return views
