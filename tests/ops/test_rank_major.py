"""B in PEFT's order of columns: the kernels bring it into theirs within the replayed call."""

import pytest
import torch

from ops.problems import DEVICE
from peft_moe_lora.functional import Projection, experts
from peft_moe_lora.ops import Activation

# all sizes differ, so that no wrong order of columns fits by chance
E, T, TOP_K, H, INNER = 6, 40, 2, 32, 64


def rank_major(lora_B, r):
    """[N, r*E] expert-major -> rank-major."""
    return lora_B.detach().view(len(lora_B), E, r).transpose(1, 2).reshape(lora_B.shape)


@pytest.mark.parametrize("r", [3, pytest.param(16, marks=pytest.mark.long)])
def test_output_and_gradients_are_those_of_the_other_order(kernels, r):
    torch.manual_seed(0)

    def draw(*shape, std=1.0):
        return torch.randn(*shape, device=DEVICE) * std

    ours, theirs = [], []
    for N, K in ((2 * INNER, H), (H, INNER)):
        weight = draw(E, N, K, std=K**-0.5)
        # the update is as large as what it is added to
        A = draw(r * E, K, std=K**-0.5).requires_grad_()
        B = draw(N, r * E, std=r**-0.5).requires_grad_()
        ours.append(Projection(weight, None, A, B))
        turned = rank_major(B, r).requires_grad_()
        theirs.append(Projection(weight, None, A.detach(), turned, rank_major=True))
    x, weights = draw(T, H), torch.rand(T, TOP_K, device=DEVICE)
    index = torch.randint(E + 1, (T, TOP_K), device=DEVICE)
    expected = experts(x, index, weights, *ours, Activation(), backend="torch")
    expected.square().sum().backward()
    for _ in range(4):  # called, recorded, replayed
        for projection in theirs:
            projection.lora_B.grad = None
        out = experts(x, index, weights, *theirs, Activation(), backend="triton")
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
        out.square().sum().backward()
        for found, right in zip(theirs, ours, strict=True):
            gradient = rank_major(right.lora_B.grad, r)
            assert gradient.abs().max() > 0
            torch.testing.assert_close(found.lora_B.grad, gradient, rtol=1e-3, atol=1e-3)
