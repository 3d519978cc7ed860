"""out = combine(down(act(gate_up(x)))) as one step of autograd, for an activation that the kernels have.

gate_up and down are W[e] x + bias[e] + scaling * B[e] A[e] drop(x); under torch.compile the layer is one operator.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable

from ..ops import Activation, Dropout
from .backends import ops_for
from .operators import as_stored, define, flat, routing_of, save_for_backward, saved_for_backward
from .projection import Projection, gathered, gradient_like, per_expert, whole_pair


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
    """`functional.experts` of x [T, H] in the dtype of the weights; seed [2, 2] int64, a row each for up and down."""
    plan = _Plan(
        activation, backend, recompute, up.scaling, down.scaling, up.dropout_p, down.dropout_p, up.experts,
        down.experts,
    )  # fmt: skip
    fused = _compiled_experts if torch.compiler.is_compiling() else _FusedExperts.apply
    return fused(
        x, top_k_weights, up.lora_A, up.lora_B, down.lora_A, down.lora_B,
        top_k_index, up.weight, up.bias, down.weight, down.bias, seed, plan,
    )  # fmt: skip


def _forward(
    x,
    top_k_weights,
    up_A,
    up_B,
    down_A,
    down_B,
    top_k_index,
    up,
    up_bias,
    down,
    down_bias,
    seed,
    plan,
):
    """Returns: out [T, H], pre [M, N], xa and ha [M, r] (None without adapter), and the routing as `flat`."""
    ops = ops_for(plan.backend, x.device)
    (up_A, up_B), (down_A, down_B) = (
        per_expert(up_A, up_B, up.shape[0]),
        per_expert(down_A, down_B, up.shape[0]),
    )
    up_drop, down_drop = _dropouts(plan, seed)
    routing = ops.route(top_k_index, up.shape[0])
    xa = ha = None
    if up_A is not None:
        xa = ops.expert_shrink(x, up_A, routing, plan.up_scaling, gather=True, dropout=up_drop)
    pre, act = ops.expert_linear_act(
        x, up, routing, plan.activation, bias=up_bias, xa=xa, lora_B=up_B, gather=True
    )
    if down_A is not None:
        ha = ops.expert_shrink(act, down_A, routing, plan.down_scaling, dropout=down_drop)
    y = ops.expert_linear(act, down, routing, bias=down_bias, xa=ha, lora_B=down_B)
    return ops.combine(y, routing, top_k_weights), pre, xa, ha, *flat(routing)


def _backward(
    dout, x, top_k_weights, up_A, up_B, down_A, down_B, up, up_bias, down, down_bias, seed, pre, xa, ha,
    expert_offsets, row_token, row_slot, slot_row, tiles, top_k, block_m, plan, needs_x, needs_up, needs_down,
):  # fmt: skip
    """Returns: dx, d_top_k_weights, dA and dB of up, dA and dB of down; None where not needed."""
    ops = ops_for(plan.backend, x.device)
    routing = ops.with_tiles(
        routing_of(expert_offsets, row_token, row_slot, slot_row, tiles, top_k, block_m)
    )
    up_drop, down_drop = _dropouts(plan, seed)
    E = up.shape[0]
    gradients = [
        gradient_like(t) if needed else None
        for t, needed in (
            (up_A, needs_up),
            (up_B, needs_up),
            (down_A, needs_down),
            (down_B, needs_down),
        )
    ]
    (dup_A, dup_B), (ddown_A, ddown_B) = (
        per_expert(*gradients[:2], E),
        per_expert(*gradients[2:], E),
    )
    (up_A, up_B), (down_A, down_B) = per_expert(up_A, up_B, E), per_expert(down_A, down_B, E)
    dx = yb = None
    if pre is None:
        pre = ops.expert_linear(x, up, routing, bias=up_bias, xa=xa, lora_B=up_B, gather=True)
    if needs_down:
        yb = ops.expert_shrink_outer(
            dout, down_B.transpose(1, 2), ha, routing, plan.down_scaling, ddown_B, row_weights=top_k_weights,
            gather=True,
        )  # fmt: skip
    elif down_A is not None:
        yb = ops.expert_shrink(
            dout, down_B.transpose(1, 2), routing, plan.down_scaling, gather=True
        )
    down_AT = None if down_A is None else down_A.transpose(1, 2)
    draw = ops.expert_linear(
        dout, down.transpose(1, 2), routing, xa=yb, lora_B=down_AT, gather=True, dropout=down_drop
    )
    yb, down_yb = None, yb
    activated = {"dout": dout, "bias": down_bias}
    if needs_down and needs_up:
        dpre, yb, dweights = ops.expert_act_backward_outer(
            draw, pre, routing, plan.activation, top_k_weights, down_yb, xa, up_B, plan.up_scaling, ddown_A, dup_B,
            dropout=down_drop, **activated,
        )  # fmt: skip
    else:
        dpre, act, dweights = ops.expert_act_backward(
            draw, pre, routing, plan.activation, top_k_weights, **activated
        )
        if needs_down:
            ops.expert_outer(
                down_yb, act, routing, ddown_A, row_weights=top_k_weights, dropout=down_drop
            )
        if needs_up:
            yb = ops.expert_shrink_outer(
                dpre, up_B.transpose(1, 2), xa, routing, plan.up_scaling, dup_B
            )
        elif up_A is not None and needs_x:
            yb = ops.expert_shrink(dpre, up_B.transpose(1, 2), routing, plan.up_scaling)
        del act
    del draw, down_yb
    if needs_up:
        ops.expert_outer(yb, x, routing, dup_A, gather_right=True, dropout=up_drop)
    if needs_x:
        lora_B = None if up_A is None else up_A.transpose(1, 2)
        rows = ops.expert_linear(
            dpre, up.transpose(1, 2), routing, xa=yb, lora_B=lora_B, dropout=up_drop
        )
        dx = ops.combine(rows, routing)
    return dx, dweights, *gradients


def _dropouts(plan: _Plan, seed: torch.Tensor | None) -> tuple[Dropout | None, Dropout | None]:
    up = Dropout(plan.up_dropout, seed[0, :1]) if plan.up_dropout else None
    down = Dropout(plan.down_dropout, seed[1, :1]) if plan.down_dropout else None
    return up, down


def _run_forward(
    x,
    top_k_weights,
    up_A,
    up_B,
    down_A,
    down_B,
    top_k_index,
    up,
    up_bias,
    down,
    down_bias,
    seed,
    plan,
):
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
        (
            x,
            top_k_weights,
            up_A,
            up_B,
            down_A,
            down_B,
            _,
            up,
            up_bias,
            down,
            down_bias,
            seed,
            plan,
        ) = args
        out, pre, xa, ha, *index, top_k, block_m = _run_forward(*args)
        ctx.plan, ctx.top_k, ctx.block_m = plan, top_k, block_m
        save_for_backward(
            ctx, x, top_k_weights, up_A, up_B, down_A, down_B, up, up_bias, down, down_bias, seed,
            None if plan.recompute else pre, xa, ha, *index,
        )  # fmt: skip
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        saved = saved_for_backward(ctx)
        needs_x, _, up_A, up_B, down_A, down_B = ctx.needs_input_grad[:6]
        grads = _run_backward(
            dout.contiguous(),
            *saved,
            ctx.top_k,
            ctx.block_m,
            ctx.plan,
            needs_x,
            up_A or up_B,
            down_A or down_B,
        )
        return *(as_stored(g, t) for g, t in zip(grads, saved[:6], strict=True)), *[None] * 7


# ------------------------------------------------------------------------------------------------------- the operator


def _compiled_experts(*args):
    *tensors, plan = args
    return torch.ops.peft_moe_lora.experts(*tensors, *plan.scalars())[0]


def _experts_op(
    x,
    top_k_weights,
    up_A,
    up_B,
    down_A,
    down_B,
    top_k_index,
    up,
    up_bias,
    down,
    down_bias,
    seed,
    *scalars,
):
    plan = _Plan.from_scalars(*scalars)
    out, pre, xa, ha, *index = _run_forward(
        x,
        top_k_weights,
        up_A,
        up_B,
        down_A,
        down_B,
        top_k_index,
        up,
        up_bias,
        down,
        down_bias,
        seed,
        plan,
    )
    # an operator returns tensors only, and none that aliases another
    kept = [x.new_empty(0) if t is None else t for t in (None if plan.recompute else pre, xa, ha)]
    return out, *kept, index[:4]


def _experts_fake(x, top_k_weights, up_A, up_B, down_A, down_B, top_k_index, up, *args):
    plan, M = _Plan.from_scalars(*args[4:]), top_k_index.numel()
    pre = x.new_empty((0,) if plan.recompute else (M, up.shape[1]))
    xa, ha = (
        x.new_empty(0)
        if A is None
        else x.new_empty(M, A.shape[0] // (up.shape[0] if chosen is None else len(chosen)))
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
    dweights = top_k_weights.new_empty(
        top_k_weights.shape, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    grads = [torch.empty_like(x) if needs_x else x.new_empty(0), dweights]
    for A, B, needs in ((up_A, up_B, needs_up), (down_A, down_B, needs_down)):
        grads += [gradient_like(A), gradient_like(B)] if needs else [x.new_empty(0), x.new_empty(0)]
    return tuple(grads)


def _experts_setup_context(ctx, inputs, output):
    tensors, ctx.scalars = inputs[:12], inputs[12:]
    (
        x,
        top_k_weights,
        up_A,
        up_B,
        down_A,
        down_B,
        top_k_index,
        up,
        up_bias,
        down,
        down_bias,
        seed,
    ) = tensors
    _, pre, xa, ha, index = output
    ctx.top_k = top_k_index.shape[1]
    ctx.save_for_backward(
        x,
        top_k_weights,
        up_A,
        up_B,
        down_A,
        down_B,
        up,
        up_bias,
        down,
        down_bias,
        seed,
        pre,
        xa,
        ha,
        *index,
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
    grads = [
        as_stored(g, t) if wanted_ else None
        for g, t, wanted_ in zip(grads, kept[:6], wanted, strict=True)
    ]
    return *grads, *[None] * (6 + len(ctx.scalars))


_SCALARS = (
    "str kind, bool gated, bool interleaved, float? limit, float alpha, float up_shift, str backend, bool recompute, "
    "float up_scaling, float down_scaling, float up_dropout, float down_dropout, int[]? up_experts, "
    "int[]? down_experts"
)
_LORAS = "Tensor? up_A, Tensor? up_B, Tensor? down_A, Tensor? down_B"
_WEIGHTS = "Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, Tensor? seed"

define(
    "experts",
    f"(Tensor x, Tensor top_k_weights, {_LORAS}, Tensor top_k_index, {_WEIGHTS}, {_SCALARS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _experts_op, _experts_fake, _experts_autograd, _experts_setup_context,
)  # fmt: skip
define(
    "experts_backward",
    f"(Tensor dout, Tensor x, Tensor top_k_weights, {_LORAS}, {_WEIGHTS}, Tensor pre, Tensor xa, Tensor ha, "
    f"Tensor[] index, int top_k, bool needs_x, bool needs_up, bool needs_down, {_SCALARS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _experts_backward_op, _experts_backward_fake,
)  # fmt: skip
