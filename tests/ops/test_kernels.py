"""Every kernel computes what its twin says, on every shape, with NaN in every row that nobody routed.

The rule: the error against fp64 is at most twice that of the twin at the same dtype (plain PyTorch, rounding at the
same places), plus ATOL of the largest value for sums whose twin happens to be nearly exact.
"""

from dataclasses import dataclass

import pytest
import torch

from peft_moe_lora.ops import Activation, Dropout, reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
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


def ids(shape):
    return "-".join(str(v) for v in (shape.T, shape.E, shape.top_k, shape.H, shape.I, shape.r))


shapes = pytest.mark.parametrize("shape", SHAPES, ids=ids)
small_shapes = pytest.mark.parametrize("shape", SMALL, ids=ids)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture
def kernels():
    from peft_moe_lora.ops import kernels

    return kernels


def random(*size, dtype=torch.float32, scale=1.0):
    return (torch.randn(*size) * scale).to(DEVICE, dtype)


class Problem:
    """Random routing with sentinels, and the tensors of one experts layer; what nobody routed is NaN."""

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
        self.xa = self.rows(r)

    def matrix(self, N, K):
        return random(self.shape.E, N, K, dtype=self.dtype, scale=K**-0.5)

    def lora(self, N, K):
        """A [E, r, K] and B [E, N, r] over their expert-major parameters, so scaled that B A x is of order one."""
        E, r = self.shape.E, self.shape.r
        A, B = random(r * E, K, scale=K**-0.5), random(N, r * E, scale=r**-0.5)
        return A.view(E, r, K), B.view(N, E, r).permute(1, 0, 2)

    def rows(self, width):
        """[M, width] rows in expert order, of order one; those nobody routed are NaN."""
        rows = random(self.M, width, dtype=self.dtype)
        rows[self.valid :] = float("nan")
        return rows


def wide(value):
    """A float tensor in fp64; what is no float tensor, as it is."""
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def outputs(ops, name, *args, **kwargs):
    out = getattr(ops, name)(*args, **kwargs)
    return out if isinstance(out, tuple) else (out,)


def check(kernels, name, problem, *args, **kwargs):
    """Hold kernel `name` against its twin by the rule, over the rows somebody routed."""
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


def test_the_two_backends_offer_the_same_operations(kernels):
    assert sorted(kernels.__all__) == sorted(reference.__all__)


# ---------------------------------------------------------------------------------------------------------- routing


@pytest.mark.parametrize("shape", [*SHAPES, MANY], ids=ids)
@pytest.mark.parametrize("skew", [False, True])
def test_route_is_the_stable_sort(kernels, shape, skew):
    problem = Problem(shape, torch.float32, skew=skew)
    routing, twin = kernels.route(problem.index, shape.E), problem.routing
    for name in ("expert_offsets", "row_token", "row_slot", "slot_row", "top_k"):
        actual, expected = getattr(routing, name), getattr(twin, name)
        assert torch.equal(actual, expected) if torch.is_tensor(actual) else actual == expected, (
            name
        )


@shapes
def test_tiles_cover_every_routed_row_once(kernels, shape):
    problem = Problem(shape, torch.float32)
    routing = kernels.route(problem.index, shape.E)
    offsets, block = routing.expert_offsets.tolist(), routing.block_m
    expected = [(e, m) for e in range(shape.E) for m in range(offsets[e], offsets[e + 1], block)]
    tiles = [tuple(line) for line in routing.tiles.tolist()]
    assert tiles[: len(expected)] == expected
    assert all(e == -1 for e, _ in tiles[len(expected) :])
    assert tiles[-2:] == [(-1, len(expected)), (-1, 0)]


def test_route_takes_any_integer_type_and_strides(kernels):
    index = torch.randint(0, 6, (3, 50), device=DEVICE)
    for view in (index.t(), index.t().int(), index.t().contiguous()):
        assert torch.equal(kernels.route(view, 6).row_slot, reference.route(view, 6).row_slot)


