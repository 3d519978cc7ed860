"""What code attaches to a module, and PyTorch runs around the module's forward."""

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks on a module run before or after its forward, or its backward."""
    before = module._forward_pre_hooks or module._backward_pre_hooks
    return bool(before or module._forward_hooks or module._backward_hooks)
