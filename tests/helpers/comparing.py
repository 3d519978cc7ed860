"""Two tensors, two gradients, one model before and after: are they the same?"""

import torch

from helpers.sizes import FP32


def relative_error(actual, expected):
    """max |actual - expected| / max |expected|, float; 0 for two empty tensors."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} against {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    actual = actual.detach().double()
    expected = expected.detach().double()
    assert torch.isfinite(expected).all(), "the expected values are not finite"
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def assert_close(actual, expected, tolerance=FP32, what="values"):
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e} is above {tolerance:.0e}"


def assert_share_of_order_one(with_adapter, without, low=0.3, high=3.0):
    """The adapter changes the output by about the output's own size, so a wrong adapter fails."""
    share = ((with_adapter - without).double().norm() / without.double().norm()).item()
    assert low <= share <= high, (
        f"the adapter's share of the output is {share:.3f}, not of order one"
    )


def grads_of(call, inputs, seed=3):
    """The output of `call()`, and the gradients of a fixed random weighting of it for `inputs`."""
    out = call()
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(out.shape, generator=generator).to(out)
    return out.detach(), torch.autograd.grad(out, inputs, direction)


def snapshot(model):
    """All that a failed call must leave as it was: modules, state and what is trainable."""
    return {
        "modules": {name: (id(module), type(module)) for name, module in model.named_modules()},
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after["modules"] == before["modules"], "modules were replaced or added"
    assert after["requires_grad"] == before["requires_grad"], "requires_grad changed"
    assert after["state"].keys() == before["state"].keys(), "the state dict has other keys"
    for name, tensor in before["state"].items():
        assert torch.equal(after["state"][name], tensor), f"{name} changed"
