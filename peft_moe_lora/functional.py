"""out[t] = sum over slots of top_k_weights * down(act(gate_up(x[t]))), each projection W + scaling * B A per expert.

The one door to `ops`: backends are chosen and gradients written out behind it. The base weights are frozen: none of
these functions forms a gradient for them, and none materialises W + scaling * B A.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from .backends import BACKENDS, ops_for, select_backend
from .ops import Activation, Dropout, QuantizedWeight, Routing
from .projection import Projection, gathered, gradient_like, per_expert, spread, whole_gradients, whole_pair

__all__ = [
    "BACKENDS",
    "Projection",
    "experts",
    "gathered",
    "per_expert",
    "rows_linear",
    "select_backend",
    "spread",
    "whole_gradients",
]


@dataclass(frozen=True)
class _Plan:
    """What of a fused call is not a tensor; flat, because a custom operator takes it as plain arguments."""

    activation: Activation
    backend: str
    recompute: bool
    up_scaling: float
    down_scaling: float
    up_dropout: float
    down_dropout: float
    up_experts: Sequence[int] | None
    down_experts: Sequence[int] | None

    def scalars(self) -> tuple:
        a = self.activation
        return (
            a.kind, a.gated, a.interleaved, a.limit, a.alpha, a.up_shift, self.backend, self.recompute,
            self.up_scaling, self.down_scaling, self.up_dropout, self.down_dropout, self.up_experts, self.down_experts,
        )  # fmt: skip

    @classmethod
    def from_scalars(cls, *scalars) -> "_Plan":
        return cls(Activation(*scalars[:6]), *scalars[6:])


def experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    up: Projection,
    down: Projection,
    activation: Activation | Callable[[torch.Tensor], torch.Tensor],
    *,
    post_norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
    backend: str = "auto",
    recompute: bool = False,
) -> torch.Tensor:
    """A whole experts layer, forward and backward.

    Args:
        hidden_states: [T, H] float; computed in the dtype of the weights.
        top_k_index: [T, top_k] integer; an id outside 0..E-1 is skipped.
        top_k_weights: [T, top_k] float; receives its gradient.
        up: the gate_up projection, [E, N, H] with N = 2I where gated.
        down: the down projection, [E, H, I].
        activation: an `Activation` runs inside the kernels; any other callable [M, N] -> [M, I] runs between them.
        post_norm: applied to the down rows [M, H] before the routing weights.
        backend: out of BACKENDS.
        recompute: keep nothing [M, N] wide for backward; costs the gate_up product once more. Fused path only.
    Returns: [T, H], dtype of hidden_states.
    Raises:
        ValueError: if the shapes do not agree, or a frozen weight asks for a gradient.
    """
    _check(hidden_states, top_k_index, top_k_weights, up, down)
    quantized = isinstance(up.weight, QuantizedWeight) or isinstance(down.weight, QuantizedWeight)
    run = _run_uncompiled if quantized and torch.compiler.is_compiling() else _run
    return run(hidden_states, top_k_index, top_k_weights, up, down, activation, post_norm, backend, recompute)


def _run(hidden_states, top_k_index, top_k_weights, up, down, activation, post_norm, backend, recompute):
    x = hidden_states.to(up.weight.dtype)
    seed = _draw_seeds(x.device) if up.dropout_p or down.dropout_p else None
    with _on_device_of(x), _without_autocast(x.device.type):
        if isinstance(activation, Activation) and post_norm is None and up.up_weight is None:
            plan = _Plan(
                activation, backend, recompute, up.scaling, down.scaling, up.dropout_p, down.dropout_p, up.experts,
                down.experts,
            )  # fmt: skip
            fused = _compiled_experts if torch.compiler.is_compiling() else _FusedExperts.apply
            out = fused(
                x, top_k_weights, up.lora_A, up.lora_B, down.lora_A, down.lora_B,
                top_k_index, up.weight, up.bias, down.weight, down.bias, seed, plan,
            )  # fmt: skip
        else:
            out = _unfused_experts(x, top_k_index, top_k_weights, up, down, activation, post_norm, seed, backend)
    return out.to(hidden_states.dtype)


# an operator's arguments are tensors, and codes with their scales are more than one
_run_uncompiled = torch.compiler.disable(_run)


def rows_linear(x: torch.Tensor, expert_size, projection: Projection, *, backend: str = "auto") -> torch.Tensor:
    """y[m] = W[e] x[m] + bias[e] + scaling * B[e] A[e] x[m]: one projection of rows that stand in expert order.

    Args:
        x: [M, K] float; computed in the dtype of the weights.
        expert_size: E integers, the rows of each expert, adding up to M; a list or a tensor.
        projection: [E, N, K].
        backend: out of BACKENDS.
    Returns: [M, N], dtype of x.
    Raises:
        ValueError: if the shapes do not agree, or a frozen weight asks for a gradient.
    """
    E, _, K = projection.weight.shape
    sizes = torch.as_tensor(expert_size, device=x.device)
    if x.ndim != 2 or x.shape[1] != K or sizes.shape != (E,):
        raise ValueError(
            f"rows_linear needs x [M, {K}] and {E} expert sizes; got {tuple(x.shape)} and {tuple(sizes.shape)}."
        )
    _check_frozen(projection)
    seed = _draw_seeds(x.device) if projection.dropout_p else None
    with _on_device_of(x), _without_autocast(x.device.type):
        expert = torch.repeat_interleave(torch.arange(E, device=x.device), sizes, output_size=x.shape[0])
        y = _expert_linear(x, projection, _route(expert[:, None], E, backend), seed, 0, backend)
    return y.to(x.dtype)


# ------------------------------------------------------------------------------------------------ the fused path


def _forward(x, top_k_weights, up_A, up_B, down_A, down_B, top_k_index, up, up_bias, down, down_bias, seed, plan):
    """Returns: out [T, H], pre [M, N], xa and ha [M, r] (None without adapter), and the routing as `_flat`."""
    ops = ops_for(plan.backend, x.device)
    (up_A, up_B), (down_A, down_B) = per_expert(up_A, up_B, up.shape[0]), per_expert(down_A, down_B, up.shape[0])
    up_drop, down_drop = _dropouts(plan, seed)
    routing = ops.route(top_k_index, up.shape[0])
    xa = ha = None
    if up_A is not None:
        xa = ops.expert_shrink(x, up_A, routing, plan.up_scaling, gather=True, dropout=up_drop)
    pre, act = ops.expert_linear_act(x, up, routing, plan.activation, bias=up_bias, xa=xa, lora_B=up_B, gather=True)
    if down_A is not None:
        ha = ops.expert_shrink(act, down_A, routing, plan.down_scaling, dropout=down_drop)
    y = ops.expert_linear(act, down, routing, bias=down_bias, xa=ha, lora_B=down_B)
    return ops.combine(y, routing, top_k_weights), pre, xa, ha, *_flat(routing)


def _backward(
    dout, x, top_k_weights, up_A, up_B, down_A, down_B, up, up_bias, down, down_bias, seed, pre, xa, ha,
    expert_offsets, row_token, row_slot, slot_row, tiles, top_k, block_m, plan, needs_x, needs_up, needs_down,
):  # fmt: skip
    """Returns: dx, d_top_k_weights, dA and dB of up, dA and dB of down; None where not needed."""
    ops = ops_for(plan.backend, x.device)
    routing = _routing(expert_offsets, row_token, row_slot, slot_row, tiles, top_k, block_m)
    up_drop, down_drop = _dropouts(plan, seed)
    E = up.shape[0]
    gradients = [
        gradient_like(t) if needed else None
        for t, needed in ((up_A, needs_up), (up_B, needs_up), (down_A, needs_down), (down_B, needs_down))
    ]
    (dup_A, dup_B), (ddown_A, ddown_B) = per_expert(*gradients[:2], E), per_expert(*gradients[2:], E)
    (up_A, up_B), (down_A, down_B) = per_expert(up_A, up_B, E), per_expert(down_A, down_B, E)
    dx = yb = None
    if pre is None:
        pre = ops.expert_linear(x, up, routing, bias=up_bias, xa=xa, lora_B=up_B, gather=True)
    if down_A is not None:
        yb = ops.expert_shrink(dout, down_B.transpose(1, 2), routing, plan.down_scaling, gather=True)
    down_AT = None if down_A is None else down_A.transpose(1, 2)
    draw = ops.expert_linear(
        dout, down.transpose(1, 2), routing, xa=yb, lora_B=down_AT, gather=True, dropout=down_drop
    )
    dpre, act, dweights = ops.expert_act_backward(
        draw, pre, routing, plan.activation, top_k_weights, dout=dout, bias=down_bias
    )
    del draw
    if needs_down:
        ops.expert_outer(yb, act, routing, ddown_A, row_weights=top_k_weights, dropout=down_drop)
        ops.expert_outer(dout, ha, routing, ddown_B, row_weights=top_k_weights, gather_left=True)
    del act
    yb = None
    if up_A is not None and (needs_x or needs_up):
        yb = ops.expert_shrink(dpre, up_B.transpose(1, 2), routing, plan.up_scaling)
    if needs_up:
        ops.expert_outer(yb, x, routing, dup_A, gather_right=True, dropout=up_drop)
        ops.expert_outer(dpre, xa, routing, dup_B)
    if needs_x:
        lora_B = None if up_A is None else up_A.transpose(1, 2)
        rows = ops.expert_linear(dpre, up.transpose(1, 2), routing, xa=yb, lora_B=lora_B, dropout=up_drop)
        dx = ops.combine(rows, routing)
    return dx, dweights, *gradients


def _run_forward(x, top_k_weights, up_A, up_B, down_A, down_B, top_k_index, up, up_bias, down, down_bias, seed, plan):
    """`_forward` for adapters of some experts too."""
    E = up.shape[0]
    return ops_for(plan.backend, x.device).replayed(
        _forward, x, top_k_weights, *whole_pair(up_A, up_B, E, plan.up_experts, x.dtype),
        *whole_pair(down_A, down_B, E, plan.down_experts, x.dtype), top_k_index, up, up_bias, down, down_bias, seed,
        plan,
    )  # fmt: skip


def _run_backward(dout, x, top_k_weights, up_A, up_B, down_A, down_B, up, up_bias, down, *rest):
    """`_backward` for adapters of some experts too."""
    E, plan = up.shape[0], rest[-4]
    dx, dweights, dup_A, dup_B, ddown_A, ddown_B = ops_for(plan.backend, x.device).replayed(
        _backward, dout, x, top_k_weights, *whole_pair(up_A, up_B, E, plan.up_experts, x.dtype),
        *whole_pair(down_A, down_B, E, plan.down_experts, x.dtype), up, up_bias, down, *rest,
    )  # fmt: skip
    return (
        dx, dweights, *gathered(dup_A, dup_B, E, plan.up_experts), *gathered(ddown_A, ddown_B, E, plan.down_experts)
    )  # fmt: skip


class _FusedExperts(torch.autograd.Function):
    """Keeps, beyond the inputs: the pre-activation (not with recompute), two rank-wide tensors, index tensors."""

    @staticmethod
    def forward(ctx, *args):
        x, top_k_weights, up_A, up_B, down_A, down_B, _, up, up_bias, down, down_bias, seed, plan = args
        out, pre, xa, ha, *index, top_k, block_m = _run_forward(*args)
        ctx.plan, ctx.top_k, ctx.block_m = plan, top_k, block_m
        _save(
            ctx, x, top_k_weights, up_A, up_B, down_A, down_B, up, up_bias, down, down_bias, seed,
            None if plan.recompute else pre, xa, ha, *index,
        )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        saved = _saved(ctx)
        needs_x, _, up_A, up_B, down_A, down_B = ctx.needs_input_grad[:6]
        grads = _run_backward(
            dout.contiguous(), *saved, ctx.top_k, ctx.block_m, ctx.plan, needs_x, up_A or up_B, down_A or down_B
        )
        return *(_as(g, t) for g, t in zip(grads, saved[:6], strict=True)), *[None] * 7


# ------------------------------------------------------------------- the fused path under torch.compile: one operator


def _compiled_experts(*args):
    *tensors, plan = args
    return torch.ops.peft_moe_lora.experts(*tensors, *plan.scalars())[0]


def _experts_op(
    x, top_k_weights, up_A, up_B, down_A, down_B, top_k_index, up, up_bias, down, down_bias, seed, *scalars
):
    plan = _Plan.from_scalars(*scalars)
    out, pre, xa, ha, *index = _run_forward(
        x, top_k_weights, up_A, up_B, down_A, down_B, top_k_index, up, up_bias, down, down_bias, seed, plan
    )
    # an operator returns tensors only, and none that aliases another
    kept = [x.new_empty(0) if t is None else t for t in (None if plan.recompute else pre, xa, ha)]
    return out, *kept, index[:4]


def _experts_fake(x, top_k_weights, up_A, up_B, down_A, down_B, top_k_index, up, *args):
    plan, M = _Plan.from_scalars(*args[4:]), top_k_index.numel()
    pre = x.new_empty((0,) if plan.recompute else (M, up.shape[1]))
    xa, ha = (
        x.new_empty(0) if A is None else x.new_empty(M, A.shape[0] // (up.shape[0] if chosen is None else len(chosen)))
        for A, chosen in ((up_A, plan.up_experts), (down_A, plan.down_experts))
    )
    index = [x.new_empty(n, dtype=torch.int32) for n in (up.shape[0] + 1, M, M, M)]
    return torch.empty_like(x), pre, xa, ha, index


def _experts_backward_op(dout, x, top_k_weights, up_A, up_B, down_A, down_B, up, up_bias, down, down_bias, seed, pre,
                         xa, ha, index, top_k, needs_x, needs_up, needs_down, *scalars):  # fmt: skip
    plan = _Plan.from_scalars(*scalars)
    grads = _run_backward(
        dout, x, top_k_weights, up_A, up_B, down_A, down_B, up, up_bias, down, down_bias, seed,
        None if plan.recompute else pre, None if up_A is None else xa, None if down_A is None else ha,
        *index, None, top_k, 0, plan, needs_x, needs_up, needs_down,
    )  # fmt: skip
    return tuple(dout.new_empty(0) if g is None else g for g in grads)


def _experts_backward_fake(dout, x, top_k_weights, up_A, up_B, down_A, down_B, *args):
    needs_x, needs_up, needs_down = args[10:13]
    dweights = top_k_weights.new_empty(top_k_weights.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    grads = [torch.empty_like(x) if needs_x else x.new_empty(0), dweights]
    for A, B, needs in ((up_A, up_B, needs_up), (down_A, down_B, needs_down)):
        grads += [gradient_like(A), gradient_like(B)] if needs else [x.new_empty(0), x.new_empty(0)]
    return tuple(grads)


def _experts_setup_context(ctx, inputs, output):
    tensors, ctx.scalars = inputs[:12], inputs[12:]
    x, top_k_weights, up_A, up_B, down_A, down_B, top_k_index, up, up_bias, down, down_bias, seed = tensors
    _, pre, xa, ha, index = output
    ctx.top_k = top_k_index.shape[1]
    ctx.save_for_backward(
        x, top_k_weights, up_A, up_B, down_A, down_B, up, up_bias, down, down_bias, seed, pre, xa, ha, *index
    )


def _experts_autograd(ctx, dout, *_):
    needs_x, _, up_A, up_B, down_A, down_B = ctx.needs_input_grad[:6]
    saved = ctx.saved_tensors
    kept, index = saved[:14], saved[14:]
    needs = (needs_x, up_A or up_B, down_A or down_B)
    grads = torch.ops.peft_moe_lora.experts_backward(
        dout.contiguous(), *kept, list(index), ctx.top_k, *needs, *ctx.scalars
    )
    wanted = (needs[0], True, needs[1], needs[1], needs[2], needs[2])
    grads = [_as(g, t) if wanted_ else None for g, t, wanted_ in zip(grads, kept[:6], wanted, strict=True)]
    return *grads, *[None] * (6 + len(ctx.scalars))


# ------------------------------------- the path around an activation of the model's: operators, eager or under compile


def _unfused_experts(x, top_k_index, top_k_weights, up, down, activation, post_norm, seed, backend):
    routing = _route(top_k_index, up.weight.shape[0], backend)
    pre = [_expert_linear(x, half, routing, seed, 0, backend, gather=True) for half in up.halves()]
    pre = pre[0] if len(pre) == 1 else torch.cat(pre, -1)
    y = _expert_linear(activation(pre), down, routing, seed, 1, backend)
    if post_norm is not None:
        y = post_norm(y)
    return _combine(y, top_k_weights, *_flat(routing), backend).to(x.dtype)


def _route(top_k_index: torch.Tensor, num_experts: int, backend: str) -> Routing:
    if torch.compiler.is_compiling():
        index = torch.ops.peft_moe_lora.route(top_k_index, num_experts, backend)
        return Routing.from_tensors(index, top_k_index.shape[1], 0)
    return ops_for(backend, top_k_index.device).route(top_k_index, num_experts)


def _expert_linear(x, projection: Projection, routing: Routing, seed, nth: int, backend: str, gather: bool = False):
    """y[m] = W[e] x[m] + bias[e] + scaling * B[e] A[e] drop(x[m]); row m reads token row_token[m] where gather."""
    p = projection
    seed = seed[nth, :1] if p.dropout_p else None
    return _linear(
        x.to(p.weight.dtype), p.lora_A, p.lora_B, p.weight, p.bias, seed, *_flat(routing),
        p.scaling, p.dropout_p, gather, backend, p.experts,
    )[0]  # fmt: skip


def _flat(routing: Routing) -> tuple:
    """A routing as an operator takes it."""
    r = routing
    return r.expert_offsets, r.row_token, r.row_slot, r.slot_row, r.tiles, r.top_k, r.block_m


def _routing(offsets, row_token, row_slot, slot_row, tiles, top_k, block_m) -> Routing:
    """The inverse of `_flat`."""
    return Routing(offsets, row_token, row_slot, slot_row, top_k, tiles, block_m)


def _route_op(top_k_index, num_experts, backend):
    # the tile table's size is the device's business; whoever needs the table makes it from the offsets
    return ops_for(backend, top_k_index.device).route(top_k_index, num_experts).tensors()[:4]


def _route_fake(top_k_index, num_experts, backend):
    M = top_k_index.numel()
    return [top_k_index.new_empty(n, dtype=torch.int32) for n in (num_experts + 1, M, M, M)]


def _linear_op(x, lora_A, lora_B, weight, bias, seed, *rest):
    routing, (scaling, dropout_p, gather, backend, experts) = _routing(*rest[:7]), rest[7:]
    ops = ops_for(backend, x.device)
    A, B = spread(lora_A, lora_B, weight.shape[0], experts, x.dtype)
    xa = None
    if A is not None:
        dropout = Dropout(dropout_p, seed) if dropout_p else None
        xa = ops.expert_shrink(x, A, routing, scaling, gather=gather, dropout=dropout)
    y = ops.expert_linear(x, weight, routing, bias=bias, xa=xa, lora_B=B, gather=gather)
    return y, x.new_empty(0) if xa is None else xa


def _linear_fake(x, lora_A, lora_B, weight, bias, seed, offsets, row_token, *args):
    (E, N, _), M = weight.shape, row_token.shape[0]
    held = E if args[-1] is None else len(args[-1])
    return x.new_empty(M, N), x.new_empty(0) if lora_A is None else x.new_empty(M, lora_A.shape[0] // held)


def _linear_backward_op(dy, x, lora_A, lora_B, weight, seed, xa, needs_x, needs_lora, *rest):
    routing, (scaling, dropout_p, gather, backend, experts) = _routing(*rest[:7]), rest[7:]
    ops, dropout = ops_for(backend, x.device), Dropout(dropout_p, seed) if dropout_p else None
    A, B = spread(lora_A, lora_B, weight.shape[0], experts, x.dtype)
    dx = dA = dB = yb = None
    if A is not None:
        yb = ops.expert_shrink(dy, B.transpose(1, 2), routing, scaling)
    if needs_lora:
        dA, dB = whole_gradients(lora_A, lora_B, weight.shape[0], experts)
        A_out, B_out = per_expert(dA, dB, weight.shape[0])
        ops.expert_outer(yb, x, routing, A_out, gather_right=gather, dropout=dropout)
        ops.expert_outer(dy, xa, routing, B_out)
        dA, dB = gathered(dA, dB, weight.shape[0], experts)
    if needs_x:
        transposed_A = None if A is None else A.transpose(1, 2)
        dx = ops.expert_linear(dy, weight.transpose(1, 2), routing, xa=yb, lora_B=transposed_A, dropout=dropout)
        dx = ops.combine(dx, routing) if gather else dx
    return tuple(dy.new_empty(0) if g is None else g for g in (dx, dA, dB))


def _linear_backward_fake(dy, x, lora_A, lora_B, weight, seed, xa, needs_x, needs_lora, *args):
    grads = [gradient_like(lora_A), gradient_like(lora_B)] if needs_lora else [dy.new_empty(0), dy.new_empty(0)]
    return torch.empty_like(x) if needs_x else dy.new_empty(0), *grads


def _linear_setup_context(ctx, inputs, output):
    x, lora_A, lora_B, weight, _, seed, *index = inputs[:11]
    ctx.scalars = inputs[11:]
    _save(ctx, x, lora_A, lora_B, weight, seed, output[1], *index)


def _linear_autograd(ctx, dy, _):
    x, lora_A, lora_B, weight, seed, xa, *index = _saved(ctx)
    needs_x, needs_A, needs_B = ctx.needs_input_grad[:3]
    needs_lora = needs_A or needs_B
    # a quantized weight is no operator's argument
    backward = _linear_backward_op if ctx.quantized else torch.ops.peft_moe_lora.expert_linear_backward
    dx, dA, dB = backward(
        dy.contiguous(), x, lora_A, lora_B, weight, seed, xa, needs_x, needs_lora, *index, *ctx.scalars
    )
    loras = (_as(dA, lora_A), _as(dB, lora_B)) if needs_lora else (None, None)
    return dx if needs_x else None, *loras, *[None] * (8 + len(ctx.scalars))


def _combine_op(y, top_k_weights, *rest):
    return ops_for(rest[-1], y.device).combine(y, _routing(*rest[:-1]), top_k_weights)


def _combine_fake(y, top_k_weights, *args):
    return y.new_empty(top_k_weights.shape[0], y.shape[1])


def _combine_backward_op(dout, y, top_k_weights, *rest):
    return ops_for(rest[-1], y.device).combine_backward(dout, y, _routing(*rest[:-1]), top_k_weights)


def _combine_backward_fake(dout, y, top_k_weights, *args):
    dtype = torch.promote_types(y.dtype, torch.float32)
    return y.new_empty(y.shape), top_k_weights.new_empty(top_k_weights.shape, dtype=dtype)


def _combine_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.scalars = inputs[7:]


def _combine_autograd(ctx, dout):
    y, top_k_weights, *index = ctx.saved_tensors
    dy, dweights = torch.ops.peft_moe_lora.combine_backward(dout.contiguous(), y, top_k_weights, *index, *ctx.scalars)
    return dy, dweights.to(top_k_weights.dtype), *[None] * (5 + len(ctx.scalars))


# ------------------------------------------------------------------------------------------------------ the operators

_SCALARS = (
    "str kind, bool gated, bool interleaved, float? limit, float alpha, float up_shift, str backend, bool recompute, "
    "float up_scaling, float down_scaling, float up_dropout, float down_dropout, int[]? up_experts, "
    "int[]? down_experts"
)
_LORAS = "Tensor? up_A, Tensor? up_B, Tensor? down_A, Tensor? down_B"
_WEIGHTS = "Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, Tensor? seed"
_ROUTING = (
    "Tensor expert_offsets, Tensor row_token, Tensor row_slot, Tensor slot_row, Tensor? tiles, int top_k, int block_m"
)
_LINEAR = "float scaling, float dropout_p, bool gather, str backend, int[]? experts"


def _define(name: str, signature: str, run: Callable, fake: Callable, autograd=None, setup_context=None) -> Callable:
    """An operator for any device under torch.compile; eager, the same functions without the operator's overhead.

    Args:
        run: from the arguments to new tensors.
        fake: the same, of shapes alone.
        autograd, setup_context: its backward, and what that keeps.
    Returns: the call.
    """
    qualified = f"peft_moe_lora::{name}"
    torch.library.define(qualified, signature)
    torch.library.impl(qualified, "default", run)
    torch.library.register_fake(qualified, fake)
    operator, eager = getattr(torch.ops.peft_moe_lora, name), run
    if autograd is not None:
        torch.library.register_autograd(qualified, autograd, setup_context=setup_context)
        parts = {"forward": run, "setup_context": setup_context, "backward": once_differentiable(autograd)}
        eager = type(name, (torch.autograd.Function,), {k: staticmethod(f) for k, f in parts.items()}).apply
    return lambda *args: (operator if torch.compiler.is_compiling() else eager)(*args)


_define(
    "experts",
    f"(Tensor x, Tensor top_k_weights, {_LORAS}, Tensor top_k_index, {_WEIGHTS}, {_SCALARS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _experts_op, _experts_fake, _experts_autograd, _experts_setup_context,
)  # fmt: skip
_define(
    "experts_backward",
    f"(Tensor dout, Tensor x, Tensor top_k_weights, {_LORAS}, {_WEIGHTS}, Tensor pre, Tensor xa, Tensor ha, "
    f"Tensor[] index, int top_k, bool needs_x, bool needs_up, bool needs_down, {_SCALARS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _experts_backward_op, _experts_backward_fake,
)  # fmt: skip
_define("route", "(Tensor top_k_index, int num_experts, str backend) -> Tensor[]", _route_op, _route_fake)
_linear = _define(
    "expert_linear",
    "(Tensor x, Tensor? lora_A, Tensor? lora_B, Tensor weight, Tensor? bias, Tensor? seed, "
    f"{_ROUTING}, {_LINEAR}) -> (Tensor, Tensor)",
    _linear_op, _linear_fake, _linear_autograd, _linear_setup_context,
)  # fmt: skip
_define(
    "expert_linear_backward",
    "(Tensor dy, Tensor x, Tensor? lora_A, Tensor? lora_B, Tensor weight, Tensor? seed, Tensor xa, "
    f"bool needs_x, bool needs_lora, {_ROUTING}, {_LINEAR}) -> (Tensor, Tensor, Tensor)",
    _linear_backward_op, _linear_backward_fake,
)  # fmt: skip
_combine = _define(
    "combine", f"(Tensor y, Tensor top_k_weights, {_ROUTING}, str backend) -> Tensor",
    _combine_op, _combine_fake, _combine_autograd, _combine_setup_context,
)  # fmt: skip
_define(
    "combine_backward",
    f"(Tensor dout, Tensor y, Tensor top_k_weights, {_ROUTING}, str backend) -> (Tensor, Tensor)",
    _combine_backward_op, _combine_backward_fake,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- helpers


def _check(hidden_states, top_k_index, top_k_weights, up: Projection, down: Projection) -> None:
    E, _, H = up.weight.shape
    if hidden_states.ndim != 2 or hidden_states.shape[1] != H or down.weight.shape[:2] != (E, H):
        raise ValueError(
            f"experts needs hidden_states [T, H], gate_up [E, N, H] and down [E, H, I]; got "
            f"{[tuple(t.shape) for t in (hidden_states, up.weight, down.weight)]}."
        )
    if top_k_index.shape != top_k_weights.shape or top_k_index.shape[:1] != hidden_states.shape[:1]:
        raise ValueError(
            f"experts needs top_k_index and top_k_weights [T, top_k] with T = {hidden_states.shape[0]}; got "
            f"{tuple(top_k_index.shape)} and {tuple(top_k_weights.shape)}."
        )
    _check_frozen(up, down)


def _check_frozen(*projections: Projection) -> None:
    frozen = [t for p in projections for t in (p.weight, p.up_weight, p.bias)]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in frozen):
        raise ValueError(
            "the experts' base weights are frozen and get no gradient here, but one has requires_grad=True; "
            "call requires_grad_(False) on it, or train it without an adapter on these experts."
        )


def _on_device_of(x: torch.Tensor):
    """Kernels start on the current device, which need not be the one this layer of a spread-out model lies on."""
    # compiled code sets the device itself
    if torch.compiler.is_compiling() or not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device_of(x)


def _without_autocast(device_type: str):
    """The operations fix their own dtypes: autocast would round inside them."""
    enabled = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if enabled else nullcontext()


def _draw_seeds(device: torch.device) -> torch.Tensor:
    """[2, 2] int64, a seed a row, from the default generator: recomputation under checkpointing repeats the masks."""
    # rows of sixteen bytes, on which kernels want their tensors to begin
    return torch.randint(2**31 - 1, (2, 2), device=device)


def _dropouts(plan: _Plan, seed: torch.Tensor | None) -> tuple[Dropout | None, Dropout | None]:
    up = Dropout(plan.up_dropout, seed[0, :1]) if plan.up_dropout else None
    down = Dropout(plan.down_dropout, seed[1, :1]) if plan.down_dropout else None
    return up, down


def _save(ctx, *values) -> None:
    """`save_for_backward`; quantized weights, which are the model's own, stay as they are."""
    ctx.quantized = {i: v for i, v in enumerate(values) if isinstance(v, QuantizedWeight)}
    ctx.save_for_backward(*(None if i in ctx.quantized else v for i, v in enumerate(values)))


def _saved(ctx) -> tuple:
    """What `_save` was given."""
    saved = ctx.saved_tensors  # once: under checkpointing each reading unpacks, and may recompute
    return tuple(ctx.quantized.get(i, t) for i, t in enumerate(saved)) if ctx.quantized else saved


def _as(gradient: torch.Tensor | None, like: torch.Tensor | None) -> torch.Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)
