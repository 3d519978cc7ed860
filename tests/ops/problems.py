"""What the kernels' tests share: shapes, random problems, and the rule a kernel is held to."""

from dataclasses import dataclass

import pytest
import torch

from peft_moe_lora.ops import Activation, reference
from peft_moe_lora.ops.ranks import as_stored_rank

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not HOPPER, reason="wgmma is compute capability 9.0's alone")
# the interpreter multiplies bf16 tiles wrongly
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if CUDA else [])]
# fp32: the kernels sum in order and take the fast exponential
ATOL = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Shape:
    """One row of the table of shapes, and why it is there."""

    T: int
    E: int
    top_k: int
    H: int
    I: int  # noqa: E741
    r: int
    why: str


SHAPES = [
    Shape(24, 3, 2, 32, 32, 16, "everything even"),
    Shape(19, 4, 3, 40, 24, 6, "no multiple of any block, odd rank, for the copy engine"),
    Shape(11, 3, 2, 19, 21, 5, "odd strides, which the copy engine refuses"),
    Shape(1, 8, 2, 32, 16, 1, "one token, empty experts, rank 1"),
    Shape(9, 1, 1, 32, 16, 4, "one expert"),
    Shape(7, 6, 6, 32, 16, 4, "every expert for every token"),
    Shape(70, 2, 1, 32, 16, 80, "rank past the width, many rows an expert"),
    Shape(3, 12, 2, 16, 16, 3, "more experts than rows"),
]
GPU_SHAPES = [
    Shape(512, 8, 4, 512, 256, 16, "full tiles"),
    Shape(700, 3, 2, 520, 264, 24, "tiles with half a tail"),
    Shape(333, 16, 4, 200, 136, 256, "largest rank"),
    Shape(65, 128, 8, 256, 128, 64, "a few rows an expert"),
]
if CUDA:
    SHAPES = SHAPES + GPU_SHAPES
SMALL = [SHAPES[1], SHAPES[3], *SHAPES[8:]]
MANY = Shape(40, 512, 8, 32, 16, 3, "the most experts")
ACTIVATIONS = [
    Activation(),
    Activation("gelu_tanh"),
    Activation("gelu"),
    Activation("relu2", gated=False),
    Activation("silu", gated=False),
    Activation("silu", interleaved=True, limit=0.8, alpha=1.702, up_shift=1.0),
    Activation("silu", limit=0.5),
]
# fmt: off
# rows of the first experts, for chunks of 64 and of 128 rows: none, one, a chunk that is cut, full,
# and one row longer; then many chunks
CUT_ROWS = [
    0, 1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 255, 256, 257, 319, 320, 321, 384, 385,
    640, 641, 9000,
]
# fmt: on


def ids(shape):
    return "-".join(str(v) for v in (shape.T, shape.E, shape.top_k, shape.H, shape.I, shape.r))


shapes = pytest.mark.parametrize("shape", SHAPES, ids=ids)
small_shapes = pytest.mark.parametrize("shape", SMALL, ids=ids)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
# For tests that compile many kernels. On a GPU float16 is a slow duplicate there: its kernels are
# those of bfloat16 but for one conversion.
_COMPILED = [
    pytest.param(dtype, marks=pytest.mark.long)
    if dtype == torch.float16 and torch.bfloat16 in DTYPES
    else dtype
    for dtype in DTYPES
]
dtypes_compiled = pytest.mark.parametrize("dtype", _COMPILED, ids=lambda d: str(d)[6:])


def random(*size, dtype=torch.float32, scale=1.0):
    return (torch.randn(*size) * scale).to(DEVICE, dtype)


