"""out = combine(post_norm(down(act(gate_up(x))))) in several autograd steps.

gate_up and down are W[e] x + bias[e] + scaling * B[e] A[e] drop(x). Routing, gate_up, down and
combine are one operator each. act and post_norm are the model's own code and run between them.
It sees zeros in the rows of sentinels, which nobody computes, and so do its gradients.

Legend: xa [M, R] = scaling * A[e] drop(x), zeros past rank r; yb [M, R] = scaling * B[e]^T dy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..ops import Dropout, QuantizedWeight, Routing, composed, table_memory
from ..ops.ranks import stored_rank
from .backends import ops_for
from .operators import Gradient, Operator, as_stored, differentiable
from .projection import (
    Projection,
    gathered,
    pair_like,
    per_expert,
    rank_of,
    spread,
    transposed,
    whole_gradients,
)


def unfused_experts(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    up: Projection,
    down: Projection,
    activation: Callable[[torch.Tensor], torch.Tensor],
    post_norm: Callable[[torch.Tensor], torch.Tensor] | None,
    seed: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """`functional.experts`, for x [T, H] in the dtype of the weights.

    Args:
        seed: [2, 2] int64, the seeds of the masks of up and down in its rows; None without dropout.
    """
    routing = route(top_k_index, up.weight.shape[0], backend)
    halves = [
        expert_linear(x, half, routing, seed, 0, backend, gather=True) for half in up.halves()
    ]
    pre = halves[0]
    if len(halves) > 1:
        pre = torch.cat(halves, -1)
    y = expert_linear(activation(pre), down, routing, seed, 1, backend)
    if post_norm is not None:
        y = post_norm(y)
    return _combine(Rows(y, top_k_weights), routing, Backend(backend)).to(x.dtype)


class Backend(NamedTuple):
    """The backend of a step, one of BACKENDS."""

    backend: str


# ---- routing


class Selected(NamedTuple):
    """The experts that the router selected.

    Attributes:
        top_k_index: [T, top_k] integer.
        num_experts: E.
    """

    top_k_index: torch.Tensor
    num_experts: int


class Index(NamedTuple):
    """The index tensors of `Routing`, and `table_memory`, which begins with its `tiles`."""

    expert_offsets: torch.Tensor
    row_token: torch.Tensor
    row_slot: torch.Tensor
    slot_row: torch.Tensor
    table: torch.Tensor


def route(top_k_index: torch.Tensor, num_experts: int, backend: str) -> Routing:
    """The routing of top_k_index [T, top_k] to num_experts experts."""
    index = _route(Selected(top_k_index, num_experts), Backend(backend))
    return Routing(
        index.expert_offsets,
        index.row_token,
        index.row_slot,
        index.slot_row,
        top_k_index.shape[1],
        index.table,
    )


def _run_route(selected: Selected, backend: Backend) -> Index:
    ops = ops_for(backend.backend, selected.top_k_index.device)
    table = table_memory(selected.top_k_index, selected.num_experts)
    routing = ops.route(selected.top_k_index, selected.num_experts, table)
    return Index(
        routing.expert_offsets, routing.row_token, routing.row_slot, routing.slot_row, table
    )


def _fake_route(selected: Selected, backend: Backend) -> Index:
    top_k_index = selected.top_k_index
    M = top_k_index.numel()

    def index(length: int) -> torch.Tensor:
        return top_k_index.new_empty(length, dtype=torch.int32)

    table = table_memory(top_k_index, selected.num_experts)
    return Index(index(selected.num_experts + 1), index(M), index(M), index(M), table)


_route = Operator("route", (Selected, Backend), Index, _run_route, _fake_route)


# ---- a projection


class Inputs(NamedTuple):
    """The tensors of a projection.

    Attributes:
        x: [M, K] rows, or [T, K] tokens with `gather`; dtype of the weight.
        lora_A, lora_B, weight, bias: as in `Projection`.
        seed: [1] int64, the seed of the mask; None without dropout.
    """

    x: torch.Tensor
    lora_A: torch.Tensor | None
    lora_B: torch.Tensor | None
    weight: torch.Tensor | QuantizedWeight
    bias: torch.Tensor | None
    seed: torch.Tensor | None


class Plan(NamedTuple):
    """Settings of a projection that are not tensors.

    Attributes:
        scaling, dropout_p, experts: as in `Projection`.
        gather: whether row m reads token row_token[m].
        backend: one of BACKENDS.
    """

    scaling: float
    dropout_p: float
    gather: bool
    backend: str
    experts: tuple[int, ...] | None


class Results(NamedTuple):
    """y [M, N], and xa [M, R], None without an adapter."""

    y: torch.Tensor
    xa: torch.Tensor | None


class Kept(NamedTuple):
    """What backward reads in addition to x, the pair and the weight."""

    xa: torch.Tensor | None


class Needs(NamedTuple):
    """Which gradients are needed: the gradient of x, and the gradients of the pair."""

    needs_x: bool
    needs_lora: bool


class Gradients(NamedTuple):
    """The gradients of the first fields of `Inputs`, in their order; None if not needed."""

    x: torch.Tensor | None
    lora_A: torch.Tensor | None
    lora_B: torch.Tensor | None


def expert_linear(
    x: torch.Tensor,
    projection: Projection,
    routing: Routing,
    seeds: torch.Tensor | None,
    nth: int,
    backend: str,
    gather: bool = False,
) -> torch.Tensor:
    """y[m] = W[e] x[m] + bias[e] + scaling * B[e] A[e] drop(x[m]).

    Args:
        x: [M, K] rows, or [T, K] tokens with gather; cast to the dtype of the weight.
        projection: the projection.
        routing: the routing of the rows.
        seeds: [2, 2] int64; None without dropout.
        nth: index of the row of `seeds` that is the seed of the mask.
        backend: one of BACKENDS.
        gather: whether row m reads token row_token[m].
    Returns: [M, N], dtype of the weight.
    """
    p = projection
    seed = None
    if p.dropout_p:
        assert seeds is not None, "dropout needs a seed"
        seed = seeds[nth, :1]
    inputs = Inputs(x.to(p.weight.dtype), p.lora_A, p.lora_B, p.weight, p.bias, seed)
    plan = Plan(p.scaling, p.dropout_p, gather, backend, p.experts)
    return _linear(inputs, routing, plan)


def _run_linear(inputs: Inputs, routing: Routing, plan: Plan) -> Results:
    ops = ops_for(plan.backend, inputs.x.device)
    routing = ops.with_tiles(routing)
    A, B = _pair(inputs, plan)
    xa = None
    if A is not None:
        xa = ops.expert_shrink(
            inputs.x, A, routing, plan.scaling, gather=plan.gather, dropout=_dropout(inputs, plan)
        )
    y = ops.expert_linear(
        inputs.x, inputs.weight, routing, bias=inputs.bias, xa=xa, lora_B=B, gather=plan.gather
    )
    return Results(ops.zero_unrouted(y, routing), xa)


def _fake_linear(inputs: Inputs, routing: Routing, plan: Plan) -> Results:
    x = inputs.x
    E, N, _ = inputs.weight.shape
    M = routing.row_token.shape[0]
    xa = None
    if inputs.lora_A is not None:
        xa = x.new_empty(M, stored_rank(rank_of(inputs.lora_A, E, plan.experts)))
    return Results(x.new_empty(M, N), xa)


def _keep_linear(
    inputs: Inputs, routing: Routing, plan: Plan, results: Results
) -> tuple[Inputs, Kept, Routing, Plan]:
    # backward does not read the bias
    return inputs._replace(bias=None), Kept(results.xa), routing, plan


def _run_linear_backward(
    gradient: Gradient, inputs: Inputs, kept: Kept, routing: Routing, needs: Needs, plan: Plan
) -> Gradients:
    (dy,) = gradient
    E = inputs.weight.shape[0]
    ops = ops_for(plan.backend, dy.device)
    routing = ops.with_tiles(routing)
    A, B = _pair(inputs, plan)
    dropout = _dropout(inputs, plan)
    dx = dA = dB = A_out = B_out = None
    if needs.needs_lora:
        assert inputs.lora_A is not None and inputs.lora_B is not None, "no pair, no gradients"
        dA, dB = whole_gradients(inputs.lora_A, inputs.lora_B, E, plan.experts)
        A_out, B_out = per_expert(dA, dB, E)
    yb = composed.expert_shrink_outer(ops, dy, transposed(B), kept.xa, routing, plan.scaling, B_out)
    if needs.needs_lora:
        assert yb is not None and A_out is not None, "no pair, no gradients"
        ops.expert_outer(yb, inputs.x, routing, A_out, gather_right=plan.gather, dropout=dropout)
        dA, dB = gathered(dA, dB, E, plan.experts)
    if needs.needs_x:
        dx = ops.expert_linear(
            dy,
            inputs.weight.transpose(1, 2),
            routing,
            xa=yb,
            lora_B=transposed(A),
            dropout=dropout,
        )
        dx = ops.combine(dx, routing) if plan.gather else ops.zero_unrouted(dx, routing)
    return Gradients(dx, dA, dB)


def _fake_linear_backward(
    gradient: Gradient, inputs: Inputs, kept: Kept, routing: Routing, needs: Needs, plan: Plan
) -> Gradients:
    dx = dA = dB = None
    if needs.needs_x:
        dx = torch.empty_like(inputs.x)
    if needs.needs_lora:
        dA, dB = pair_like(inputs.lora_A, inputs.lora_B)
    return Gradients(dx, dA, dB)


def _linear_gradients(
    backward: Callable[..., Gradients],
    dy: torch.Tensor,
    asked: Any,
    inputs: Inputs,
    kept: Kept,
    routing: Routing,
    plan: Plan,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of the first fields of `Inputs`, in the dtypes of these fields."""
    needs = Needs(asked.x, asked.lora_A or asked.lora_B)
    found = backward(Gradient(dy), inputs, kept, routing, needs, plan)
    dA = as_stored(found.lora_A, inputs.lora_A)
    dB = as_stored(found.lora_B, inputs.lora_B)
    return found.x, dA, dB


