"""Follows a training step on the meta device: the bytes that are alive, and the time of each step.

    seconds of an operation = max(FLOPs / flops, bytes read and written / bandwidth, LAUNCH)

A tensor on the meta device has a shape and no values. Its storage is counted from the operation
that makes it until Python and autograd let go of it, as PyTorch's allocator would on a GPU.
"""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .gpus import GPUS
from .work import Work, work_of

# seconds of the host for one operation in eager mode, and the time of an operation of PyTorch over
# that of its FLOPs or bytes, fitted to steps of 8 layers (docs/plan.md; H200, 2026-11-21)
LAUNCH = 9e-6
SLOWDOWN = 1.55
# FLOP/s of products in fp32, without TF32, over those in bf16
FP32_PRODUCTS = 1 / 15


class Trace(TorchDispatchMode):
    """What the operations of a `with` block take.

    Tensors that are there before, as weights, are not counted.

    Attributes:
        decoding: bytes into which an experts layer decodes its quantized weights.
        live: bytes that are alive now.
        peak: the most bytes that were alive since `start_window`.
        peak_gradients: of these, bytes of gradients of parameters.
        gradients: bytes of gradients now.
        seconds: name of a GPU -> the sum over all operations.
    """

    def __init__(self) -> None:
        super().__init__()
        self.decoding = 0
        self.live = 0
        self.peak = 0
        self.peak_gradients = 0
        self.gradients = 0
        self.seconds = {gpu.name: 0.0 for gpu in GPUS}
        self._sizes: dict[int, int] = {}

    def start_window(self) -> None:
        """Look for the peak from here on."""
        self.peak = self.live
        self.peak_gradients = self.gradients

    def add(self, work: Work) -> None:
        """Count an operation that PyTorch does not see."""
        if self.live + work.scratch > self.peak:
            self.peak = self.live + work.scratch
            self.peak_gradients = self.gradients
        for gpu in GPUS:
            took = max(work.flops / gpu.flops, work.nbytes / gpu.bandwidth) * work.slowdown
            self.seconds[gpu.name] += max(took, LAUNCH * work.launches)

    def count_gradient(self, parameter: torch.Tensor) -> None:
        """A hook: the gradient of this parameter is complete."""
        assert parameter.grad is not None, "the hook runs after the gradient was accumulated"
        self.gradients += parameter.grad.nbytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._hold(tensor, counted=False)
        found = func(*args, **kwargs)
        made = [self._hold(tensor, counted=True) for tensor in _tensors(found)]
        work = work_of(func, args, found)
        if work is not None:
            self.add(work.decoding(self.decoding))
        elif any(made) or func._schema.is_mutable:
            self.add(_plain_work(func, args, kwargs, found))
        return found

    def _hold(self, tensor: torch.Tensor, counted: bool) -> bool:
        """Follow a tensor's storage until it is freed; whether it was new."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._sizes:
            return False
        nbytes = storage.nbytes() if counted else 0
        self._sizes[key] = nbytes
        self.live += nbytes
        weakref.finalize(storage, self._free, key)
        return True

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def _plain_work(func: Any, args: Any, kwargs: Any, found: Any) -> Work:
    """An operation of PyTorch, which reads its arguments once and writes its results once."""
    if func.overloadpacket in (torch.ops.aten.empty, torch.ops.aten.empty_like):
        return Work(launches=0)
    flops = 0.0
    if func.overloadpacket in flop_registry:
        flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=found)
        if found.dtype == torch.float32:
            flops /= FP32_PRODUCTS
    nbytes = sum(tensor.nbytes for tensor in _tensors((args, kwargs, found)))
    return Work(flops=flops, nbytes=nbytes, slowdown=SLOWDOWN)


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    return (value for value in tree_leaves(values) if isinstance(value, torch.Tensor))