def test_all_slots_are_sentinels(kernels):
    index = torch.full((5, 2), 4, device=DEVICE)
    routing = kernels.route(index, 4)
    assert routing.expert_offsets.eq(0).all()
    assert routing.slot_row.eq(-1).all()
    y = torch.full((10, 8), float("nan"), device=DEVICE)
    assert kernels.combine(y, routing, torch.rand(5, 2, device=DEVICE)).eq(0).all()
    out = torch.empty(4, 3, 8, device=DEVICE)
    assert kernels.expert_outer(y[:, :3], y, routing, out).eq(0).all()


# ----------------------------------------------------------------------------------------------------- one kernel each


@shapes
@dtypes
def test_shrink(kernels, shape, dtype):
    problem = Problem(shape, dtype)
    routing = kernels.route(problem.index, shape.E)
    check(kernels, "expert_shrink", problem, problem.x, problem.up_A, routing, 0.5, gather=True)
    transposed_B = problem.up_B.transpose(1, 2)
    check(
        kernels,
        "expert_shrink",
        problem,
        problem.rows(2 * shape.I),
        transposed_B,
        problem.routing,
        2.0,
    )


@shapes
@dtypes
def test_linear(kernels, shape, dtype):
    problem = Problem(shape, dtype)
    routing = kernels.route(problem.index, shape.E)
    lora = {"xa": problem.xa, "lora_B": problem.down_B}
    check(
        kernels,
        "expert_linear",
        problem,
        problem.rows(shape.I),
        problem.down,
        routing,
        bias=problem.down_bias,
        **lora,
    )
    check(kernels, "expert_linear", problem, problem.x, problem.up, problem.routing, gather=True)
    lora = {"xa": problem.xa, "lora_B": problem.up_A.transpose(1, 2)}
    transposed = problem.up.transpose(1, 2)
    check(kernels, "expert_linear", problem, problem.rows(2 * shape.I), transposed, routing, **lora)


@small_shapes
@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_linear_act(kernels, shape, dtype, activation):
    problem = Problem(shape, dtype)
    routing = kernels.route(problem.index, shape.E)
    lora = {"xa": problem.xa, "lora_B": problem.up_B, "bias": problem.up_bias}
    check(
        kernels,
        "expert_linear_act",
        problem,
        problem.x,
        problem.up,
        routing,
        activation,
        gather=True,
        **lora,
    )


@small_shapes
@dtypes
@pytest.mark.parametrize("activation", [*ACTIVATIONS, Activation(interleaved=True)], ids=str)
def test_act_backward(kernels, shape, dtype, activation):
    problem = Problem(shape, dtype)
    routing = kernels.route(problem.index, shape.E)
    draw, pre = problem.rows(shape.I), problem.rows(2 * shape.I if activation.gated else shape.I)
    args = draw, pre, routing, activation, problem.weights
    _, _, dw = check(
        kernels, "expert_act_backward", problem, *args, dout=problem.x, bias=problem.down_bias
    )
    assert dw.flatten()[routing.slot_row < 0].eq(0).all()
    check(kernels, "expert_act_backward", problem, problem.rows(shape.I), *args[1:])


@small_shapes
@dtypes
def test_transposed_base_weights(kernels, shape, dtype):
    """A base that stores [E, K, N] passes a view."""
    problem = Problem(shape, dtype)
    routing = kernels.route(problem.index, shape.E)
    up = problem.up.transpose(1, 2).contiguous().transpose(1, 2)
    lora = {"xa": problem.xa, "lora_B": problem.up_B}
    for activation in (Activation(), Activation(interleaved=True)):
        check(
            kernels,
            "expert_linear_act",
            problem,
            problem.x,
            up,
            routing,
            activation,
            gather=True,
            **lora,
        )


@shapes
@dtypes
def test_combine_and_its_gradients(kernels, shape, dtype):
    problem = Problem(shape, dtype)
    y = problem.rows(shape.H)
    check(kernels, "combine", problem, y, problem.routing)
    check(kernels, "combine", problem, y, problem.routing, problem.weights)
    assert kernels.combine(y, problem.routing, dtype=torch.float32).dtype == torch.float32
    check(kernels, "combine_backward", problem, problem.x, y, problem.routing, problem.weights)


def test_a_sentinel_of_weight_nan_adds_nothing(kernels):
    problem = Problem(SHAPES[1], torch.float32)
    y, sentinel = problem.rows(8), problem.routing.slot_row.view_as(problem.weights) < 0
    poisoned = problem.weights.masked_fill(sentinel, float("nan"))
    out = kernels.combine(y, problem.routing, poisoned)
    assert torch.equal(out, kernels.combine(y, problem.routing, problem.weights))


