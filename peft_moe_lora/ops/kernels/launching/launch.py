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
from functools import reduce
from inspect import signature
from operator import or_
from typing import Any, NamedTuple

import torch
import triton
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from .nested import Text, as_constexprs, function_of, replaced, tensors_in

# Triton 3.5 does not go on where a kernel does not compile. There nothing is compiled ahead; drop
# when the floor is 3.6
COMPILES_AHEAD = "ignore_errors" in signature(triton.AsyncCompileMode).parameters

# options of every kernel whose constexprs do not say otherwise. Said aloud because Triton 3.9 warns
# that its default will change
OPTIONS = {"enable_fp_fusion": True}

Grid = tuple[int, int, int]
# returns (operands, numbers, constants): tensors and what belongs to them, and numbers that do not
# change with the batch, both in nested tuples; and the constexprs
Arguments = Callable[[], tuple[tuple, tuple, dict[str, Any]]]


class Plan(NamedTuple):
    """A stored kernel.

    Attributes:
        run: the compiled kernel's method `run`.
        made: takes the addresses of the tensors and the sizes; returns operands, sizes and numbers.
        template: what `made` returns, with expressions in the place of what it takes.
        constants: the constexprs, in their order.
    """

    compiled: CompiledKernel
    run: Callable
    made: Callable[..., tuple]
    template: tuple
    constants: tuple


# {(key, device): the stored kernel}
_plans: dict[tuple[tuple, int], Plan] = {}
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
    arguments: Arguments,
    sizes: tuple[int, ...] = (),
    descriptors: tuple = (),
) -> None:
    """kernel[grid](*descriptors, *operands, *sizes, *numbers, **constants) on the current device.

    A stored kernel is launched without Triton's launch hooks, which profilers set.

    Args:
        key: all that determines which kernel is compiled and what `arguments` returns, except the
            tensors' addresses.
        tensors: at least one tensor, all of them on one device: those of the operands, in their
            order; others may be None.
        arguments: returns (operands, numbers, constants). It is called only if no stored kernel can
            be launched.
        sizes: ints that change with the batch; the kernel must not specialize on them.
        descriptors: tensor descriptors or None.
    """
    device = _device_of(tensors)
    bind(device)
    # addresses instead of tensors: for a tensor, Triton's launcher would query the driver
    addresses = [t.data_ptr() for t in tensors if t is not None]
    aligned = not reduce(or_, addresses) & 15
    found = None
    # stored kernels need addresses that are multiples of 16 bytes. In the rare other case Triton
    # launches, and specializes argument by argument
    if aligned:
        found = _plans.get((key, device))
    ahead = getattr(recorder, "ahead", None)
    if ahead is not None:
        if found is None and isinstance(kernel, JITFunction):
            ahead.setdefault(key, (kernel, grid, descriptors, sizes, arguments))
        return
    recording = getattr(recorder, "current", None)
    if found is not None:
        compiled, run, made, _, constants = found
        if recording is not None:
            recording.add(found, grid, tensors, sizes, descriptors)
        stream = driver.active.get_current_stream(device)
        run(
            *grid, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *descriptors, *made(*addresses, *sizes), *constants,
        )  # fmt: skip
        return
    if recording is not None:
        recording.fail("launches a kernel by Triton's own launcher")
    operands, numbers, constexprs = arguments()
    given = [id(t) for t in tensors if t is not None]
    in_order = [id(t) for t in tensors_in(operands)]
    assert given == in_order, f"tensors of {key[0]} are not in their order"
    before = (*descriptors, *operands, *sizes, *numbers)
    with _loading:
        compiled = kernel[grid](*before, **{**OPTIONS, **as_constexprs(constexprs)})
    # in the interpreter nothing is compiled, and `compiled` is None
    if compiled is not None and aligned:
        constants = tuple([constexprs[name] for name in kernel.arg_names[len(before) :]])
        _plans[key, device] = plan_of(compiled, operands, len(sizes), numbers, constants)


def _device_of(tensors: tuple[torch.Tensor | None, ...]) -> int:
    """Index of the device of the first tensor."""
    for tensor in tensors:
        if tensor is not None:
            return tensor.get_device()
    raise AssertionError("a launch without tensors")


def plan_of(
    compiled: CompiledKernel, operands: tuple, num_sizes: int, numbers: tuple, constants: tuple
) -> Plan:
    """The plan of a compiled kernel for launches with such arguments."""
    addresses = [Text(f"address{n}") for n, _ in enumerate(tensors_in(operands))]
    sizes = [Text(f"size{n}") for n in range(num_sizes)]
    template = (*replaced(operands, iter(addresses)), *sizes, *numbers)
    made = function_of(",".join([*addresses, *sizes]), template)
    return Plan(compiled, compiled.run, made, template, constants)


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
    """Compile and load the kernel of each (kernel, grid, descriptors, sizes, arguments)."""

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
                for kernel, grid, descriptors, sizes, arguments in launches:
                    operands, numbers, constexprs = arguments()
                    options = {**OPTIONS, **as_constexprs(constexprs)}
                    before = (*descriptors, *operands, *sizes, *numbers)
                    kernels.append(kernel.warmup(*before, grid=grid, **options))
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
