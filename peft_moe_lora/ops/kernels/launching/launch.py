"""Launch a compiled kernel without asking again which one it is.

Triton's own launch binds and specializes some forty arguments in Python every time: 30 to 60 us a launch on a slow
host (2026-11-21), more than many of these kernels run. Here a key that the operation knows finds what the first launch
compiled, and the arguments that never change under that key.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import torch
import triton
from triton.runtime import JITFunction, driver

_plans = {}
# of this thread: `current`, what takes down its launches, or None; `ahead`, while `compile_ahead` runs, {key: launch};
# `bound`, whether it has a CUDA context
recorder = threading.local()


def launch(
    key: tuple, kernel, grid: tuple[int, int, int], tensors: tuple, rest, sizes=(), descriptors=()
) -> None:
    """kernel[grid](*descriptors, *tensors, *sizes, *fixed, **constants) on the current device.

    Launch hooks of profilers are not called.

    Args:
        key: all that decides which kernel is compiled and what `rest` gives; the tensors' alignment aside.
        tensors: the first is none of those that may be None.
        rest: called once per key, gives (fixed, constants): the arguments after `sizes`, and the constexprs.
        sizes: ints that follow the batch; the kernel does not specialize on them.
        descriptors: tensor descriptors or None.
    """
    device, union = tensors[0].get_device(), 0
    bind(device)
    # addresses, because the launcher asks the driver about every tensor it is given
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    for pointer in pointers:
        union |= pointer or 0
    # an address off sixteen is specialized argument by argument: rare, and left to Triton
    found = None if union & 15 else _plans.get((key, device))
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
        recording.fail("launches a kernel by Triton's own way")
    fixed, constants = rest()
    compiled = kernel[grid](*descriptors, *tensors, *sizes, *fixed, **constants)
    # the interpreter compiles nothing
    if compiled is not None and not union & 15:
        names = kernel.arg_names[len(descriptors) + len(tensors) + len(sizes) + len(fixed) :]
        _plans[key, device] = compiled, compiled.run, (*fixed, *(constants[name] for name in names))


def bind(device: int) -> None:
    """Give this thread a CUDA context, once.

    torch's threads get theirs with the first call that needs one. Encoding a tensor descriptor needs it and does not
    ask: the first backward of a process, in autograd's own thread, failed where it began with a descriptor.

    Args:
        device: index, negative for no CUDA device.
    """
    if device >= 0 and not getattr(recorder, "bound", False):
        torch.zeros((), device=torch.device("cuda", device))
        recorder.bound = True


def compile_ahead(function, *arguments) -> None:
    """Compile what function(*arguments) will launch, all at once, in threads: half the seconds of one by one.

    The function is called, and its launches left out: it composes operations of this package, and nothing else. What
    does not compile says so when it is launched.
    """
    recorder.ahead = {}
    try:
        function(*arguments)
        missing = list(recorder.ahead.values())
    finally:
        recorder.ahead = None
    if len(missing) > 1:
        # in a context of its own: interrupted, Triton would go on handing what it compiles to a pool that is no more
        copy_context().run(_compile_at_once, missing, arguments[0].get_device())


def _compile_at_once(launches: list[tuple], device: int) -> None:
    """Compile and load the kernels of (kernel, grid, operands, rest) each."""

    def load(kernel):
        compiled = kernel.result(ignore_errors=True) if hasattr(kernel, "result") else kernel
        if compiled is not None:
            # compiles too, in C: what passes the arguments on
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
    """Drop what was compiled, after a change of the table."""
    _plans.clear()


def facts(*tensors: torch.Tensor | None) -> tuple:
    """dtype and strides of each tensor, for a key."""
    return tuple([None if t is None else (t.dtype, t.stride()) for t in tensors])