@pytest.fixture(
    params=[(1024, 1024), (1, 1024), (1024, 1)],
    ids=["short chunks", "long chunks", "one program of sums"],
)
def chunks(request, monkeypatch):
    """Chunks of one block of rows, as small shapes have in the interpreter, or of many; sums of all experts by one."""
    for name, value in zip(("PROGRAMS", "SUM_PROGRAMS"), request.param, strict=True):
        monkeypatch.setattr(f"peft_moe_lora.ops.kernels.tiles.chunks.{name}", value)


@shapes
@dtypes
@pytest.mark.usefixtures("chunks")
def test_outer(kernels, shape, dtype):
    problem = Problem(shape, dtype)
    E, r = shape.E, shape.r
    routing = kernels.route(problem.index, E)
    yb, xa, act, dpre = (problem.rows(width) for width in (r, r, shape.I, 2 * shape.I))
    calls = [
        (yb, problem.x, {"gather_right": True}),
        (dpre, xa, {}),
        (yb, act, {"row_weights": problem.weights}),
        (problem.x, xa, {"gather_left": True, "row_weights": problem.weights}),
    ]
    for left, right, options in calls:
        # the second layout is that of the gradient of an expert-major [N, r * E]
        for out in (
            torch.empty(E, left.shape[1], right.shape[1], device=DEVICE),
            torch.empty(left.shape[1], E, right.shape[1], device=DEVICE).permute(1, 0, 2),
        ):
            actual = kernels.expert_outer(left, right, routing, out, **options)
            assert actual is out
            twin = reference.expert_outer(left, right, routing, torch.zeros_like(out), **options)
            wide_options = {k: wide(v) for k, v in options.items()}
            exact = reference.expert_outer(
                left.double(),
                right.double(),
                routing,
                torch.zeros_like(out).double(),
                **wide_options,
            )
            assert_within(actual, twin, exact, dtype)


@dtypes
@pytest.mark.usefixtures("chunks")
def test_outer_of_an_expert_with_most_of_the_rows(kernels, dtype):
    problem = Problem(
        Shape(3000 if CUDA else 150, 3, 2, 40, 24, 6, "chunks past those that are added at once"),
        dtype,
    )
    index = torch.where(torch.rand(problem.index.shape) < 0.9, 1, 2).to(DEVICE)
    routing = kernels.route(index, 3)
    xa, x = random(problem.M, 6, dtype=dtype), random(index.shape[0], 40, dtype=dtype)
    outs = [torch.zeros(40, 3, 6, device=DEVICE).permute(1, 0, 2) for _ in range(2)]
    actual = kernels.expert_outer(x, xa, routing, outs[0].fill_(float("nan")), gather_left=True)
    twin = reference.expert_outer(x, xa, routing, outs[1], gather_left=True)
    exact = reference.expert_outer(
        x.double(), xa.double(), routing, outs[1].double(), gather_left=True
    )
    assert_within(actual, twin, exact, dtype)


@pytest.mark.parametrize("shape", [*SMALL, SHAPES[6]], ids=ids)
@dtypes
@pytest.mark.usefixtures("chunks")
def test_dropout_masks_are_those_of_the_twin(kernels, shape, dtype):
    problem = Problem(shape, dtype)
    routing, dropout = (
        kernels.route(problem.index, shape.E),
        Dropout(0.4, torch.tensor([2**31 + 77], device=DEVICE)),
    )
    check(
        kernels,
        "expert_shrink",
        problem,
        problem.x,
        problem.up_A,
        routing,
        1.0,
        gather=True,
        dropout=dropout,
    )
    lora = {"xa": problem.xa, "lora_B": problem.up_A.transpose(1, 2), "dropout": dropout}
    args = problem.rows(2 * shape.I), problem.up.transpose(1, 2), routing
    check(kernels, "expert_linear", problem, *args, **lora)
    lora = {"xa": problem.xa, "lora_B": problem.down_A.transpose(1, 2), "dropout": dropout}
    check(
        kernels,
        "expert_linear",
        problem,
        problem.x,
        problem.down.transpose(1, 2),
        routing,
        gather=True,
        **lora,
    )
    options = {"gather_right": True, "dropout": dropout}
    out = torch.empty(shape.E, shape.r, shape.H, device=DEVICE)
    actual = kernels.expert_outer(problem.xa, problem.x, routing, out, **options)
    twin = reference.expert_outer(problem.xa, problem.x, routing, torch.zeros_like(out), **options)
    exact = reference.expert_outer(
        problem.xa.double(), problem.x.double(), routing, out.double(), **options
    )
    assert_within(actual, twin, exact, dtype)


