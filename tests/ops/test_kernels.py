"""Every kernel computes what its twin computes, on every shape, with NaN in all unrouted rows.

The rule: the error against fp64 is at most twice that of the twin at the same dtype (plain PyTorch
that rounds at the same places), plus ATOL of the largest value for sums whose twin happens to be
nearly exact.
"""

import pytest
import torch

from ops.problems import (
    ACTIVATIONS,
    CUDA,
    DEVICE,
    GPU_SHAPES,
    MANY,
    SHAPES,
    SMALL,
    Problem,
    Shape,
    assert_within,
    check,
    dtypes,
    dtypes_compiled,
    hopper,
    ids,
    layer,
    layer_arguments,
    random,
    shapes,
    small_shapes,
    wide,
)
from peft_moe_lora.ops import Activation, Dropout, reference, table_memory


def test_the_two_backends_offer_the_same_operations(kernels):
    assert sorted(kernels.__all__) == sorted(reference.__all__)


# ---- routing -------------------------------------------------------------------------------------


FEW = "peft_moe_lora.ops.kernels.routing.FEW_SLOTS"
one_launch_or_three = pytest.mark.parametrize("few", [2048, 0], ids=["one", "three"])


@pytest.mark.parametrize("shape", [*SHAPES, MANY], ids=ids)
@pytest.mark.parametrize("skew", [False, True])
@one_launch_or_three
def test_route_is_the_stable_sort(kernels, monkeypatch, shape, skew, few):
    monkeypatch.setattr(FEW, few)
    problem = Problem(shape, torch.float32, skew=skew)
    routing, twin = kernels.route(problem.index, shape.E), problem.routing
    for name in ("expert_offsets", "row_token", "row_slot", "slot_row", "top_k"):
        actual, expected = getattr(routing, name), getattr(twin, name)
        assert torch.equal(actual, expected) if torch.is_tensor(actual) else actual == expected, (
            name
        )


@shapes
@one_launch_or_three
def test_tiles_cover_every_routed_row_once(kernels, monkeypatch, shape, few):
    monkeypatch.setattr(FEW, few)
    problem = Problem(shape, torch.float32)
    routing = kernels.route(problem.index, shape.E)
    offsets, block = routing.expert_offsets.tolist(), routing.block_m
    expected = [(e, m) for e in range(shape.E) for m in range(offsets[e], offsets[e + 1], block)]
    tiles = [tuple(line) for line in routing.tiles.tolist()]
    assert tiles[: len(expected)] == expected
    assert all(e == -1 for e, _ in tiles[len(expected) :])
    assert tiles[-2:] == [(-1, len(expected)), (-1, 0)]


@pytest.mark.parametrize("S", [1, 31, 32, 33, 127, 128, 129, 500, 2048])
@pytest.mark.parametrize("E", [1, 5, 126, 127, 512])
def test_one_launch_of_a_routing_writes_what_three_write(kernels, monkeypatch, S, E):
    """Around the sizes of the blocks, with sentinels, in memory that held something else."""
    index = torch.randint(-1, E + 1, (S, 1), device=DEVICE)
    one = kernels.route(index, E)
    monkeypatch.setattr(FEW, 0)
    three = kernels.route(index, E)
    for actual, expected in zip(one, three, strict=True):
        assert torch.equal(torch.as_tensor(actual), torch.as_tensor(expected))


def test_a_table_is_cut_out_of_the_memory_that_an_operator_returns(kernels):
    index = Problem(MANY, torch.float32).index
    memory = table_memory(index, MANY.E)
    routing = kernels.route(index, MANY.E, memory)
    assert len(routing.tiles) < len(memory)
    found = kernels.with_tiles(routing._replace(tiles=memory, block_m=0))
    assert found.block_m == routing.block_m
    assert torch.equal(found.tiles, kernels.route(index, MANY.E).tiles)
    assert found.tiles.data_ptr() == memory.data_ptr(), "the table is made again"


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


# ---- one kernel each -----------------------------------------------------------------------------


