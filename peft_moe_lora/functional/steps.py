"""out = combine(post_norm(down(act(gate_up(x))))) in steps of autograd, around an activation of the model's own.

gate_up and down are W[e] x + bias[e] + scaling * B[e] A[e] drop(x); routing, they and combine are an operator each.
"""

import torch

from ..ops import Dropout, Routing
from .backends import ops_for
from .operators import (
    ROUTING,
    as_stored,
    define,
    flat,
    routing_of,
    save_for_backward,
    saved_for_backward,
)
from .projection import Projection, gathered, gradient_like, per_expert, spread, whole_gradients


def unfused_experts(x, top_k_index, top_k_weights, up, down, activation, post_norm, seed, backend):
    """`functional.experts` of x [T, H] in the dtype of the weights; seed [2, 2] int64, a row each for up and down."""
    routing = route(top_k_index, up.weight.shape[0], backend)
    pre = [expert_linear(x, half, routing, seed, 0, backend, gather=True) for half in up.halves()]
    pre = pre[0] if len(pre) == 1 else torch.cat(pre, -1)
    y = expert_linear(activation(pre), down, routing, seed, 1, backend)
    if post_norm is not None:
        y = post_norm(y)
    return _combine(y, top_k_weights, *flat(routing), backend).to(x.dtype)


def route(top_k_index: torch.Tensor, num_experts: int, backend: str) -> Routing:
    """The routing of top_k_index [T, top_k]; compiled, without the tile table."""
    if torch.compiler.is_compiling():
        index = torch.ops.peft_moe_lora.route(top_k_index, num_experts, backend)
        return Routing.from_tensors(index, top_k_index.shape[1], 0)
    return ops_for(backend, top_k_index.device).route(top_k_index, num_experts)


def expert_linear(
    x, projection: Projection, routing: Routing, seed, nth: int, backend: str, gather: bool = False
):
    """y[m] = W[e] x[m] + bias[e] + scaling * B[e] A[e] drop(x[m]); row m reads token row_token[m] where gather.

    `seed` [2, 2] int64, whose row `nth` draws the mask; None without dropout.
    """
    p = projection
    seed = seed[nth, :1] if p.dropout_p else None
    return _linear(
        x.to(p.weight.dtype), p.lora_A, p.lora_B, p.weight, p.bias, seed, *flat(routing),
        p.scaling, p.dropout_p, gather, backend, p.experts,
    )[0]  # fmt: skip


# ------------------------------------------------------------------------------------------------------- the operators


def _route_op(top_k_index, num_experts, backend):
    # the tile table's size is the device's business; whoever needs the table makes it from the offsets
    return ops_for(backend, top_k_index.device).route(top_k_index, num_experts).tensors()[:4]


def _route_fake(top_k_index, num_experts, backend):
    M = top_k_index.numel()
    return [top_k_index.new_empty(n, dtype=torch.int32) for n in (num_experts + 1, M, M, M)]


def _linear_op(x, lora_A, lora_B, weight, bias, seed, *rest):
    scaling, dropout_p, gather, backend, experts = rest[7:]
    ops = ops_for(backend, x.device)
    routing = ops.with_tiles(routing_of(*rest[:7]))
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
    return x.new_empty(M, N), x.new_empty(0) if lora_A is None else x.new_empty(
        M, lora_A.shape[0] // held
    )


def _linear_backward_op(dy, x, lora_A, lora_B, weight, seed, xa, needs_x, needs_lora, *rest):
    scaling, dropout_p, gather, backend, experts = rest[7:]
    ops, dropout = ops_for(backend, x.device), Dropout(dropout_p, seed) if dropout_p else None
    routing = ops.with_tiles(routing_of(*rest[:7]))
    A, B = spread(lora_A, lora_B, weight.shape[0], experts, x.dtype)
    dx = dA = dB = yb = None
    if needs_lora:
        dA, dB = whole_gradients(lora_A, lora_B, weight.shape[0], experts)
        A_out, B_out = per_expert(dA, dB, weight.shape[0])
        yb = ops.expert_shrink_outer(dy, B.transpose(1, 2), xa, routing, scaling, B_out)
        ops.expert_outer(yb, x, routing, A_out, gather_right=gather, dropout=dropout)
        dA, dB = gathered(dA, dB, weight.shape[0], experts)
    elif A is not None:
        yb = ops.expert_shrink(dy, B.transpose(1, 2), routing, scaling)
    if needs_x:
        transposed_A = None if A is None else A.transpose(1, 2)
        dx = ops.expert_linear(
            dy, weight.transpose(1, 2), routing, xa=yb, lora_B=transposed_A, dropout=dropout
        )
        dx = ops.combine(dx, routing) if gather else dx
    return tuple(dy.new_empty(0) if g is None else g for g in (dx, dA, dB))


