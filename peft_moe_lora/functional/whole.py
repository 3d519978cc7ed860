"""out = combine(down(act(gate_up(x)))) as one step of autograd, around a fused activation.

gate_up and down are W[e] x + bias[e] + scaling * B[e] A[e] drop(x). If a backward may follow,
forward keeps, beyond its inputs, the pre-activation (unless it is recomputed), two rank-r tensors
and the routing.

Legend:
    up, down: the gate_up and the down projection
    pre [M, N], act [M, I]: the rows before and after the activation
    R columns of rows of rank r: those past r are zeros (`ops.ranks`)
    xa [M, R] = up_scaling * A[e] drop(x), ha [M, R] = down_scaling * A[e] drop(act)
    yb [M, R] = scaling * B[e]^T dy, of up or of down, where dy is the gradient of its output
    draw [M, I]: gradient of act before it is multiplied by the routing weight
    dpre [M, N]: gradient of pre
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..ops import (
    Activation,
    Dropout,
    Operations,
    QuantizedWeight,
    Routing,
    composed,
    table_memory,
)
from ..ops.composed import RankRows
from ..ops.ranks import stored_rank
from .arguments import flatten, unflatten
from .backends import ops_for
from .checkpointing import current_run
from .operators import Gradient, Operator, as_stored, differentiable, is_differentiated
from .projection import Projection, gathered, pair_like, per_expert, rank_of, transposed, whole_pair
from .widths import Widths, computed_widths, with_widths


class Inputs(NamedTuple):
    """The tensors that forward and backward read.

    Attributes:
        x: [T, H], dtype of the weights.
        top_k_weights: [T, top_k] float.
        up_A, up_B, down_A, down_B: as in `Projection`.
        up, up_bias: [E, N, H] and [E, N].
        down, down_bias: [E, H, I] and [E, H].
        seed: [2, 2] int64, the seeds of the masks of up and down in its rows; None without dropout.
    """

    x: torch.Tensor
    top_k_weights: torch.Tensor
    up_A: torch.Tensor | None
    up_B: torch.Tensor | None
    down_A: torch.Tensor | None
    down_B: torch.Tensor | None
    up: torch.Tensor | QuantizedWeight
    up_bias: torch.Tensor | None
    down: torch.Tensor | QuantizedWeight
    down_bias: torch.Tensor | None
    seed: torch.Tensor | None


class Selected(NamedTuple):
    """The experts that the router selected; only forward reads them.

    Attributes:
        top_k_index: [T, top_k] integer.
    """

    top_k_index: torch.Tensor


class Plan(NamedTuple):
    """Settings of a call that are not tensors.

    Attributes:
        backend: one of BACKENDS.
        keeps: whether a backward may follow; if not, forward returns `out` alone.
        recompute: whether backward computes the pre-activation again; if not, forward keeps it.
        up_scaling, up_dropout, up_experts, up_rank_major: as in `Projection`; the same for down.
            With a rank-major B, all experts have an update.
    """

    backend: str
    keeps: bool
    recompute: bool
    up_scaling: float
    down_scaling: float
    up_dropout: float
    down_dropout: float
    up_experts: tuple[int, ...] | None
    down_experts: tuple[int, ...] | None
    up_rank_major: bool
    down_rank_major: bool


class Results(NamedTuple):
    """What forward computes.

    Attributes:
        out: [T, H]. All other fields are None where no backward may follow.
        pre, xa, ha: as in the legend; pre is None with recompute, xa and ha are None without an
            adapter. pre has the widths with which the layer is computed.
        expert_offsets, row_token, row_slot, slot_row: as in `Routing`.
        table: [lines, 2] int32, of `table_memory`, which begins with `tiles` of `Routing`.
    """

    out: torch.Tensor
    pre: torch.Tensor | None
    xa: torch.Tensor | None
    ha: torch.Tensor | None
    expert_offsets: torch.Tensor | None
    row_token: torch.Tensor | None
    row_slot: torch.Tensor | None
    slot_row: torch.Tensor | None
    table: torch.Tensor | None


class Kept(NamedTuple):
    """The fields of `Results` that forward keeps for backward, besides inputs and routing."""

    pre: torch.Tensor | None
    xa: torch.Tensor | None
    ha: torch.Tensor | None


class Needs(NamedTuple):
    """Which gradients are needed: of x, of the pair of up, of the pair of down."""

    needs_x: bool
    needs_up: bool
    needs_down: bool


class Gradients(NamedTuple):
    """The gradients of the first fields of `Inputs`, in their order; None if not needed."""

    x: torch.Tensor | None
    top_k_weights: torch.Tensor
    up_A: torch.Tensor | None
    up_B: torch.Tensor | None
    down_A: torch.Tensor | None
    down_B: torch.Tensor | None


# the fields of `Results` after `out`, where no backward may follow
_NOTHING = (None,) * 8
FORWARD = (Inputs, Selected, Activation, Plan)
BACKWARD = (Gradient, Inputs, Kept, Routing, Needs, Activation, Plan)


def fused_experts(
    x: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    up: Projection,
    down: Projection,
    activation: Activation,
    seed: torch.Tensor | None,
    backend: str,
    recompute: bool,
) -> torch.Tensor:
    """`functional.experts`, for x [T, H] in the dtype of the weights.

    Args:
        seed: [2, 2] int64, the seeds of the masks of up and down in its rows; None without dropout.
    """
    inputs = Inputs(
        x,
        top_k_weights,
        up.lora_A,
        up.lora_B,
        down.lora_A,
        down.lora_B,
        up.weight,
        up.bias,
        down.weight,
        down.bias,
        seed,
    )
    keeps = is_differentiated(inputs)
    plan = Plan(
        backend,
        keeps,
        recompute,
        up.scaling,
        down.scaling,
        up.dropout_p,
        down.dropout_p,
        up.experts,
        down.experts,
        up.rank_major and up.lora_B is not None,
        down.rank_major and down.lora_B is not None,
    )
    groups = (inputs, Selected(top_k_index), activation, plan)
    if not keeps:
        return _OPERATOR(*groups).out
    run = current_run()
    if run is None:
        return _fused_experts(*groups)
    return run.call(_fused_experts, _OPERATOR, *groups)


# ---- forward


def _run_forward(inputs: Inputs, selected: Selected, activation: Activation, plan: Plan) -> Results:
    """`_forward`, also for adapters of only some experts, and for any widths."""
    whole = _of_all_experts(inputs, plan)
    ops = ops_for(plan.backend, inputs.x.device)
    stored = Widths.of(inputs)
    widths = computed_widths(ops, stored, inputs, plan, selected.top_k_index.numel())
    whole = with_widths(whole, activation, stored, widths)
    results = Results(*ops.replayed(_forward, *whole, selected.top_k_index, activation, plan))
    return with_widths(results, activation, widths, stored)


def _forward(*values: Any) -> Results:
    """Compute the layer, with pairs for all experts and with the widths of its arguments.

    Args:
        values: the fields of `Inputs`, then top_k_index, the activation and the plan. A recorded
            call is replayed if the dtypes, shapes and strides of the tensors and all other values
            are the same.
    """
    *tensors, top_k_index, activation, plan = values
    inputs = Inputs(*tensors)
    ops = ops_for(plan.backend, inputs.x.device)
    inputs = _expert_major(ops, inputs, plan)
    up_A, up_B, down_A, down_B = _per_expert(inputs, inputs.up.shape[0])
    up_dropout, down_dropout = _dropouts(inputs, plan)
    table = table_memory(top_k_index, inputs.up.shape[0])
    routing = ops.route(top_k_index, inputs.up.shape[0], table)
    xa = ha = None
    if up_A is not None:
        xa = ops.expert_shrink(
            inputs.x, up_A, routing, plan.up_scaling, gather=True, dropout=up_dropout
        )
    pre, act = ops.expert_linear_act(
        inputs.x,
        inputs.up,
        routing,
        activation,
        bias=inputs.up_bias,
        xa=xa,
        lora_B=up_B,
        gather=True,
        keep_pre=plan.keeps and not plan.recompute,
    )
    if down_A is not None:
        ha = ops.expert_shrink(act, down_A, routing, plan.down_scaling, dropout=down_dropout)
    y = ops.expert_linear(act, inputs.down, routing, bias=inputs.down_bias, xa=ha, lora_B=down_B)
    out = ops.combine(y, routing, inputs.top_k_weights)
    if not plan.keeps:
        return Results(out, *_NOTHING)
    return Results(
        out,
        pre,
        xa,
        ha,
        routing.expert_offsets,
        routing.row_token,
        routing.row_slot,
        routing.slot_row,
        table,
    )


def _fake_forward(
    inputs: Inputs, selected: Selected, activation: Activation, plan: Plan
) -> Results:
    """Tensors of the shapes and dtypes of `_forward`."""
    x = inputs.x
    if not plan.keeps:
        return Results(torch.empty_like(x), *_NOTHING)
    E = inputs.up.shape[0]
    M = selected.top_k_index.numel()
    widths = Widths.of(inputs)
    # on the meta device nothing is computed
    if not x.is_meta:
        widths = computed_widths(ops_for(plan.backend, x.device), widths, inputs, plan, M)

    def rank_r(lora_A: torch.Tensor | None, experts: tuple[int, ...] | None) -> torch.Tensor | None:
        if lora_A is None:
            return None
        return x.new_empty(M, stored_rank(rank_of(lora_A, E, experts)))

    def index(length: int) -> torch.Tensor:
        return x.new_empty(length, dtype=torch.int32)

    return Results(
        torch.empty_like(x),
        None if plan.recompute else x.new_empty(M, activation.columns(widths.I)),
        rank_r(inputs.up_A, plan.up_experts),
        rank_r(inputs.down_A, plan.down_experts),
        index(E + 1),
        index(M),
        index(M),
        index(M),
        table_memory(selected.top_k_index, E),
    )


def _keep(
    inputs: Inputs, selected: Selected, activation: Activation, plan: Plan, results: Results
) -> tuple[Inputs, Kept, Routing, Activation, Plan]:
    """The groups that backward needs.

    Raises:
        RuntimeError: if forward kept nothing.
    """
    _, _, _, _, offsets, row_token, row_slot, slot_row, table = results
    if offsets is None or row_token is None or row_slot is None or slot_row is None:
        raise RuntimeError(
            "A graph of these experts was traced without gradients, so its forward keeps nothing "
            "for a backward, and now a gradient may be asked for. Run the graph under "
            "torch.no_grad(), or trace it again (torch.export, torch.compile, make_fx) with "
            "gradients enabled and with tensors that require them."
        )
    top_k = selected.top_k_index.shape[1]
    routing = Routing(offsets, row_token, row_slot, slot_row, top_k, table)
    return inputs, Kept(results.pre, results.xa, results.ha), routing, activation, plan


# ---- backward


def _run_backward(
    gradient: Gradient,
    inputs: Inputs,
    kept: Kept,
    routing: Routing,
    needs: Needs,
    activation: Activation,
    plan: Plan,
) -> Gradients:
    """`_backward`, also for adapters of only some experts, and for any widths."""
    whole = _of_all_experts(inputs, plan)
    ops = ops_for(plan.backend, inputs.x.device)
    stored = Widths.of(inputs)
    widths = computed_widths(ops, stored, inputs, plan, routing.num_rows)
    whole = with_widths(whole, activation, stored, widths)
    gradient = with_widths(gradient, activation, stored, widths)
    tensors = flatten((gradient, whole, kept, routing))
    found = Gradients(*ops.replayed(_backward, *tensors, needs, activation, plan))
    found = with_widths(found, activation, widths, stored)
    if plan.up_experts is None and plan.down_experts is None:
        return found
    E = inputs.up.shape[0]
    up_A, up_B = gathered(found.up_A, found.up_B, E, plan.up_experts)
    down_A, down_B = gathered(found.down_A, found.down_B, E, plan.down_experts)
    return Gradients(found.x, found.top_k_weights, up_A, up_B, down_A, down_B)


def _backward(*values: Any) -> Gradients:
    """Compute the gradients of the layer, with pairs for all experts.

    Args:
        values: the fields of `Gradient`, `Inputs`, `Kept` and `Routing`, then the needs, the
            activation and the plan. A recorded call is replayed as in `_forward`.
    """
    *tensors, needs, activation, plan = values
    (dout,), inputs, kept, routing = unflatten((Gradient, Inputs, Kept, Routing), tensors)
    ops = ops_for(plan.backend, inputs.x.device)
    routing = ops.with_tiles(routing)
    new = _new_gradients(inputs, needs)
    inputs = _expert_major(ops, inputs, plan)
    up_A, up_B, down_A, down_B = _per_expert(inputs, inputs.up.shape[0])
    up_dropout, down_dropout = _dropouts(inputs, plan)
    dup_A, dup_B, ddown_A, ddown_B = _per_expert(new, inputs.up.shape[0])
    pre = kept.pre
    if pre is None:
        pre = ops.expert_linear(
            inputs.x, inputs.up, routing, bias=inputs.up_bias, xa=kept.xa, lora_B=up_B, gather=True
        )

    down_yb = composed.expert_shrink_outer(
        ops, dout, transposed(down_B), kept.ha, routing, plan.down_scaling, ddown_B,
        row_weights=inputs.top_k_weights, gather=True,
    )  # fmt: skip
    draw = ops.expert_linear(
        dout, inputs.down.transpose(1, 2), routing, xa=down_yb, lora_B=transposed(down_A),
        gather=True, dropout=down_dropout,
    )  # fmt: skip
    needs_yb = needs.needs_x or needs.needs_up
    rows = RankRows(down_yb, ddown_A, kept.xa, up_B if needs_yb else None, plan.up_scaling, dup_B)
    # only `rows` refers to it from here on, so its memory is freed after the operation
    del down_yb
    dpre, yb, dweights = composed.expert_act_backward_outer(
        ops, draw, pre, routing, activation, inputs.top_k_weights, rows,
        dout=dout, bias=inputs.down_bias, dropout=down_dropout,
    )  # fmt: skip
    del draw, rows
    dx = None
    if needs.needs_up:
        assert yb is not None and dup_A is not None, "no pair, no gradients"
        ops.expert_outer(yb, inputs.x, routing, dup_A, gather_right=True, dropout=up_dropout)
    if needs.needs_x:
        dx_rows = ops.expert_linear(
            dpre, inputs.up.transpose(1, 2), routing, xa=yb, lora_B=transposed(up_A),
            dropout=up_dropout,
        )  # fmt: skip
        dx = ops.combine(dx_rows, routing)
    return Gradients(dx, dweights, *_as_given(ops, new, plan, inputs.up.shape[0]))


def _fake_backward(
    gradient: Gradient,
    inputs: Inputs,
    kept: Kept,
    routing: Routing,
    needs: Needs,
    activation: Activation,
    plan: Plan,
) -> Gradients:
    """Tensors of the shapes and dtypes of `_run_backward`."""
    top_k_weights = inputs.top_k_weights
    dtype = torch.promote_types(inputs.x.dtype, torch.float32)
    dx = torch.empty_like(inputs.x) if needs.needs_x else None
    new = _new_gradients(inputs, needs)
    return Gradients(
        dx,
        top_k_weights.new_empty(top_k_weights.shape, dtype=dtype),
        new.up_A,
        new.up_B,
        new.down_A,
        new.down_B,
    )


def _gradients(
    backward: Callable[..., Gradients],
    dout: torch.Tensor,
    asked: Any,
    inputs: Inputs,
    kept: Kept,
    routing: Routing,
    activation: Activation,
    plan: Plan,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of the first fields of `Inputs`, in the dtypes of these fields.

    Args:
        backward: `_run_backward`, or its operator.
        dout: [T, H], gradient of out.
        asked: an `Inputs` of booleans: whether the gradient of each field is needed.
        inputs, kept, routing, activation, plan: the groups that `_keep` returned.
    """
    needs = Needs(asked.x, asked.up_A or asked.up_B, asked.down_A or asked.down_B)
    found = backward(Gradient(dout), inputs, kept, routing, needs, activation, plan)
    # the gradients stand in the order of the first inputs
    return tuple(as_stored(g, t) for g, t in zip(found, inputs, strict=False))


