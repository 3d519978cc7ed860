"""What `experts` and `rows_linear` refuse, and the dtypes that they return."""

import pytest
import torch

from helpers import BF16, assert_close
from peft_moe_lora.functional import Projection, experts, rows_linear
from peft_moe_lora.ops import Activation

T, E, TOP_K, H, INNER = 7, 3, 2, 8, 6


def rows(dtype=torch.float32):
    index = torch.randint(E, (T, TOP_K))
    return torch.randn(T, H).to(dtype), index, torch.rand(T, TOP_K)


def projections():
    return Projection(torch.randn(E, 2 * INNER, H)), Projection(torch.randn(E, H, INNER))


def gate(pre):
    first, second = pre.chunk(2, -1)
    return torch.nn.functional.silu(first) * second


PATHS = pytest.mark.parametrize("activation", [Activation(), gate], ids=["whole", "steps"])


@PATHS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_output_has_the_dtype_of_the_hidden_states(activation, dtype):
    x, index, weights = rows(dtype)
    up, down = projections()
    out = experts(x, index, weights, up, down, activation)
    assert out.dtype == dtype
    # computed in the dtype of the weights, and rounded once
    assert_close(out, experts(x.float(), index, weights, up, down, activation), BF16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rows_have_the_dtype_of_what_came(dtype):
    x = torch.randn(T, H).to(dtype)
    up, _ = projections()
    y = rows_linear(x, [T, 0, 0], up)
    assert y.dtype == dtype
    assert_close(y, x.float() @ up.weight[0].T, BF16)


def test_own_code_may_return_another_dtype():
    """A gate in fp32 and a norm in fp32, as models write them around bf16 weights."""
    x, index, weights = rows(torch.bfloat16)
    up, down = (Projection(p.weight.bfloat16()) for p in projections())

    def norm(y):
        return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)

    low = experts(x, index, weights, up, down, gate, post_norm=norm)
    wide = experts(
        x, index, weights, up, down, lambda p: gate(p.float()), post_norm=lambda y: norm(y.float())
    )
    assert wide.dtype == torch.bfloat16
    assert_close(wide, low, BF16)


BAD = {
    "hidden states of another width": {"x": torch.randn(T, H + 1)},
    "hidden states with a batch": {"x": torch.randn(1, T, H)},
    "another width out of down": {"down": Projection(torch.randn(E, H + 1, INNER))},
    "another number of experts in down": {"down": Projection(torch.randn(E + 1, H, INNER))},
}


@pytest.mark.parametrize("what", BAD)
def test_shapes_that_do_not_fit_are_quoted(what):
    x, index, weights = rows()
    up, down = projections()
    given = {"x": x, "down": down, **BAD[what]}
    with pytest.raises(ValueError, match=r"hidden_states \[T, H\].*down \[E, H, I\]; got") as error:
        experts(given["x"], index, weights, up, given["down"], Activation())
    assert str(tuple(given["x"].shape)) in str(error.value)
    assert str(tuple(given["down"].weight.shape)) in str(error.value)


@pytest.mark.parametrize(
    ("index", "weights"),
    [((T, TOP_K), (T, TOP_K + 1)), ((T + 1, TOP_K), (T + 1, TOP_K)), ((T, TOP_K), (T,))],
    ids=["another top_k", "another number of tokens", "one dimension"],
)
def test_routing_that_does_not_fit_is_quoted(index, weights):
    x, _, _ = rows()
    with pytest.raises(ValueError, match=rf"with T = {T}; got") as error:
        experts(
            x,
            torch.zeros(index, dtype=torch.long),
            torch.ones(weights),
            *projections(),
            Activation(),
        )
    assert f"{index} and {weights}" in str(error.value)


@pytest.mark.parametrize("field", ["weight", "up_weight", "bias"])
@pytest.mark.parametrize("side", ["up", "down"])
def test_a_frozen_tensor_that_asks_for_a_gradient_is_refused(side, field):
    halves = Projection(torch.randn(E, INNER, H), up_weight=torch.randn(E, INNER, H))
    given = {"up": halves, "down": projections()[1]}
    asking = torch.randn(E, INNER, H, requires_grad=True)
    if field == "bias":
        asking = torch.randn(E, given[side].weight.shape[1], requires_grad=True)
    elif side == "down":
        asking = torch.randn(E, H, INNER, requires_grad=True)
    given[side] = given[side]._replace(**{field: asking})
    with pytest.raises(ValueError, match="requires_grad=True"):
        experts(*rows(), given["up"], given["down"], gate)


def test_without_gradients_a_weight_may_ask_for_one():
    up, down = projections()
    up.weight.requires_grad_()
    with torch.no_grad():
        assert experts(*rows(), up, down, Activation()).shape == (T, H)


@pytest.mark.parametrize("sizes", [[T], [T, 0], [T, 0, 0, 0], [[T, 0, 0]]], ids=str)
def test_a_size_for_each_expert_is_needed(sizes):
    with pytest.raises(ValueError, match=rf"{E} expert sizes; got"):
        rows_linear(torch.randn(T, H), sizes, projections()[0])


@pytest.mark.parametrize("x", [torch.randn(T, H + 1), torch.randn(1, T, H)], ids=["width", "batch"])
def test_rows_that_do_not_fit_are_quoted(x):
    with pytest.raises(ValueError, match=rf"x \[M, {H}\]") as error:
        rows_linear(x, [T, 0, 0], projections()[0])
    assert str(tuple(x.shape)) in str(error.value)


@pytest.mark.parametrize("sizes", [[T - 1, 0, 0], [T, 1, 0], [T + 1, -1, 0]], ids=str)
def test_sizes_are_those_of_the_rows(sizes):
    with pytest.raises(ValueError, match=f"{T} rows"):
        rows_linear(torch.randn(T, H), sizes, projections()[0])