class Problem:
    """Random routing with sentinels, and one experts layer's tensors; unrouted rows are NaN."""

    def __init__(self, shape: Shape, dtype, sentinels=True, skew=False):
        self.shape, self.dtype = shape, dtype
        T, E, top_k, r = shape.T, shape.E, shape.top_k, shape.r
        index = torch.rand(T, E).argsort(1)[:, :top_k]
        if skew:
            index[: T * 9 // 10] = 0
        if sentinels and T > 2:
            index[1, 0], index[2, -1] = -1, E + 3
        self.index = index.to(DEVICE)
        self.routing = reference.route(self.index, E)
        self.valid = int(self.routing.expert_offsets[-1])
        self.M = T * top_k
        self.x = random(T, shape.H, dtype=dtype)
        self.weights = torch.rand(T, top_k).to(DEVICE)
        self.up, self.down = self.matrix(2 * shape.I, shape.H), self.matrix(shape.H, shape.I)
        self.up_bias, self.down_bias = (
            random(E, 2 * shape.I, dtype=dtype),
            random(E, shape.H, dtype=dtype),
        )
        self.up_A, self.up_B = self.lora(2 * shape.I, shape.H)
        self.down_A, self.down_B = self.lora(shape.H, shape.I)
        self.xa = self.rank_rows(r)

    def matrix(self, N, K):
        return random(self.shape.E, N, K, dtype=self.dtype, scale=K**-0.5)

    def lora(self, N, K):
        """A [E, r, K] and B [E, N, r], views of expert-major parameters; B A x is of order one."""
        E, r = self.shape.E, self.shape.r
        A, B = random(r * E, K, scale=K**-0.5), random(N, r * E, scale=r**-0.5)
        return A.view(E, r, K), B.view(N, E, r).permute(1, 0, 2)

    def rows(self, width):
        """[M, width] rows in expert order, of order one; unrouted rows are NaN."""
        rows = random(self.M, width, dtype=self.dtype)
        rows[self.valid :] = float("nan")
        return rows

    def rank_rows(self, r):
        """[M, R] rows of rank r in expert order; unrouted rows are NaN."""
        rows = rank_rows(self.M, r, self.dtype)
        rows[self.valid :] = float("nan")
        return rows


def rank_rows(M, r, dtype=torch.float32):
    """Random rows [M, R] of rank r, as kernels store them: zeros follow the r columns."""
    return as_stored_rank(random(M, r, dtype=dtype))


def wide(value):
    """A float tensor in fp64; anything else unchanged."""
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def outputs(ops, name, *args, **kwargs):
    out = getattr(ops, name)(*args, **kwargs)
    return out if isinstance(out, tuple) else (out,)


def check(kernels, name, problem, *args, **kwargs):
    """Hold kernel `name` against its twin by the rule, over the routed rows."""
    twin = outputs(reference, name, *args, **kwargs)
    exact = outputs(
        reference, name, *(wide(a) for a in args), **{k: wide(v) for k, v in kwargs.items()}
    )
    # last: a kernel may write its result over an argument
    actual = outputs(kernels, name, *args, **kwargs)
    for a, t, e in zip(actual, twin, exact, strict=True):
        assert a.shape == t.shape
        if (
            name not in ("combine", "expert_act_backward", "combine_backward")
            or a.shape[0] == problem.M
        ):
            a, t, e = (v[: problem.valid] for v in (a, t, e))
        assert_within(a, t, e, problem.dtype)
    return actual


def assert_within(actual, twin, exact, dtype):
    assert not actual.isnan().any()
    exact = exact.double()
    error, allowed = (actual.double() - exact).abs(), (twin.double() - exact).abs()
    for measure in (torch.linalg.vector_norm, torch.amax if exact.numel() else torch.sum):
        scale = measure(exact.abs())
        assert measure(error) <= 2 * measure(allowed) + ATOL[dtype] * scale, (
            measure(error),
            measure(allowed),
            scale,
        )


def out_of(E, K, r, of_B):
    """An out [E, K, r] full of NaN; with `of_B` it is a view of an expert-major B [K, r * E]."""
    size = (K, E, r) if of_B else (E, K, r)
    out = torch.full(size, float("nan"), device=DEVICE)
    return out.permute(1, 0, 2) if of_B else out


def layer(
    ops,
    x,
    index,
    weights,
    up,
    down,
    up_A,
    up_B,
    down_A,
    down_B,
    up_bias,
    down_bias,
    dout,
    activation,
):
    """Forward and backward of one experts layer by its operations: out, dx, every gradient."""
    routing = ops.route(index, up.shape[0])
    xa = ops.expert_shrink(x, up_A, routing, 0.5, gather=True)
    pre, act = ops.expert_linear_act(
        x, up, routing, activation, bias=up_bias, xa=xa, lora_B=up_B, gather=True
    )
    ha = ops.expert_shrink(act, down_A, routing, 0.5)
    y = ops.expert_linear(act, down, routing, bias=down_bias, xa=ha, lora_B=down_B)
    out = ops.combine(y, routing, weights)

    yb2 = ops.expert_shrink(dout, down_B.transpose(1, 2), routing, 0.5, gather=True)
    draw = ops.expert_linear(
        dout, down.transpose(1, 2), routing, xa=yb2, lora_B=down_A.transpose(1, 2), gather=True
    )
    dpre, act, dweights = ops.expert_act_backward(
        draw, pre, routing, activation, weights, dout=dout, bias=down_bias
    )
    yb1 = ops.expert_shrink(dpre, up_B.transpose(1, 2), routing, 0.5)
    dx = ops.combine(
        ops.expert_linear(dpre, up.transpose(1, 2), routing, xa=yb1, lora_B=up_A.transpose(1, 2)),
        routing,
    )
    wide = torch.promote_types(x.dtype, torch.float32)
    grads = [t.new_empty(t.shape, dtype=wide) for t in (up_A, up_B, down_A, down_B)]
    ops.expert_outer(yb1, x, routing, grads[0], gather_right=True)
    ops.expert_outer(dpre, xa, routing, grads[1])
    ops.expert_outer(yb2, act, routing, grads[2], row_weights=weights)
    ops.expert_outer(dout, ha, routing, grads[3], row_weights=weights, gather_left=True)
    return out, dx, dweights, *grads


def layer_arguments(problem, activation):
    p = problem
    adapter = p.up_A, p.up_B, p.down_A, p.down_B
    dout = random(*p.x.shape, dtype=p.dtype)
    biases = p.up_bias, p.down_bias
    return p.x, p.index, p.weights, p.up, p.down, *adapter, *biases, dout, activation