def _pair(inputs: Inputs, plan: Plan) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """A as [E, r, K] and B as [E, N, r]."""
    return spread(
        inputs.lora_A, inputs.lora_B, inputs.weight.shape[0], plan.experts, inputs.x.dtype
    )


def _dropout(inputs: Inputs, plan: Plan) -> Dropout | None:
    if inputs.seed is None:
        return None
    return Dropout(plan.dropout_p, inputs.seed)


_linear = differentiable(
    Operator("expert_linear", (Inputs, Routing, Plan), Results, _run_linear, _fake_linear),
    Operator(
        "expert_linear_backward",
        (Gradient, Inputs, Kept, Routing, Needs, Plan),
        Gradients,
        _run_linear_backward,
        _fake_linear_backward,
    ),
    _keep_linear,
    _linear_gradients,
)


# ---- combine


class Rows(NamedTuple):
    """y [M, N], rows in expert order, and top_k_weights [T, top_k]; both get a gradient."""

    y: torch.Tensor
    top_k_weights: torch.Tensor


class Combined(NamedTuple):
    """out [T, N]."""

    out: torch.Tensor


def _run_combine(rows: Rows, routing: Routing, backend: Backend) -> Combined:
    ops = ops_for(backend.backend, rows.y.device)
    return Combined(ops.combine(rows.y, routing, rows.top_k_weights))


