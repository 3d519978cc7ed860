"""act = f(gate) * (up + up_shift) and its gradient, on tiles in fp32 registers.

Twin: `activation.Activation`, whose fields are the constexprs here; LIMIT is None for no clamp.
"""

import triton
import triton.language as tl

from ...activation import Activation

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _approximate(x, INSTRUCTION: tl.constexpr):
    return tl.inline_asm_elementwise(
        INSTRUCTION + " $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _sigmoid(x):
    """1 / (1 + 2^(-x log2 e)) by instructions whose relative error is 2^-22, and which take denormals for 0: to scale
    these there and back, as Triton's own exp and division do, is a quarter of what an activation's gradient takes."""
    if INTERPRETED:
        return tl.sigmoid(x)
    return _approximate(
        1.0 + _approximate(x * -1.4426950408889634, "ex2.approx.ftz.f32"), "rcp.approx.ftz.f32"
    )


@triton.jit
def _f_and_df(x, KIND: tl.constexpr, ALPHA: tl.constexpr):
    """f(x) and f'(x); whichever the caller leaves unused is not computed."""
    if KIND == "silu":
        sigmoid = _sigmoid(ALPHA * x)
        f = x * sigmoid
        df = sigmoid * (1.0 + ALPHA * x * (1.0 - sigmoid))
    elif KIND == "relu2":
        relu = tl.maximum(x, 0.0)
        f = relu * relu
        df = 2.0 * relu
    elif KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        f = x * cdf
        df = cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        tl.static_assert(KIND == "gelu_tanh", "an activation the kernels do not know")
        # tanh(z) = 2 sigmoid(2 z) - 1
        tanh = 2.0 * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x)) - 1.0
        f = 0.5 * x * (1.0 + tanh)
        df = 0.5 * (1.0 + tanh) + 0.3989422804014327 * x * (1.0 - tanh * tanh) * (
            1.0 + 0.134145 * x * x
        )
    return f, df


@triton.jit
def activate(
    gate, up, KIND: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, UP_SHIFT: tl.constexpr
):
    """act [M, I] from gate and up [M, I]."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    f, _ = _f_and_df(gate, KIND, ALPHA)
    return f * (up + UP_SHIFT)


@triton.jit
def activate_plain(pre, KIND: tl.constexpr, ALPHA: tl.constexpr):
    """act [M, I] from an ungated pre-activation [M, I]."""
    f, _ = _f_and_df(pre, KIND, ALPHA)
    return f


@triton.jit
def activate_backward(
    gate,
    up,
    dact,
    KIND: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    UP_SHIFT: tl.constexpr,
):
    """(act, dgate, dup) from gate, up and dact, all [M, I]; zero gradient where a clamp bites."""
    raw_gate, raw_up = gate, up
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    f, df = _f_and_df(gate, KIND, ALPHA)
    act = f * (up + UP_SHIFT)
    dgate, dup = dact * df * (up + UP_SHIFT), dact * f
    if LIMIT is not None:
        dgate = tl.where(raw_gate > LIMIT, 0.0, dgate)
        dup = tl.where(tl.abs(raw_up) > LIMIT, 0.0, dup)
    return act, dgate, dup


@triton.jit
def activate_plain_backward(pre, dact, KIND: tl.constexpr, ALPHA: tl.constexpr):
    """(act, dpre) of an ungated pre-activation."""
    f, df = _f_and_df(pre, KIND, ALPHA)
    return f, dact * df


def activation_constants(activation: Activation) -> dict:
    """The constexprs that say an activation to a kernel."""
    return {
        "KIND": activation.kind, "GATED": activation.gated, "INTERLEAVED": activation.interleaved,
        "LIMIT": activation.limit, "ALPHA": activation.alpha, "UP_SHIFT": activation.up_shift,
    }  # fmt: skip
