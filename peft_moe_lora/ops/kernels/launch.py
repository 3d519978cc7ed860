"""Launch a compiled kernel without asking again which one it is.

Triton's own launch binds and specializes some forty arguments in Python every time: 30 to 60 us a launch on a slow
host (2026-11-21), more than many of these kernels run. Here a short key finds what the first launch compiled.
"""

import torch
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

_compiled = {}


def launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """`kernel[grid](*arguments, **constants)`, on the current device; launch hooks of profilers are not called.

    Args:
        arguments: in the kernel's order; the first is a tensor.
        constants: the kernel's constexprs, num_warps and num_stages; in the same order at every call of one kernel.
    """
    # what Triton specializes on: dtypes; of an int that it is one, a multiple of sixteen, wider than 32 bits
    key, pointers = [id(kernel), arguments[0].device], 0
    for a in arguments:
        if type(a) is int:
            key.append((a == 1) + 2 * (not a & 15) + 4 * (a > 0x7FFFFFFF))
        elif isinstance(a, torch.Tensor):
            key.append(a.dtype)
            pointers |= a.data_ptr()
        else:
            key.append(a.base.dtype if isinstance(a, TensorDescriptor) else type(a))
    key = (*key, *constants.values())
    found = None if pointers & 15 else _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **constants)
        # the interpreter compiles nothing, and an address off sixteen is specialized argument by argument
        if compiled is not None and not pointers & 15:
            names = kernel.arg_names[len(arguments) :]
            _compiled[key] = compiled, tuple(constants[name] for name in names)
        return
    compiled, constexprs = found
    stream = driver.active.get_current_stream(arguments[0].get_device())
    compiled.run(
        *grid, *(1, 1, 1)[len(grid) :], stream, compiled.function, compiled.packed_metadata, None, None, None,
        *arguments, *constexprs,
    )  # fmt: skip