# ---- what both directions need


class Pairs(NamedTuple):
    """A and B of both projections, expert-major or viewed per expert; None without an adapter."""

    up_A: torch.Tensor | None
    up_B: torch.Tensor | None
    down_A: torch.Tensor | None
    down_B: torch.Tensor | None


def _of_all_experts(inputs: Inputs, plan: Plan) -> Inputs:
    """The inputs with pairs for all E experts, and zeros for experts without an update."""
    if plan.up_experts is None and plan.down_experts is None:
        return inputs
    E = inputs.up.shape[0]
    dtype = inputs.x.dtype
    up_A, up_B = whole_pair(inputs.up_A, inputs.up_B, E, plan.up_experts, dtype)
    down_A, down_B = whole_pair(inputs.down_A, inputs.down_B, E, plan.down_experts, dtype)
    return inputs._replace(up_A=up_A, up_B=up_B, down_A=down_A, down_B=down_B)


def _expert_major(ops: Operations, inputs: Inputs, plan: Plan) -> Inputs:
    """The inputs with expert-major Bs. What was rank-major is in the dtype of x afterwards."""
    dtype = inputs.x.dtype
    found = {}
    for name in _rank_major(plan):
        lora_B = getattr(inputs, name)
        found[name] = ops.transpose_columns(lora_B, lora_B.shape[1] // inputs.up.shape[0], dtype)
    return inputs._replace(**found)


def _as_given(ops: Operations, gradients: Pairs, plan: Plan, num_experts: int) -> Pairs:
    """The gradients of the pairs, those of the Bs in the order in which these were given."""
    found = {}
    for name in _rank_major(plan):
        dB = getattr(gradients, name)
        if dB is not None:
            found[name] = ops.transpose_columns(dB, num_experts, dB.dtype)
    return gradients._replace(**found)


def _rank_major(plan: Plan) -> list[str]:
    """The fields of `Pairs` that hold a rank-major B."""
    chosen = {"up_B": plan.up_rank_major, "down_B": plan.down_rank_major}
    return [name for name, rank_major in chosen.items() if rank_major]


def _per_expert(pairs: Inputs | Pairs, num_experts: int) -> Pairs:
    """A as [E, r, K] and B as [E, N, r] of both projections."""
    return Pairs(
        *per_expert(pairs.up_A, pairs.up_B, num_experts),
        *per_expert(pairs.down_A, pairs.down_B, num_experts),
    )


def _new_gradients(inputs: Inputs, needs: Needs) -> Pairs:
    """Uninitialised gradients of the pairs, expert-major; None if they are not needed."""
    up_A = up_B = down_A = down_B = None
    if needs.needs_up:
        up_A, up_B = pair_like(inputs.up_A, inputs.up_B)
    if needs.needs_down:
        down_A, down_B = pair_like(inputs.down_A, inputs.down_B)
    return Pairs(up_A, up_B, down_A, down_B)


def _dropouts(inputs: Inputs, plan: Plan) -> tuple[Dropout | None, Dropout | None]:
    """The dropout of x, and the dropout of act."""
    if inputs.seed is None:
        return None, None
    up = down = None
    if plan.up_dropout:
        up = Dropout(plan.up_dropout, inputs.seed[0, :1])
    if plan.down_dropout:
        down = Dropout(plan.down_dropout, inputs.seed[1, :1])
    return up, down


_OPERATOR = Operator("experts", FORWARD, Results, _run_forward, _fake_forward)
_fused_experts = differentiable(
    _OPERATOR,
    Operator("experts_backward", BACKWARD, Gradients, _run_backward, _fake_backward),
    _keep,
    _gradients,
)
