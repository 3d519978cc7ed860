"""An adapter that bitsandbytes' 8-bit AdamW trains, beside one that PyTorch's trains in fp32."""

import copy

import pytest
import torch

STEPS, LR = 20, 1e-3
# a moment in 8 bits is exact to 2 digits near the largest of its block of 256, and less below:
# of a tensor's movement, 2 % to 24 % differed after 20 steps on a CPU; of B, with 40 tokens on an
# H200 and in plain PyTorch, 44 %: there the gradients of one block differ most
MOVED = 0.4
# losses that fell to 1/11 differed by 0.8 %
LOSS = 0.03


def in_8bit(parameters):
    """The optimizer that a Trainer makes for optim="adamw_8bit"."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra [bitsandbytes] is missing")
    return bitsandbytes.optim.AdamW(parameters, lr=LR, optim_bits=8)


def in_fp32(parameters):
    return torch.optim.AdamW(parameters, lr=LR, fused=True)


def _train(model, loss_of, optimizer_of):
    """Every loss, and name -> how far a parameter moved."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    start = {n: p.detach().clone() for n, p in parameters.items()}
    addresses = [p.data_ptr() for p in parameters.values()]
    optimizer = optimizer_of(list(parameters.values()))
    losses = []
    for _ in range(STEPS):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    # recorded launches and CUDA graphs read the same addresses
    assert addresses == [p.data_ptr() for p in parameters.values()]
    return losses, {n: p.detach() - start[n] for n, p in parameters.items()}


def trained_in_8bit(model, loss_of, plain=None):
    """A copy of a model, trained; it moved as far as in fp32, within the error of 8 bits.

    Args:
        loss_of: a model -> its loss.
        plain: the same model, computed by plain PyTorch. Where its gradients differ by orders of
            magnitude within a block, 8 bits lose the small ones, and more than MOVED is allowed.
    """
    copied, errors = _trained_both_ways(model, loss_of)
    allowed = dict.fromkeys(errors, MOVED)
    if plain is not None:
        _, of_8_bits = _trained_both_ways(plain, loss_of)
        allowed = {n: max(MOVED, 1.5 * error) for n, error in of_8_bits.items()}
    assert all(errors[n] < allowed[n] for n in errors), (errors, allowed)
    # moments in fp32 give 1e-6: these are in 8 bits
    assert max(errors.values()) > 1e-3, errors
    return copied


def _trained_both_ways(model, loss_of):
    """A copy of a model, trained in 8 bits, and name -> how its movement differs from fp32's."""
    expected_losses, expected = _train(copy.deepcopy(model), loss_of, in_fp32)
    copied = copy.deepcopy(model)
    losses, moved = _train(copied, loss_of, in_8bit)
    assert losses[-1] < 0.9 * losses[0]
    assert losses == pytest.approx(expected_losses, rel=LOSS)
    return copied, {n: ((moved[n] - d).norm() / d.norm()).item() for n, d in expected.items()}
