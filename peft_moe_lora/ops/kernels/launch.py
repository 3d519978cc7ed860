"""Launch a compiled kernel without asking again which one it is.

Triton's own launch binds and specializes some forty arguments in Python every time: 30 to 60 us a launch on a slow
host (2026-11-21), more than many of these kernels run. Here a short key finds what the first launch compiled.
"""

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

_compiled = {}


def _trait(argument):
    """What Triton specializes on: dtype and alignment of a tensor; one, sixteens and the width of an int."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, argument >= 2**31
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, *argument.block_shape
    return type(argument)


def launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """`kernel[grid](*arguments, **constants)`.

    Args:
        arguments: in the kernel's order; the first tensor names the device.
        constants: the kernel's constexprs, num_warps and num_stages; in the same order at every call of one kernel.
    """
    key = kernel, arguments[0].device, *map(_trait, arguments), *constants.values()
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **constants)
        # the interpreter compiles nothing
        if compiled is not None:
            names = kernel.arg_names[len(arguments) :]
            _compiled[key] = compiled, tuple(constants[name] for name in names)
        return
    compiled, constexprs = found
    compiled[grid + (1,) * (3 - len(grid))](*arguments, *constexprs)