@pytest.mark.gpu
@hopper
@pytest.mark.parametrize(("r", "by_product"), [(256, True), (100, True), (65, True), (64, False)])
@pytest.mark.parametrize("scaling", [1.0, 0.7])
def test_many_ranks_are_a_product(kernels, r, by_product, scaling):
    """A, and B transposed, of so many ranks that they are multiplied as weights are."""
    from peft_moe_lora.ops.kernels.launching import launch

    problem = Problem(Shape(2048, 8, 2, 200, 96, r, "many ranks"), torch.bfloat16)
    routing = kernels.route(problem.index, 8)
    launch.forget()
    for x, lora_A, gather in (
        (problem.x, problem.up_A, True),
        (problem.rows(192), problem.up_B.transpose(1, 2), False),
    ):
        check(kernels, "expert_shrink", problem, x, lora_A, routing, scaling, gather=gather)
    assert ("linear_roles" in {key[0] for key, _ in launch._plans}) == by_product


@shapes
@dtypes
def test_shrink_is_its_twin(kernels, shape, dtype):
    check_shrink(kernels, Problem(shape, dtype))


@dtypes
@pytest.mark.parametrize("r", [17, 40, 100])
def test_with_few_rows_several_programs_share_the_ranks(kernels, r, dtype):
    check_shrink(kernels, Problem(Shape(9, 8, 2, 72, 40, r, "more ranks than a program"), dtype))


@dtypes
@pytest.mark.parametrize("T", [9, 70])
@pytest.mark.parametrize("r", [10, 40, 70])
def test_a_padded_copy_of_a_transposed_B_gives_the_same_bits(kernels, r, T, dtype, monkeypatch):
    from peft_moe_lora.ops.kernels import shrink

    problem = Problem(Shape(T, 2, 1, 72, 40, r, "no multiple of 16"), dtype)
    routing = kernels.route(problem.index, 2)
    routed = int(routing.expert_offsets[-1])
    x = problem.rows(80)
    x[3] = float("inf")

    def rows():
        xa = kernels.expert_shrink(x, problem.up_B.transpose(1, 2), routing, 0.5)
        return xa[:routed]

    # without the product that large ranks are on some GPUs, whose sums have another order
    monkeypatch.setattr(shrink, "_as_product", lambda *args: False)
    from_copy = rows()
    monkeypatch.setattr(shrink, "_in_sixteens", lambda lora_A, dtype: lora_A)
    torch.testing.assert_close(from_copy, rows(), rtol=0, atol=0, equal_nan=True)
    assert from_copy[:, r:].eq(0).all(), "a row that is not finite has zeros, too"


def test_the_weight_of_many_ranks_is_padded_in_both_orders(kernels, monkeypatch):
    """The product of 9.0 by its twin: A is multiplied as a weight whose ranks are those of xa."""
    from peft_moe_lora.ops.kernels import shrink

    taken = []

    def by_twin(product):
        taken.append(product.weight.shape)
        args = product.x, product.weight, product.routing
        product.y.copy_(reference.expert_linear(*args, gather=product.gather))
        return True

    monkeypatch.setattr(shrink, "linear_blocks", lambda *args: {})
    monkeypatch.setattr(shrink, "by_roles", by_twin)
    problem = Problem(Shape(70, 2, 1, 72, 40, 70, "many ranks"), torch.float32)
    check_shrink(kernels, problem)
    assert taken == [(2, 80, 72), (2, 80, 80)]


def check_shrink(kernels, problem):
    """Hold both shrinks of a layer against their twin."""
    shape = problem.shape
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
def test_linear_is_its_twin(kernels, shape, dtype):
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
@dtypes_compiled
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_linear_act_is_its_twin(kernels, shape, dtype, activation):
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
@dtypes_compiled
@pytest.mark.parametrize("activation", [*ACTIVATIONS, Activation(interleaved=True)], ids=str)
def test_act_backward_is_its_twin(kernels, shape, dtype, activation):
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
def test_a_transposed_base_weight_is_a_view(kernels, shape, dtype):
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


@shapes
@dtypes
@pytest.mark.parametrize("sentinels", [False, True])
def test_rows_of_sentinels_are_set_to_zero_and_no_others(kernels, shape, dtype, sentinels):
    problem = Problem(shape, dtype, sentinels)
    routing = kernels.route(problem.index, shape.E)
    rows = problem.rows(shape.H)
    expected = rows.clone()
    expected[problem.valid :] = 0
    for ops in (kernels, reference):
        actual = rows.clone()
        assert ops.zero_unrouted(actual, routing) is actual
        assert torch.equal(actual, expected)


