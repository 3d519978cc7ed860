"""What code attaches to a module, and PyTorch runs around the module's forward."""

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks on a module run before or after its forward, or its backward."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
    )


def is_hooked_by_others(module: nn.Module) -> bool:
    """The same, without DeepSpeed's hooks on a module of no parameters.

    ZeRO-3 hooks every module to fetch its parameters, and has nothing to do where there are none.
    """
    if not is_hooked(module):
        return False
    if next(module.parameters(), None) is not None:
        return True
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    hooks += [*module._backward_pre_hooks.values(), *module._backward_hooks.values()]
    # a callable may say None of its module
    modules = [getattr(hook, "__module__", None) or "" for hook in hooks]
    return not all(module.startswith("deepspeed.") for module in modules)
