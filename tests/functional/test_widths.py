"""Layers of widths for which kernels are slow are computed with zeros: the same numbers."""

import pytest
import torch

from peft_moe_lora.functional import Projection, experts, whole
from peft_moe_lora.functional.widths import FEW_ROWS
from peft_moe_lora.ops import Activation, reference
from peft_moe_lora.ops.quantize import quantize

E, T, TOP_K, R = 5, 23, 2, 3
WIDTHS = [(H, I) for H in (33, 36, 40) for I in (17, 20, 24)]  # noqa: E741
ACTIVATIONS = {
    "gated": Activation(),
    "no gate": Activation("relu2", gated=False),
    "interleaved": Activation(interleaved=True, limit=0.8, alpha=1.702, up_shift=1.0),
    # the activation of 0 is not 0
    "clamped below 0": Activation(limit=-0.5, up_shift=1.0),
}


def draw(*shape, std=1.0):
    return torch.randn(*shape, dtype=torch.float64) * std


def projection(N, K, adapted=True, chosen=None, transposed=False, rank_major=False, p=0.0):
    weight = draw(E, N, K, std=K**-0.5)
    if transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    frozen = Projection(weight, draw(E, N))
    if not adapted:
        return frozen
    S = E if chosen is None else len(chosen)
    # the update is as large as what it is added to
    A = draw(R * S, K, std=K**-0.5).requires_grad_()
    B = draw(N, R * S, std=R**-0.5).requires_grad_()
    kinds = {"experts": chosen, "dropout_p": p, "rank_major": rank_major}
    return frozen._replace(lora_A=A, lora_B=B, **kinds)


def results(H, I, activation, up=True, down=True, recompute=False, compiled=False, **kinds):  # noqa: E741
    """The output and all gradients of a random layer, the same for equal arguments."""
    torch.manual_seed(0)
    projections = [
        projection(activation.columns(I), H, up, **kinds),
        projection(H, I, down, **kinds),
    ]
    x, weights = draw(T, H).requires_grad_(), torch.rand(T, TOP_K).double().requires_grad_()
    index = torch.randint(E + 1, (T, TOP_K))
    options = {"recompute": recompute, "seeds": torch.tensor([[7, 0], [8, 0]]), "backend": "torch"}

    def layer(*rows):
        return experts(*rows, *projections, activation, **options)

    if compiled:
        layer = torch.compile(layer, backend="aot_eager", fullgraph=True)
    out = layer(x, index, weights)
    leaves = [x, weights, *(t for p in projections for t in (p.lora_A, p.lora_B) if t is not None)]
    return [out.detach(), *torch.autograd.grad(out, leaves, draw(T, H))]


def multiples_of_8(widths, dtype):
    return tuple(-(-width // 8) * 8 for width in widths)


@pytest.fixture
def multiplied(monkeypatch):
    """Operations that want multiples of 8; the shapes of the weights that they multiply."""
    shapes = set()
    plain = reference.expert_linear

    def noted(x, weight, *args, **kwargs):
        shapes.add(tuple(weight.shape))
        return plain(x, weight, *args, **kwargs)

    def switch():
        monkeypatch.setattr(reference, "fast_widths", multiples_of_8)
        monkeypatch.setattr(reference, "expert_linear", noted)
        return shapes

    return switch


def assert_equal_numbers(actual, expected):
    for found, right in zip(actual, expected, strict=True):
        assert right.abs().max() > 0
        assert found.shape == right.shape
        assert found.is_contiguous()
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("H", "I"), WIDTHS)
def test_zeros_change_no_number(H, I, name, multiplied):  # noqa: E741
    expected = results(H, I, ACTIVATIONS[name])
    shapes = multiplied()
    actual = results(H, I, ACTIVATIONS[name])
    assert_equal_numbers(actual, expected)
    assert shapes
    assert all(n % 8 == 0 for shape in shapes for n in shape[1:])


WAYS = {
    "compiled": {"compiled": True},
    "recompute": {"recompute": True},
    "dropout": {"p": 0.4},
    "some experts": {"chosen": (1, 3)},
    "PEFT's order": {"rank_major": True},
    "transposed base": {"transposed": True},
    "up alone": {"down": False},
    "down alone": {"up": False},
    "no adapter": {"up": False, "down": False},
}


@pytest.mark.parametrize("way", WAYS)
def test_neither_do_they_in_other_layers(way, multiplied):
    expected = results(33, 17, Activation(), **WAYS[way])
    multiplied()
    assert_equal_numbers(results(33, 17, Activation(), **WAYS[way]), expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_graph_knows_the_shapes_of_the_results(recompute, multiplied):
    multiplied()
    x, weights, index = draw(T, 33), torch.ones(T, 1), torch.randint(E, (T, 1))
    up, down = projection(34, 33), projection(33, 17)
    pairs = up.lora_A, up.lora_B, down.lora_A, down.lora_B
    inputs = whole.Inputs(x, weights, *pairs, up.weight, up.bias, down.weight, down.bias, seed=None)
    plan = whole.Plan("torch", True, recompute, 1.0, 1.0, 0.0, 0.0, None, None, False, False)
    groups = inputs, whole.Selected(index), Activation(), plan
    arguments = whole._OPERATOR.arguments.of(groups)
    with torch.no_grad():
        pre = whole._OPERATOR(*groups).pre
        assert recompute or pre.shape == (T, 48)
        operator = whole._OPERATOR.operator.default
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")


def test_a_copy_has_the_memory_order_of_its_weight(monkeypatch):
    monkeypatch.setattr(reference, "fast_widths", multiples_of_8)
    plain = reference.expert_linear_act
    strides = []

    def noted(x, weight, *args, **kwargs):
        strides.append(weight.stride())
        return plain(x, weight, *args, **kwargs)

    monkeypatch.setattr(reference, "expert_linear_act", noted)
    results(33, 17, Activation())
    results(33, 17, Activation(), transposed=True)
    assert strides == [(48 * 40, 40, 1), (40 * 48, 1, 48)]


def without_gradients(H, I, num_rows, quantized=False):  # noqa: E741
    up, down = projection(2 * I, H, False), projection(H, I, False)
    if quantized:
        up, down = (Projection(quantize(p.weight.half(), "int8")) for p in (up, down))
    x = draw(num_rows, H).to(up.weight.dtype)
    index = torch.randint(E, (num_rows, 1))
    with torch.no_grad():
        experts(x, index, torch.ones(num_rows, 1), up, down, Activation(), backend="torch")


def test_few_rows_are_computed_as_they_are(multiplied):
    shapes = multiplied()
    without_gradients(33, 17, FEW_ROWS * E - 1)
    assert shapes == {(E, 34, 33), (E, 33, 17)}
    shapes.clear()
    without_gradients(33, 17, FEW_ROWS * E)
    assert shapes == {(E, 48, 40), (E, 40, 24)}


def test_quantized_weights_are_left_alone(multiplied):
    shapes = multiplied()
    without_gradients(36, 20, FEW_ROWS * E, quantized=True)
    assert shapes == {(E, 40, 36), (E, 36, 20)}


def test_widths_that_fit_copy_nothing(multiplied, monkeypatch):
    shapes = multiplied()
    monkeypatch.setattr("peft_moe_lora.functional.widths._resized", None)
    results(40, 24, Activation())
    assert shapes == {(E, 48, 40), (E, 40, 24), (E, 24, 40), (E, 40, 48)}
