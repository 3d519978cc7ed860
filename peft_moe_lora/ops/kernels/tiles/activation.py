"""act = f(gate) * (up + up_shift) and its gradient, computed in fp32 on tiles in registers.

ACT holds the fields of `Activation`, whose methods are the twins. LIMIT is None if nothing is
clamped. A new kind of activation needs a branch in `_f_and_df` and a branch in `Activation`.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _approximate(x, INSTRUCTION: tl.constexpr):
    """A PTX instruction with one fp32 operand, applied to every element."""
    return tl.inline_asm_elementwise(
        INSTRUCTION + " $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _sigmoid(x):
    """1 / (1 + 2^(-x log2 e)) by approximate instructions with a relative error of 2^-22.

    These instructions flush denormals to 0. Triton's exp and division handle denormals: they scale
    their operand and then their result, which took a quarter of the instructions of an activation's
    gradient.
    """
    if INTERPRETED:
        return tl.sigmoid(x)
    power = _approximate(x * -1.4426950408889634, "ex2.approx.ftz.f32")
    return _approximate(1.0 + power, "rcp.approx.ftz.f32")


@triton.jit
def _f_and_df(x, ACT):
    """f(x) and f'(x); the compiler drops the one that the caller does not use."""
    if ACT.KIND == "silu":
        sigmoid = _sigmoid(ACT.ALPHA * x)
        f = x * sigmoid
        df = sigmoid * (1.0 + ACT.ALPHA * x * (1.0 - sigmoid))
    elif ACT.KIND == "relu2":
        relu = tl.maximum(x, 0.0)
        f = relu * relu
        df = 2.0 * relu
    elif ACT.KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        f = x * cdf
        df = cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        tl.static_assert(ACT.KIND == "gelu_tanh", "the kernels do not have this kind of activation")
        # tanh(z) = 2 sigmoid(2 z) - 1
        tanh = 2.0 * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x)) - 1.0
        f = 0.5 * x * (1.0 + tanh)
        df = 0.5 * (1.0 + tanh) + 0.3989422804014327 * x * (1.0 - tanh * tanh) * (
            1.0 + 0.134145 * x * x
        )
    return f, df


@triton.jit
def activate(gate, up, ACT):
    """act [M, I] from gate and up [M, I]."""
    if ACT.LIMIT is not None:
        gate = tl.minimum(gate, ACT.LIMIT)
        up = tl.minimum(tl.maximum(up, -ACT.LIMIT), ACT.LIMIT)
    f, _ = _f_and_df(gate, ACT)
    return f * (up + ACT.UP_SHIFT)


@triton.jit
def activate_plain(pre, ACT):
    """act [M, I] from an ungated pre-activation [M, I]."""
    f, _ = _f_and_df(pre, ACT)
    return f


@triton.jit
def activate_backward(gate, up, dact, ACT):
    """(act, dgate, dup) from gate, up and dact, all [M, I]; clamped values get gradient 0."""
    raw_gate = gate
    raw_up = up
    if ACT.LIMIT is not None:
        gate = tl.minimum(gate, ACT.LIMIT)
        up = tl.minimum(tl.maximum(up, -ACT.LIMIT), ACT.LIMIT)
    f, df = _f_and_df(gate, ACT)
    act = f * (up + ACT.UP_SHIFT)
    dgate = dact * df * (up + ACT.UP_SHIFT)
    dup = dact * f
    if ACT.LIMIT is not None:
        dgate = tl.where(raw_gate > ACT.LIMIT, 0.0, dgate)
        dup = tl.where(tl.abs(raw_up) > ACT.LIMIT, 0.0, dup)
    return act, dgate, dup


@triton.jit
def activate_plain_backward(pre, dact, ACT):
    """(act, dpre) from an ungated pre-activation and dact, all [M, I]."""
    f, df = _f_and_df(pre, ACT)
    return f, dact * df
