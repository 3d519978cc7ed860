"""Layers in 16 bits whose widths are no multiples of 8, by kernels: copies of them are computed."""

import pytest
import torch

from ops.problems import CUDA, DEVICE
from peft_moe_lora.functional import Projection, experts, widths
from peft_moe_lora.ops import Activation

E, T, TOP_K, R = 4, 40, 2, 5
DTYPE = torch.float16
CASES = {
    "gated": (33, 17, Activation(), False),
    "H fits": (40, 20, Activation(), False),
    "I fits": (36, 24, Activation("relu2", gated=False), False),
    "interleaved": (36, 17, Activation(interleaved=True, limit=0.8, up_shift=1.0), True),
}


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_those_of_fp64(kernels, case, monkeypatch):
    H, I, activation, transposed = CASES[case]  # noqa: E741
    torch.manual_seed(0)

    def draw(*shape, std=1.0, dtype=DTYPE):
        return (torch.randn(*shape, device=DEVICE) * std).to(dtype)

    frozen, leaves = [], [draw(T, H), torch.rand(T, TOP_K, device=DEVICE)]
    for N, K in ((activation.columns(I), H), (H, I)):
        weight = draw(E, N, K, std=K**-0.5)
        if transposed:
            weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
        frozen += [(weight, draw(E, N))]
        # the update is as large as what it is added to
        leaves += [draw(R * E, K, std=K**-0.5, dtype=torch.float32)]
        leaves += [draw(N, R * E, std=R**-0.5, dtype=torch.float32)]
    index = torch.randint(E + 1, (T, TOP_K), device=DEVICE)
    dout = draw(T, H)
    seeds = torch.tensor([[7, 0], [8, 0]], device=DEVICE)

    def results(dtype, backend):
        exact = dtype == torch.float64
        tensors = [(t.double() if exact else t).requires_grad_() for t in map(torch.clone, leaves)]
        x, weights, *pairs = tensors
        layer = []
        for (weight, bias), A, B in zip(frozen, pairs[::2], pairs[1::2], strict=True):
            layer += [Projection(weight.to(dtype), bias.to(dtype), A, B, dropout_p=0.3)]
        out = experts(x, index, weights, *layer, activation, backend=backend, seeds=seeds)
        return [out.detach(), *torch.autograd.grad(out, tensors, dout.to(dtype))]

    copied = []
    plain = widths._resized
    monkeypatch.setattr(widths, "_resized", lambda t, n: copied.append(n) or plain(t, n))
    expected = results(torch.float64, "torch")
    assert not copied
    # called, recorded, replayed; the interpreter only calls
    for _ in range(4 if CUDA else 1):
        for found, right in zip(results(DTYPE, "triton"), expected, strict=True):
            assert found.shape == right.shape
            assert (found.double() - right).norm() < 4e-3 * right.norm()
    assert copied


def test_which_widths_are_rounded_up(kernels):
    for dtype in (torch.bfloat16, torch.float16):
        assert kernels.fast_widths((2040, 764), dtype) == (2048, 768)
        assert kernels.fast_widths((1500, 563), dtype) == (1504, 576)
        # rows begin at multiples of 16 bytes: no copies
        assert kernels.fast_widths((2008, 760), dtype) == (2008, 760)
    assert kernels.fast_widths((2047, 767), torch.float32) == (2047, 767)