# -------------------------------------------------------------------------------------------------------- the whole


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
    """Forward and backward of one experts layer, composed of the operations. Returns out, dx and every gradient."""
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
    return (
        p.x, p.index, p.weights, p.up, p.down, p.up_A, p.up_B, p.down_A, p.down_B, p.up_bias, p.down_bias,
        random(*p.x.shape, dtype=p.dtype), activation,
    )  # fmt: skip


@small_shapes
@dtypes
@pytest.mark.parametrize("skew", [False, True])
def test_layer_forward_and_backward(kernels, shape, dtype, skew):
    problem = Problem(shape, dtype, skew=skew)
    args = layer_arguments(problem, Activation())
    actual, twin = layer(kernels, *args), layer(reference, *args)
    exact = layer(reference, *(wide(a) for a in args))
    for a, t, e in zip(actual, twin, exact, strict=True):
        assert_within(a, t, e, dtype)


@dtypes
def test_twice_the_same_bits(kernels, dtype):
    problem = Problem(SHAPES[1], dtype, skew=True)
    args = layer_arguments(problem, Activation())
    for a, b in zip(layer(kernels, *args), layer(kernels, *args), strict=True):
        assert torch.equal(a, b)


@dtypes
def test_no_tokens(kernels, dtype):
    shape = Shape(0, 4, 2, 32, 16, 4, "an empty batch")
    problem = Problem(shape, dtype)
    out, dx, dweights, *grads = layer(kernels, *layer_arguments(problem, Activation()))
    assert out.shape == dx.shape == (0, 32)
    assert dweights.shape == (0, 2)
    assert all(g.eq(0).all() for g in grads)


@dtypes
def test_inputs_of_any_strides(kernels, dtype):
    problem = Problem(SHAPES[1], dtype)
    routing = kernels.route(problem.index, problem.shape.E)

    def strided(t):
        """The same values behind strides that no dimension of a contiguous tensor has."""
        out = torch.full((*t.shape, 2), float("nan"), dtype=t.dtype, device=t.device)[..., 0]
        return out.copy_(t)

    p, activation = problem, Activation()
    loras = {"xa": strided(p.xa), "lora_B": strided(p.up_B), "bias": strided(p.up_bias)}
    check(kernels, "expert_shrink", p, strided(p.x), strided(p.up_A), routing, 1.0, gather=True)
    check(
        kernels,
        "expert_linear_act",
        p,
        strided(p.x),
        strided(p.up),
        routing,
        activation,
        gather=True,
        **loras,
    )
    check(kernels, "expert_linear", p, strided(p.rows(p.shape.I)), strided(p.down), routing)
    pre, weights = strided(p.rows(2 * p.shape.I)), strided(p.weights)
    for activation in (Activation(), Activation(interleaved=True)):
        check(
            kernels, "expert_act_backward", p, p.rows(p.shape.I), pre, routing, activation, weights
        )
    check(kernels, "combine", p, strided(p.rows(8)), routing, weights)
    check(
        kernels, "combine_backward", p, strided(p.x), strided(p.rows(p.shape.H)), routing, weights
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_runs_inside_a_cuda_graph(kernels, dtype):
    problem = Problem(GPU_SHAPES[0], dtype)
    args = layer_arguments(problem, Activation())
    eager = layer(kernels, *args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(kernels, *args)
    graph.replay()
    for a, b in zip(eager, captured, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_no_operation_waits_for_the_device(kernels):
    problem = Problem(GPU_SHAPES[0], torch.bfloat16)
    args = layer_arguments(problem, Activation())
    layer(kernels, *args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(kernels, *args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
