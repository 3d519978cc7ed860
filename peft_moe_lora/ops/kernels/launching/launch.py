"""Launch a compiled kernel without asking again which one it is.

Triton's own launch binds and specializes some forty arguments in Python each time, which takes
longer than many of these kernels run (30 to 60 us a launch on a slow host, 2026-11-21). Here the
operation gives a key. Under a key the first launch, by Triton, leaves its compiled kernel and the
arguments that never change; later launches find both there.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

Grid = tuple[int, int, int]
# the arguments after `sizes`, and the constexprs
Rest = Callable[[], tuple[tuple, dict[str, Any]]]

# {(key, device): (compiled kernel, its run method, the arguments after `sizes`)}
_plans: dict[tuple[tuple, int], tuple[CompiledKernel, Callable, tuple]] = {}
# state of each thread. `current`: the recording that notes its launches, or None. `ahead`: within
# `compile_ahead` the launches to compile for, {key: launch}. `bound`: whether it has a CUDA context
recorder = threading.local()


def launch(
    key: tuple,
    kernel: JITFunction,
    grid: Grid,
    tensors: tuple[torch.Tensor | None, ...],
    rest: Rest,
    sizes: tuple[int, ...] = (),
    descriptors: tuple = (),
) -> None:
    """kernel[grid](*descriptors, *tensors, *sizes, *fixed, **constants) on the current device.

    Launch hooks, which profilers set, are not called.

    Args:
        key: all that decides which kernel is compiled and what `rest` gives, except the alignment
            of the tensors.
        tensors: the first must be a tensor, the others may be None.
        rest: gives (fixed, constants): the arguments after `sizes`, and the constexprs. Called only
            where the key has no compiled kernel yet.
        sizes: ints that change with the batch; the kernel must not specialize on them.
        descriptors: tensor descriptors or None.
    """
    device = tensors[0].get_device()
    bind(device)
    # addresses, because for a tensor Triton's launcher would ask the driver
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    union = 0
    for pointer in pointers:
        union |= pointer or 0
    aligned = not union & 15
    found = None
    # for addresses off 16 bytes, which are rare, Triton specializes argument by argument
    if aligned:
        found = _plans.get((key, device))
    ahead = getattr(recorder, "ahead", None)
    if ahead is not None:
        if found is None and isinstance(kernel, JITFunction):
            ahead.setdefault(key, (kernel, grid, (*descriptors, *tensors, *sizes), rest))
        return
    recording = getattr(recorder, "current", None)
    if found is not None:
        compiled, run, tail = found
        if recording is not None:
            recording.add(compiled, run, grid, tensors, sizes, tail, descriptors)
        stream = driver.active.get_current_stream(device)
        run(
            *grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *descriptors, *pointers, *sizes, *tail,
        )  # fmt: skip
        return
    if recording is not None:
        recording.fail("launches a kernel by Triton's own launcher")
    fixed, constants = rest()
    operands = (*descriptors, *tensors, *sizes, *fixed)
    compiled = kernel[grid](*operands, **constants)
    # the interpreter compiles nothing
    if compiled is not None and aligned:
        constexprs = [constants[name] for name in kernel.arg_names[len(operands) :]]
        _plans[key, device] = compiled, compiled.run, (*fixed, *constexprs)


def bind(device: int) -> None:
    """Give this thread a CUDA context, once.

    A thread of torch gets its context with the first call that needs one. Encoding a tensor
    descriptor needs a context and does not ask for it: without this, a process whose first backward
    begins with a descriptor fails, because backward runs in a thread of autograd's own.

    Args:
        device: index of a CUDA device; negative for a tensor elsewhere, which needs no context.
    """
    if device >= 0 and not getattr(recorder, "bound", False):
        torch.zeros((), device=torch.device("cuda", device))
        recorder.bound = True


def compile_ahead(function: Callable, *arguments: Any) -> None:
    """Compile, in parallel threads, all the kernels that function(*arguments) will launch.

    It takes half the seconds of one kernel after the other. The function is called with its
    launches left out, so it must compose operations of this package and compute nothing else.
    A kernel that does not compile is passed over: its launch raises the error.
    """
    recorder.ahead = {}
    try:
        function(*arguments)
        missing = list(recorder.ahead.values())
    finally:
        recorder.ahead = None
    if len(missing) > 1:
        device = arguments[0].get_device()
        # in a context of its own: after an interruption Triton would otherwise go on sending what
        # it compiles to the closed pool
        copy_context().run(_compile_at_once, missing, device)


def _compile_at_once(launches: list[tuple], device: int) -> None:
    """Compile and load the kernel of each (kernel, grid, operands, rest)."""

    def load(kernel: Any) -> None:
        compiled = kernel
        if hasattr(kernel, "result"):
            compiled = kernel.result(ignore_errors=True)
        if compiled is not None:
            # reading `run` compiles the C function that passes the arguments on
            with torch.cuda.device(device):
                _ = compiled.run

    with ThreadPoolExecutor() as pool:
        with triton.AsyncCompileMode(pool, ignore_errors=True):
            kernels = []
            for kernel, grid, operands, rest in launches:
                fixed, constants = rest()
                kernels.append(kernel.warmup(*operands, *fixed, grid=grid, **constants))
        list(pool.map(load, kernels))


def forget() -> None:
    """Drop all compiled kernels: needed after a change of the table."""
    _plans.clear()


def facts(*tensors: torch.Tensor | None) -> tuple:
    """dtype and strides of each tensor, for a key."""
    return tuple([None if t is None else (t.dtype, t.stride()) for t in tensors])
