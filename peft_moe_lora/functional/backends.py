"""Chooses the operations, Triton kernels or plain PyTorch, from the backend and the device."""

import importlib.util
import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

from ..ops import Operations, reference

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "torch")


def select_backend(backend: str, device: torch.device) -> str:
    """The backend that runs on a device, "triton" or "torch", for one of BACKENDS.

    Raises:
        RuntimeError: if the backend is "triton" and it cannot run on the device.
    """
    if backend == "torch":
        return "torch"
    obstacle = _triton_obstacle(device.type, device.index)
    if backend == "triton":
        if obstacle:
            raise RuntimeError(
                f'backend="triton" cannot run here: {obstacle}. Use backend="auto" or "torch".'
            )
        return "triton"
    if device.type == "cuda" and not obstacle:
        return "triton"
    return "torch"


def ops_for(backend: str, device: torch.device) -> Operations:
    """The operations that run on a device, for one of BACKENDS.

    The choice of "auto" is shown once for each kind of device.
    """
    # a line that is written while torch.compile traces would break the graph
    if torch.compiler.is_compiling():
        return _operations(select_backend(backend, device))
    return _shown_operations(backend, device)


def on_device_of(x: torch.Tensor) -> AbstractContextManager:
    """Make the device of x the current device, because kernels are launched on the current one.

    The layers of one model may be on several devices.
    """
    # code compiled by torch.compile sets the device itself
    if torch.compiler.is_compiling() or not x.is_cuda:
        return nullcontext()
    if x.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device_of(x)


# nothing that it depends on changes within a process
@cache
def _shown_operations(backend: str, device: torch.device) -> Operations:
    """The same, after the choice of "auto" is shown."""
    chosen = select_backend(backend, device)
    if backend == "auto":
        _show_choice(chosen, device.type, _triton_obstacle(device.type, device.index))
    return _operations(chosen)


def _operations(chosen: str) -> Operations:
    if chosen == "torch":
        return reference
    from ..ops import kernels

    return kernels


@cache
def _triton_obstacle(device_type: str, index: int | None) -> str:
    """The reason why the kernels cannot run on this device; empty if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    # PyTorch calls AMD's GPUs "cuda" too
    if device_type == "cuda" and torch.version.hip is not None:
        return f"it needs CUDA, got ROCm {torch.version.hip}, for which no kernel was written"
    if device_type == "cuda":
        capability = torch.cuda.get_device_capability(index)
        if capability < (8, 0):
            return f"it needs compute capability 8.0 or newer, got {capability}"
        return ""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return ""
    return f"it needs a CUDA device, got {device_type!r}"


@cache
def _show_choice(chosen: str, device_type: str, obstacle: str) -> None:
    """One line: a warning where a GPU runs no kernel, else for whoever did not set up logging."""
    if device_type == "cuda" and chosen == "torch":
        logger.warning('backend="auto" falls back to "torch" on cuda: %s.', obstacle)
        return
    line = f'peft_moe_lora: backend="auto" picked "{chosen}" on {device_type}.'
    if logger.hasHandlers():
        logger.info(line)
    else:
        print(line, file=sys.stderr)
