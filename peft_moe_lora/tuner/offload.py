"""Weights that accelerate offloads: on their execution device while they are read, then sent back.

accelerate attaches a hook to each module. The hook brings the module's weights in before its
forward and sends them back after its forward has returned. Two cases are left to this file: modules
whose weights are read although their forward is never called, and forwards that end with an
exception.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


def fetched(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Within this context the weights of `modules` are on their execution device.

    They are sent back at the end of the context, also if it ends with an exception, and also if
    fetching one of them fails. Modules without a hook of accelerate are left as they are.
    """
    offloaded = [module for module in modules if _hook(module) is not None]
    if not offloaded:
        # torch.compile traces this one without a graph break
        return nullcontext()
    return _fetch_and_send_back(offloaded)


def sent_back_after_exception(module: nn.Module) -> AbstractContextManager[None]:
    """An exception within this context sends the weights of `module` back before it passes on.

    accelerate sends them back after a forward that returns. Under non-reentrant checkpointing a
    recomputed forward ends with an exception as soon as it has computed what backward needs, so the
    weights of one layer after another would stay on the device.
    """
    if _hook(module) is None:
        return nullcontext()
    return _send_back_after_exception(module)


def call_between_hooks(
    module: nn.Module, function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
) -> torch.Tensor:
    """function(*args, **kwargs) with the weights of `module` and its submodules fetched.

    The function takes the place of `module.forward`, so accelerate does not call the hook of
    `module`. It is called here: it moves inputs and output between devices as well.
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
    """Where accelerate brings the weights of an offloaded module; None if it is not offloaded."""
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
    return getattr(module, "_hf_hook", None)


def _send_back(module: nn.Module) -> None:
    _hook(module).post_forward(module, None)


@contextmanager
def _fetch_and_send_back(offloaded: list[nn.Module]) -> Iterator[None]:
    with ExitStack() as stack:
        for module in offloaded:
            # registered first: a fetch that fails halfway has brought some weights in
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
