"""backward() inside autocast: the gradients are those of backward() outside, bit for bit.

PyTorch advises to leave autocast before backward, but nothing stops a loop that does not. Autocast
would then round the products of a backward that was written for the dtypes of forward.
"""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from helpers import assert_close
from peft_moe_lora.functional import Projection, experts, rows_linear
from peft_moe_lora.functional.operators import Gradient, Operator, differentiable
from peft_moe_lora.ops import Activation
from peft_moe_lora.ops.quantize import quantize

T, E, TOP_K, H, INNER, R = 40, 3, 2, 64, 64, 8


def own_activation(pre):
    """An activation that no kernel has."""
    gate, up = pre.chunk(2, -1)
    return torch.tanh(gate) * up


FUSED = Activation()
# case -> the activation, the arguments of `experts`, the fields of its projections
CASES = {
    "whole": (FUSED, {}, {}),
    "recomputed": (FUSED, {"recompute": True}, {}),
    "dropout": (FUSED, {}, {"dropout_p": 0.3}),
    "some experts": (FUSED, {}, {"experts": (0, 2)}),
    "in 4 bits": (FUSED, {}, {"format": "nf4"}),
    "in 8 bits": (FUSED, {}, {"format": "int8"}),
    "step by step": (own_activation, {}, {}),
    "step by step, a norm": (FUSED, {"post_norm": nn.RMSNorm(H)}, {}),
    "step by step, in 4 bits": (own_activation, {}, {"format": "nf4"}),
    "step by step, two stacks": (own_activation, {}, {"stacks": 2}),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def projection(N, K, device, format=None, stacks=1, experts=None, dropout_p=0.0):
    weight = torch.randn(E, N, K) * K**-0.5
    up_weight = None
    if format is not None:
        weight = quantize(weight.to(device), format)
    elif stacks == 2 and N == 2 * INNER:
        weight, up_weight = (half.contiguous().to(device) for half in weight.chunk(2, 1))
    else:
        weight = weight.to(device)
    S = E if experts is None else len(experts)
    pair = [torch.randn(R * S, K) * K**-0.5, torch.randn(N, R * S) * R**-0.5]
    A, B = (t.to(device).requires_grad_() for t in pair)
    return Projection(weight, None, A, B, 1.0, dropout_p, experts, up_weight)


def layer(case, device):
    """(differentiable inputs, function without arguments that computes the layer's output)."""
    activation, options, fields = CASES[case]
    if "post_norm" in options:
        options = {"post_norm": options["post_norm"].to(device)}
    up = projection(2 * INNER, H, device, **fields)
    down = projection(H, INNER, device, **fields)
    x = torch.randn(T, H, device=device, requires_grad=True)
    weights = torch.rand(T, TOP_K, device=device, requires_grad=True)
    index = torch.randint(E, (T, TOP_K), device=device)
    leaves = [x, weights, up.lora_A, up.lora_B, down.lora_A, down.lora_B]
    return leaves, lambda: experts(x, index, weights, up, down, activation, **options)


def gradients(device, leaves, out, backward_in_autocast):
    loss = out.float().square().sum()
    with torch.autocast(device, torch.bfloat16, enabled=backward_in_autocast):
        return torch.autograd.grad(loss, leaves, retain_graph=True)


def assert_same_inside(device, leaves, out):
    outside = gradients(device, leaves, out, False)
    inside = gradients(device, leaves, out, True)
    for i, (gradient, expected) in enumerate(zip(inside, outside, strict=True)):
        assert expected.abs().max() > 0
        assert torch.equal(gradient, expected), f"gradient of input {i}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("forward_in_autocast", [False, True], ids=["", "forward too"])
def test_backward_in_autocast_gives_the_same_gradients(case, forward_in_autocast, device):
    leaves, run = layer(case, device)
    with torch.autocast(device, torch.bfloat16, enabled=forward_in_autocast):
        out = run()
    assert_same_inside(device, leaves, out)


@pytest.mark.parametrize("case", ["whole", "recomputed", "step by step"])
@pytest.mark.parametrize("forward_in_autocast", [False, True], ids=["", "forward too"])
def test_a_compiled_layer_does_so_too(case, forward_in_autocast, device):
    leaves, run = layer(case, device)
    expected = gradients(device, leaves, run(), False)
    torch.compiler.reset()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for backward_in_autocast in (False, True):
        # one backward each: a compiled graph is freed by its first
        with torch.autocast(device, torch.bfloat16, enabled=forward_in_autocast):
            out = compiled()
        found = gradients(device, leaves, out, backward_in_autocast)
        for gradient, wanted in zip(found, expected, strict=True):
            assert_close(gradient, wanted)


def test_an_activation_of_the_model_runs_without_autocast(device):
    up, down = projection(2 * INNER, H, device), projection(H, INNER, device)
    index = torch.randint(E, (T, TOP_K), device=device)
    rows = torch.randn(T, H, device=device), index, torch.rand(T, TOP_K, device=device)
    enabled = []

    def noted(pre):
        enabled.append(torch.is_autocast_enabled(device))
        return own_activation(pre)

    with torch.autocast(device, torch.bfloat16):
        experts(*rows, up, down, noted)
    assert enabled == [False]


def test_rows_of_one_projection(device):
    p = projection(INNER, H, device)
    x = torch.randn(T, H, device=device, requires_grad=True)
    sizes = [T - 5, 0, 5]
    assert_same_inside(device, [x, p.lora_A, p.lora_B], rows_linear(x, sizes, p))


# ---- an operator that nobody has written yet ----------------------------------------------------


class Factors(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


class Product(NamedTuple):
    product: torch.Tensor


def _product(name):
    """left @ right as an operator, whose backward is an operator too."""

    def run(factors):
        return Product(factors.left @ factors.right)

    def run_backward(gradient, factors):
        return Factors(gradient.gradient @ factors.right.mT, factors.left.mT @ gradient.gradient)

    def keep(factors, results):
        return (factors,)

    def input_gradients(backward, gradient, needs, factors):
        return tuple(backward(Gradient(gradient), factors))

    def fake_backward(gradient, factors):
        return Factors(torch.empty_like(factors.left), torch.empty_like(factors.right))

    return differentiable(
        Operator(name, (Factors,), Product, run, run),
        Operator(f"{name}_backward", (Gradient, Factors), Factors, run_backward, fake_backward),
        keep,
        input_gradients,
    )


def test_every_operator_runs_without_autocast(device):
    """Both directions of an operator choose their own dtypes, compiled or not."""
    product = _product("product_of_a_test")
    factors = Factors(*(torch.randn(32, 32, device=device, requires_grad=True) for _ in range(2)))
    exact = (factors.left @ factors.right).detach()

    def run():
        return product(factors)

    for call in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        with torch.autocast(device, torch.bfloat16):
            out = call()
            loss = out.square().sum()
            found = torch.autograd.grad(loss, factors)
        assert_close(out, exact)
        assert_close(found[0], 2 * exact @ factors.right.detach().mT)
        assert_close(found[1], 2 * factors.left.detach().mT @ exact)


def test_autocast_does_round_a_product():
    """Otherwise the tests above would say nothing."""
    leaves = [torch.randn(32, 32, requires_grad=True) for _ in range(2)]
    out = F.linear(*leaves)
    outside = gradients("cpu", leaves, out, False)
    inside = gradients("cpu", leaves, out, True)
    assert not torch.equal(inside[0], outside[0])
