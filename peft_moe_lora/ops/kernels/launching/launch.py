"""Launch a kernel that is already compiled, without Triton's own look-up of that kernel.

At each launch Triton binds and specializes about forty arguments in Python. On a slow host this
takes 30 to 60 us (2026-11-21), longer than many of these kernels run. Here the operation passes a
key. The first launch with a key goes through Triton; then the compiled kernel and the arguments
that never change are stored under the key. Later launches with that key use what is stored.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from inspect import signature
from typing import Any

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

# Triton 3.5 does not go on where a kernel does not compile. There nothing is compiled ahead; drop
# when the floor is 3.6
COMPILES_AHEAD = "ignore_errors" in signature(triton.AsyncCompileMode).parameters

# options of every kernel whose constexprs do not say otherwise. Said aloud because Triton 3.9 warns
# that its default will change
OPTIONS = {"enable_fp_fusion": True}

Grid = tuple[int, int, int]
# returns (the arguments after `sizes`, the constexprs)
Rest = Callable[[], tuple[tuple, dict[str, Any]]]

# {(key, device): (compiled kernel, its run method, the arguments after `sizes`)}
_plans: dict[tuple[tuple, int], tuple[CompiledKernel, Callable, tuple]] = {}
# held while a thread loads the C function that passes the arguments to a kernel. Triton loads each
# as a Python module, all of one name. When CPython loads such a file for a second time, it writes
# the functions into the module of that name which was loaded last. If threads load at once, one may
# get the function of another's kernel: the launch fails, or passes the arguments in a wrong order
_loading = threading.RLock()
# state of each thread. `current`: the recording of the thread's launches, or None. `ahead`: {key:
# launch}, the launches whose kernels `compile_ahead` will compile, or None outside of it. `bound`:
# whether the thread has a CUDA context
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

    A stored kernel is launched without Triton's launch hooks, which profilers set.

    Args:
        key: all that determines which kernel is compiled and what `rest` returns, except the
            alignment of the tensors.
        tensors: at least one tensor, all of them on one device; the others may be None.
        rest: returns (fixed, constants): the arguments after `sizes`, and the constexprs. It is
            called only if no stored kernel can be launched.
        sizes: ints that change with the batch; the kernel must not specialize on them.
        descriptors: tensor descriptors or None.
    """
    device = next(t for t in tensors if t is not None).get_device()
    bind(device)
    # addresses instead of tensors: for a tensor, Triton's launcher would query the driver
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    union = 0
    for pointer in pointers:
        union |= pointer or 0
    aligned = not union & 15
    found = None
    # stored kernels need addresses that are multiples of 16 bytes. In the rare other case Triton
    # launches, and specializes argument by argument
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
    with _loading:
        compiled = kernel[grid](*operands, **{**OPTIONS, **constants})
    # in the interpreter nothing is compiled, and `compiled` is None
    if compiled is not None and aligned:
        constexprs = [constants[name] for name in kernel.arg_names[len(operands) :]]
        _plans[key, device] = compiled, compiled.run, (*fixed, *constexprs)


def bind(device: int) -> None:
    """Give this thread a CUDA context, once.

    PyTorch creates the context of a thread at its first call that needs one. Encoding a tensor
    descriptor needs a context too, but does not create it. Autograd runs backward in a thread of
    its own. Without this function, encoding fails if the first kernel of that thread takes a
    descriptor.

    Args:
        device: index of a CUDA device; negative for a tensor elsewhere, which needs no context.
    """
    if device >= 0 and not getattr(recorder, "bound", False):
        torch.zeros((), device=torch.device("cuda", device))
        recorder.bound = True


def compile_ahead(function: Callable, *arguments: Any) -> None:
    """Compile, in parallel threads, all the kernels that function(*arguments) will launch.

    This takes half as long as compiling one kernel after another. The function is called, but its
    launches are skipped; so it must only call operations of this package and compute nothing else.
    If a kernel does not compile, no error is raised here, but when the kernel is launched.
    """
    recorder.ahead = {}
    try:
        function(*arguments)
        missing = list(recorder.ahead.values())
    finally:
        recorder.ahead = None
    if len(missing) > 1 and COMPILES_AHEAD:
        device = arguments[0].get_device()
        # in a copy of the context: otherwise, after an interruption, Triton would still submit
        # compilations to the closed thread pool
        copy_context().run(_compile_at_once, missing, device)


def _compile_at_once(launches: list[tuple], device: int) -> None:
    """Compile and load the kernel of each (kernel, grid, operands, rest)."""

    def build(kernel: Any) -> CompiledKernel | None:
        compiled = kernel
        if hasattr(kernel, "result"):
            compiled = kernel.result(ignore_errors=True)
        if compiled is not None:
            # compiles the C function into Triton's cache; what is loaded here may be a function of
            # another kernel, and is dropped
            with torch.cuda.device(device):
                driver.active.launcher_cls(compiled.src, compiled.metadata)
        return compiled

    with _loading:
        with ThreadPoolExecutor() as pool:
            with triton.AsyncCompileMode(pool, ignore_errors=True):
                kernels = []
                for kernel, grid, operands, rest in launches:
                    fixed, constants = rest()
                    options = {**OPTIONS, **constants}
                    kernels.append(kernel.warmup(*operands, *fixed, grid=grid, **options))
            built = list(pool.map(build, kernels))
        # one after the other, from the cache
        with torch.cuda.device(device):
            for compiled in built:
                if compiled is not None:
                    _ = compiled.run


def forget() -> None:
    """Drop all stored kernels. Call this after a change of the table of block sizes."""
    _plans.clear()


def facts(*tensors: torch.Tensor | None) -> tuple:
    """(dtype, strides) of each tensor, or None for None; used as a part of a key."""
    return tuple([None if t is None else (t.dtype, t.stride()) for t in tensors])
