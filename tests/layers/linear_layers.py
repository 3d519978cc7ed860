"""Modules of linear layers with an adapter, and one training step of them."""

import copy

import torch
from peft.tuners import lora
from torch import nn

from helpers import assert_close, moe_lora

B, T, H, N = 2, 7, 32, 48


class Projections(nn.Module):
    """q, k and v of one input, added; o of their sum."""

    def __init__(self, bias=False, linear=nn.Linear):
        super().__init__()
        torch.manual_seed(0)
        for name in "qkv":
            setattr(self, name, linear(H, N, bias=bias))
        self.o = linear(N, H, bias=bias)

    def forward(self, x):
        return self.o(torch.tanh(self.q(x) + self.k(x) + self.v(x)))


def adapted(base=None, dtype=torch.float32, **config):
    """`Projections` with a random adapter; the layers in `dtype`, A and B in fp32."""
    base = (base or Projections()).to(dtype)
    return moe_lora(base, **{"target_modules": ["q", "k", "v", "o"], **config})


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(B, T, H, generator=generator).to(dtype).requires_grad_()


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, lora.LoraLayer)]


def step(model, x):
    """The output, dx and the gradients of A and B, by name."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    out.backward(direction.to(out))
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    return {"y": out.detach(), "dx": x.grad, **grads}


def slow(model):
    """A copy in which PEFT's forward runs."""
    model = copy.deepcopy(model)
    for layer in layers_of(model):
        layer.fast = dict.fromkeys(layer.fast, False)
    return model


def assert_steps_agree(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert_close(found[name], tensor, tolerance, name)