def _fake_combine(rows: Rows, routing: Routing, backend: Backend) -> Combined:
    return Combined(rows.y.new_empty(rows.top_k_weights.shape[0], rows.y.shape[1]))


def _keep_combine(
    rows: Rows, routing: Routing, backend: Backend, combined: Combined
) -> tuple[Rows, Routing, Backend]:
    return rows, routing, backend


def _run_combine_backward(
    gradient: Gradient, rows: Rows, routing: Routing, backend: Backend
) -> Rows:
    ops = ops_for(backend.backend, rows.y.device)
    dy, dweights = ops.combine_backward(gradient.gradient, rows.y, routing, rows.top_k_weights)
    return Rows(ops.zero_unrouted(dy, routing), dweights)


def _fake_combine_backward(
    gradient: Gradient, rows: Rows, routing: Routing, backend: Backend
) -> Rows:
    dtype = torch.promote_types(rows.y.dtype, torch.float32)
    dweights = rows.top_k_weights.new_empty(rows.top_k_weights.shape, dtype=dtype)
    return Rows(rows.y.new_empty(rows.y.shape), dweights)


def _combine_gradients(
    backward: Callable[..., Rows],
    dout: torch.Tensor,
    asked: Any,
    rows: Rows,
    routing: Routing,
    backend: Backend,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    found = backward(Gradient(dout), rows, routing, backend)
    return found.y, as_stored(found.top_k_weights, rows.top_k_weights)


_combine = differentiable(
    Operator("combine", (Rows, Routing, Backend), Combined, _run_combine, _fake_combine),
    Operator(
        "combine_backward",
        (Gradient, Rows, Routing, Backend),
        Rows,
        _run_combine_backward,
        _fake_combine_backward,
    ),
    _keep_combine,
    _combine_gradients,
)