def _linear_backward_fake(dy, x, lora_A, lora_B, weight, seed, xa, needs_x, needs_lora, *args):
    grads = (
        [gradient_like(lora_A), gradient_like(lora_B)]
        if needs_lora
        else [dy.new_empty(0), dy.new_empty(0)]
    )
    return torch.empty_like(x) if needs_x else dy.new_empty(0), *grads


def _linear_setup_context(ctx, inputs, output):
    x, lora_A, lora_B, weight, _, seed, *index = inputs[:11]
    ctx.scalars = inputs[11:]
    save_for_backward(ctx, x, lora_A, lora_B, weight, seed, output[1], *index)


def _linear_autograd(ctx, dy, _):
    x, lora_A, lora_B, weight, seed, xa, *index = saved_for_backward(ctx)
    needs_x, needs_A, needs_B = ctx.needs_input_grad[:3]
    needs_lora = needs_A or needs_B
    # a quantized weight is no operator's argument
    backward = (
        _linear_backward_op if ctx.quantized else torch.ops.peft_moe_lora.expert_linear_backward
    )
    dx, dA, dB = backward(
        dy.contiguous(),
        x,
        lora_A,
        lora_B,
        weight,
        seed,
        xa,
        needs_x,
        needs_lora,
        *index,
        *ctx.scalars,
    )
    loras = (as_stored(dA, lora_A), as_stored(dB, lora_B)) if needs_lora else (None, None)
    return dx if needs_x else None, *loras, *[None] * (8 + len(ctx.scalars))


def _combine_op(y, top_k_weights, *rest):
    return ops_for(rest[-1], y.device).combine(y, routing_of(*rest[:-1]), top_k_weights)


def _combine_fake(y, top_k_weights, *args):
    return y.new_empty(top_k_weights.shape[0], y.shape[1])


def _combine_backward_op(dout, y, top_k_weights, *rest):
    return ops_for(rest[-1], y.device).combine_backward(
        dout, y, routing_of(*rest[:-1]), top_k_weights
    )


def _combine_backward_fake(dout, y, top_k_weights, *args):
    dtype = torch.promote_types(y.dtype, torch.float32)
    return y.new_empty(y.shape), top_k_weights.new_empty(top_k_weights.shape, dtype=dtype)


def _combine_setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.scalars = inputs[7:]


def _combine_autograd(ctx, dout):
    y, top_k_weights, *index = ctx.saved_tensors
    dy, dweights = torch.ops.peft_moe_lora.combine_backward(
        dout.contiguous(), y, top_k_weights, *index, *ctx.scalars
    )
    return dy, dweights.to(top_k_weights.dtype), *[None] * (5 + len(ctx.scalars))


_LINEAR = "float scaling, float dropout_p, bool gather, str backend, int[]? experts"

define(
    "route",
    "(Tensor top_k_index, int num_experts, str backend) -> Tensor[]",
    _route_op,
    _route_fake,
)
_linear = define(
    "expert_linear",
    "(Tensor x, Tensor? lora_A, Tensor? lora_B, Tensor weight, Tensor? bias, Tensor? seed, "
    f"{ROUTING}, {_LINEAR}) -> (Tensor, Tensor)",
    _linear_op, _linear_fake, _linear_autograd, _linear_setup_context,
)  # fmt: skip
define(
    "expert_linear_backward",
    "(Tensor dy, Tensor x, Tensor? lora_A, Tensor? lora_B, Tensor weight, Tensor? seed, Tensor xa, "
    f"bool needs_x, bool needs_lora, {ROUTING}, {_LINEAR}) -> (Tensor, Tensor, Tensor)",
    _linear_backward_op, _linear_backward_fake,
)  # fmt: skip
_combine = define(
    "combine", f"(Tensor y, Tensor top_k_weights, {ROUTING}, str backend) -> Tensor",
    _combine_op, _combine_fake, _combine_autograd, _combine_setup_context,
)  # fmt: skip
define(
    "combine_backward",
    f"(Tensor dout, Tensor y, Tensor top_k_weights, {ROUTING}, str backend) -> (Tensor, Tensor)",
    _combine_backward_op, _combine_backward_fake,
)  # fmt: skip
