"""Moves weights that accelerate offloads to their execution device, and back after their use.

accelerate attaches a hook to each module. The hook fetches the module's weights before its forward
and sends them back after its forward has returned. The hook does not cover two cases, which this
file handles: modules whose weights are read although their forward is never called, and forwards
that end with an exception.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


def fetched(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Within this context the weights of `modules` are on their execution device.

    They are sent back at the end of the context, also after an exception, and also if fetching one
    of them fails. Modules without a hook of accelerate are not changed.
    """
    offloaded = [module for module in modules if _hook(module) is not None]
    if not offloaded:
        # torch.compile traces nullcontext without a graph break
        return nullcontext()
    return _fetch_and_send_back(offloaded)


def sent_back_after_exception(module: nn.Module) -> AbstractContextManager[None]:
    """After an exception within this context, the weights of `module` are sent back.

    accelerate sends them back only after a forward that returns. With non-reentrant gradient
    checkpointing, a recomputed forward ends with an exception as soon as it has computed what
    backward needs. Without this context the weights of every layer would then stay on the device.
    """
    if _hook(module) is None:
        return nullcontext()
    return _send_back_after_exception(module)


def call_between_hooks(
    module: nn.Module, function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
) -> torch.Tensor:
    """function(*args, **kwargs) with the weights of `module` and its submodules fetched.

    The function runs instead of `module.forward`, so accelerate does not call the hook of
    `module`. This function calls the hook, because the hook also moves inputs and outputs between
    devices.
    """
    submodules = [child for child in module.modules() if child is not module]
    hook = _hook(module)
    if hook is None:
        with fetched(submodules):
            return function(*args, **kwargs)
    with sent_back_after_exception(module):
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        with fetched(submodules):
            out = function(*args, **kwargs)
        return hook.post_forward(module, out)


def execution_device(module: nn.Module) -> torch.device | None:
    """The device that accelerate moves a module's weights to; None if it is not offloaded."""
    for child in module.modules():
        hook = _hook(child)
        # several hooks on one module are held by one SequentialHook
        for single in getattr(hook, "hooks", [hook]):
            device = getattr(single, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return None


def _hook(module: nn.Module) -> Any:
    """accelerate's hook on a module, or None."""
    # not getattr: where a module lacks an attribute, it takes nn.Module microseconds to say so
    return module.__dict__.get("_hf_hook")


def _send_back(module: nn.Module) -> None:
    _hook(module).post_forward(module, None)


@contextmanager
def _fetch_and_send_back(offloaded: list[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in offloaded:
            # registered before the fetch, because a fetch that fails may have moved some weights
            stack.callback(_send_back, module)
            _hook(module).pre_forward(module)
        yield


@contextmanager
def _send_back_after_exception(module: nn.Module) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _send_back(module)
        raise