def test_more_rows_of_sentinels_than_programs(kernels, monkeypatch):
    monkeypatch.setattr("peft_moe_lora.ops.kernels.unrouted.PER_SM", 1)
    monkeypatch.setattr("peft_moe_lora.ops.kernels.unrouted.device_facts", lambda device: (0, 3))
    index = torch.full((7, 2), 4, device=DEVICE)
    index[0, 1] = 2
    rows = torch.full((14, 40), float("nan"), device=DEVICE)
    rows[0] = 1.0
    kernels.zero_unrouted(rows, kernels.route(index, 4))
    assert rows[0].eq(1).all()
    assert rows[1:].eq(0).all()


@dtypes
@pytest.mark.parametrize(
    ("N", "a", "b"), [(3, 16, 128), (5, 128, 16), (2, 5, 60), (4, 1, 7), (2, 300, 3)]
)
def test_columns_are_transposed(kernels, N, a, b, dtype):
    # whole numbers are exact in every dtype, and tell any two columns of a row apart
    matrix = (
        torch.arange(a * b, device=DEVICE) % 251 - torch.arange(N, device=DEVICE)[:, None]
    ).float()
    expected = matrix.view(N, a, b).transpose(1, 2).reshape(N, a * b).to(dtype)
    for ops in (kernels, reference):
        actual = ops.transpose_columns(matrix, a, dtype)
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        assert torch.equal(actual, expected)
        assert torch.equal(ops.transpose_columns(actual, b, torch.float32), matrix)
    assert kernels.transpose_columns(matrix[:0], a, dtype).shape == (0, a * b)


@pytest.fixture(
    params=[(1024, 1024), (1, 1024), (1024, 1)],
    ids=["short chunks", "long chunks", "one program of sums"],
)
def chunks(request, monkeypatch):
    """Chunks of one block of rows, as small shapes have in the interpreter, or of many blocks.

    Or one program adds the sums of all experts.
    """
    for name, value in zip(("PROGRAMS", "SUM_PROGRAMS"), request.param, strict=True):
        monkeypatch.setattr(f"peft_moe_lora.ops.kernels.tiles.chunks.{name}", value)


@pytest.mark.parametrize("columns", [5, 7, 16])
def test_rows_of_another_rank_are_refused(kernels, columns):
    """Rows of rank 6 have 6 columns, or 8 in memory."""
    problem = Problem(Shape(12, 3, 2, 64, 64, 6, "a rank that is stored wider"), torch.float32)
    routing = kernels.route(problem.index, 3)
    out = torch.empty(3, 6, 64, device=DEVICE)
    for ops in (kernels, reference):
        with pytest.raises(AssertionError, match=f"6 columns are needed, or 8; got {columns}"):
            ops.expert_outer(problem.rows(columns), problem.x, routing, out, gather_right=True)


@shapes
@dtypes_compiled
@pytest.mark.usefixtures("chunks")
def test_outer_is_its_twin(kernels, shape, dtype):
    check_outer(kernels, shape, dtype)


@dtypes_compiled
def test_outer_of_more_stored_ranks_than_columns(kernels, dtype):
    """Rows of rank 45 have 48 columns, as dpre has, and more than x and act."""
    check_outer(kernels, Shape(24, 3, 2, 40, 24, 45, "zeros past r on the wider side"), dtype)


def check_outer(kernels, shape, dtype):
    """Hold the four outer products of a layer against their twin."""
    problem = Problem(shape, dtype)
    E, r = shape.E, shape.r
    routing = kernels.route(problem.index, E)
    yb, xa = problem.rank_rows(r), problem.rank_rows(r)
    act, dpre = problem.rows(shape.I), problem.rows(2 * shape.I)
    calls = [
        (yb, problem.x, (r, shape.H), {"gather_right": True}),
        (dpre, xa, (2 * shape.I, r), {}),
        (yb, act, (r, shape.I), {"row_weights": problem.weights}),
        (problem.x, xa, (shape.H, r), {"gather_left": True, "row_weights": problem.weights}),
    ]
    for left, right, (P, Q), options in calls:
        # the second layout is that of the gradient of an expert-major [N, r * E]
        for out in (
            torch.empty(E, P, Q, device=DEVICE),
            torch.empty(P, E, Q, device=DEVICE).permute(1, 0, 2),
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
@dtypes_compiled
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


# ---- the whole -----------------------------------------------------------------------------------


@small_shapes
@dtypes_compiled
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
def test_no_tokens_give_no_rows_and_zero_gradients(kernels, dtype):
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
        """The same values with strides that no contiguous tensor has."""
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
