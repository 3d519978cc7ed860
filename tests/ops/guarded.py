"""Run the kernels in the interpreter on tensors next to forbidden pages.

A read or write outside a tensor kills the process. As a program: `end` puts the forbidden page
after every tensor, `front` before it; `broken` is `end` with an index that points past its tensor.
"""

import ctypes
import dataclasses
import mmap
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from ops.problems import SHAPES, Problem, layer, layer_arguments
from peft_moe_lora.ops import Activation, kernels
from peft_moe_lora.ops.kernels import routing
from peft_moe_lora.ops.kernels.codes import product_4bit
from peft_moe_lora.ops.quantize import quantize

PAGE = mmap.PAGESIZE
FEW_SLOTS = routing.FEW_SLOTS
empty = torch.empty
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
CLAMPED = Activation(interleaved=True, limit=7.0, alpha=1.702, up_shift=1.0)


def guarded_empty(*size, dtype=None, device=None):
    """`torch.empty`, full of NaN or large numbers, between forbidden pages; never freed."""
    size, dtype = torch.Size(size if isinstance(size[0], int) else size[0]), dtype or torch.float32
    nbytes = size.numel() * dtype.itemsize
    if nbytes == 0:
        return empty(size, dtype=dtype)
    pages = -(-nbytes // PAGE)
    base = libc.mmap(
        None,
        (pages + 2) * PAGE,
        mmap.PROT_READ | mmap.PROT_WRITE,
        mmap.MAP_PRIVATE | mmap.MAP_ANON,
        -1,
        0,
    )
    for page in (base, base + (pages + 1) * PAGE):
        assert libc.mprotect(page, PAGE, 0) == 0
    start = base + PAGE if sys.argv[1] == "front" else base + (pages + 1) * PAGE - nbytes
    memory = (ctypes.c_uint8 * nbytes).from_address(start)
    t = torch.frombuffer(memory, dtype=dtype).view(size)
    return t.fill_(float("nan") if dtype.is_floating_point else min(2**30, torch.iinfo(dtype).max))


def guarded(t):
    """A copy of a tensor with its strides; anything else unchanged."""
    if not isinstance(t, torch.Tensor) or t.numel() == 0:
        return t
    span = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return guarded_empty(span, dtype=t.dtype).as_strided(t.shape, t.stride()).copy_(t)


def quantized(stack, transposed, **setting):
    """The codes of a stack, as a layer holds them."""
    weight = quantize(stack.transpose(1, 2).contiguous() if transposed else stack, **setting)
    tensors = {f.name: getattr(weight, f.name) for f in dataclasses.fields(weight)}
    weight = dataclasses.replace(weight, **{name: guarded(t) for name, t in tensors.items()})
    return weight.transpose(1, 2) if transposed else weight


def run_layer(problem, activation, up, down):
    x, index, weights, _, _, *others, activation = layer_arguments(problem, activation)
    layer(
        kernels,
        guarded(x),
        guarded(index),
        guarded(weights),
        up,
        down,
        *map(guarded, others),
        activation,
    )


def run_layers():
    for i, shape in enumerate(SHAPES):
        dtype, activation = ((torch.float16, CLAMPED), (torch.float32, Activation()))[i % 2]
        problem = Problem(shape, dtype)
        # routing in one launch, and in three
        routing.FEW_SLOTS = (FEW_SLOTS, 0)[i // 2 % 2]
        run_layer(problem, activation, guarded(problem.up), guarded(problem.down))
    routing.FEW_SLOTS = FEW_SLOTS


def run_quantized_layers():
    shape = dataclasses.replace(SHAPES[0], E=4, H=128, I=64, r=4)
    for T, transposed, setting in (
        (1, False, {"format": "nf4"}),
        (1, True, {"format": "nf4", "double_quant": False}),
        (40, True, {"format": "fp4"}),
        (40, False, {"format": "int8"}),
    ):
        problem = Problem(dataclasses.replace(shape, T=T), torch.float16)
        up, down = (quantized(w, transposed, **setting) for w in (problem.up, problem.down))
        run_layer(problem, CLAMPED if transposed else Activation(), up, down)


if __name__ == "__main__":
    torch.empty = guarded_empty
    # products with tiles of 32 rows decode too
    product_4bit.MAX_BLOCK_M = 32
    if sys.argv[1] == "broken":
        routed = kernels.route(guarded(torch.tensor([[0, 1], [1, 2]])), 3)
        rows = guarded(torch.randn(4, PAGE))
        routed.slot_row[0] = len(rows)
        kernels.combine(rows, routed)
    run_layers()
    run_quantized_layers()
