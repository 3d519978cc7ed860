"""Compile what a launcher would launch, without its GPU, and read registers and memory off it.

The launchers run on meta tensors, which hold no data, under a driver that names a target and
launches nothing. Run as a program, this prints one line of JSON per compiled kernel: arch, kernel,
constexprs, registers, bytes.
"""

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler.code_generator import CodeGenerator
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class _NoDriver:
    """The part of a Triton driver that compilation uses."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.arch

    def get_current_stream(self, device):
        return 0


def _named_tuples(value, place: tuple):
    """(place, names of the members, members) of each named tuple in an argument of a helper."""
    if isinstance(value, tl.constexpr):
        value = value.value
    if isinstance(value, tl.tuple):
        names, members = value.type.fields, list(value.values)
    elif isinstance(value, tuple):
        names, members = getattr(value, "_fields", None), list(value)
    else:
        return
    # a tuple without names has None or, in Triton 3.6, empty names
    if names and all(names):
        yield place, tuple(names), members
    for index, member in enumerate(members):
        yield from _named_tuples(member, (*place, index))


@contextlib.contextmanager
def rules_of_tuples():
    """In this context a kernel that breaks a rule of `operands` does not compile."""
    call, seen = CodeGenerator.call_JitFunction, {}

    def checked(self, fn, args, kwargs, *rest, **more):
        args = list(args)  # an iterator, if a partition of warps is called
        arguments = [*enumerate(args), *kwargs.items()]
        for name, argument in arguments:
            for place, names, members in _named_tuples(argument, (name,)):
                first = seen.setdefault((fn.__name__, place), names)
                assert first == names, f"{fn.__name__} takes {first} and {names} at {place}"
                tuples = [isinstance(m, (tuple, tl.tuple)) for m in members]
                assert len(set(tuples)) == 1, f"{names} of {fn.__name__} has tuples and others"
        return call(self, fn, args, kwargs, *rest, **more)

    CodeGenerator.call_JitFunction = checked
    try:
        yield
    finally:
        CodeGenerator.call_JitFunction = call


@contextlib.contextmanager
def compiling_for(arch: int):
    """In this context a launch compiles for `arch` and appends the kernel to the yielded list."""
    compiled, run = [], JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    driver.set_active(_NoDriver(arch))
    JITFunction.run = compile_only
    modules = [
        m for name, m in sys.modules.items() if name.startswith("peft_moe_lora.ops.kernels.")
    ]
    patched = [(m, m.device_facts) for m in modules if hasattr(m, "device_facts")]
    for module, _ in patched:
        module.device_facts = lambda device: (arch, 132)
    try:
        yield compiled
    finally:
        JITFunction.run = run
        for module, device_facts in patched:
            module.device_facts = device_facts


def resources(kernel) -> dict:
    """Registers per thread, spilled or other local bytes, and shared bytes of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": kernel.metadata.name,
        "registers": found["REG"],
        "local": found["STACK"] + found["LOCAL"],
        "shared": kernel.metadata.shared,
        "num_warps": kernel.metadata.num_warps,
        "num_stages": kernel.metadata.num_stages,
        "fused_multiply_adds": _instructions(kernel).count("FFMA"),
        "serialized": _serialized(kernel),
    }


def _instructions(kernel) -> str:
    """The machine code of a kernel whose bits are promised; nothing for other kernels."""
    if "dequantize" not in kernel.metadata.name:
        return ""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run(
            [tool, "-sass", file.name], capture_output=True, text=True, check=True
        ).stdout


def _serialized(kernel) -> bool:
    """Whether ptxas serialized products that should overlap; False for kernels without roles."""
    if "roles" not in kernel.metadata.name:
        return False
    ptx = kernel.asm["ptx"]
    tool, arch = get_ptxas(kernel.metadata.target.arch).path, re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        command = [tool, "-v", f"--gpu-name={arch}", path, "-o", path.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return "serialized" in said


def launch_layer(
    T,
    E,
    top_k,
    H,
    I,  # noqa: E741 I is the glossary's letter
    r,
    dtype,
    activation=None,
    transposed=False,
    interleaved=False,
    p=0.0,
):
    """Every launch of forward and backward of one experts layer, on meta tensors.

    Args:
        p: of dropout.
    """
    from peft_moe_lora.ops import Activation, Dropout, RankRows, composed, kernels

    activation = activation or Activation(interleaved=interleaved)
    N = activation.gated * I + I

    def empty(*size, dtype=dtype):
        return torch.empty(*size, dtype=dtype, device="meta")

    def matrix(n, k):
        return empty(E, k, n).transpose(1, 2) if transposed else empty(E, n, k)

    def lora(n, k):
        A, B = empty(E * r, k, dtype=torch.float32), empty(n, r * E, dtype=torch.float32)
        return A.view(E, r, k), B.view(n, E, r).permute(1, 0, 2)

    x, weights, up, down = (
        empty(T, H),
        empty(T, top_k, dtype=torch.float32),
        matrix(N, H),
        matrix(H, I),
    )
    (up_A, up_B), (down_A, down_B) = lora(N, H), lora(H, I)
    routing = kernels.route(empty(T, top_k, dtype=torch.int64), E)
    drop = {"dropout": Dropout(p, empty(1, dtype=torch.int64)) if p else None}
    xa = kernels.expert_shrink(x, up_A, routing, 1.0, gather=True, **drop)
    pre, act = kernels.expert_linear_act(
        x, up, routing, activation, xa=xa, lora_B=up_B, gather=True
    )
    y = kernels.expert_linear(act, down, routing, xa=xa, lora_B=down_B)
    kernels.combine(y, routing, weights)
    kernels.zero_unrouted(y, routing)
    kernels.transpose_columns(empty(N, r * E, dtype=torch.float32), r, x.dtype)
    lora = {"xa": xa, "lora_B": down_A.transpose(1, 2)}
    draw = kernels.expert_linear(x, down.transpose(1, 2), routing, gather=True, **lora, **drop)
    kernels.expert_act_backward(draw, pre, routing, activation, weights)
    fp32 = torch.float32
    out = empty(N, E, r, dtype=fp32).permute(1, 0, 2)
    yb = composed.expert_shrink_outer(kernels, pre, up_B.transpose(1, 2), xa, routing, 1.0, out)
    dA = empty(E, r, I, dtype=fp32)
    rows = RankRows(xa, dA, xa, up_B, 1.0, out)
    composed.expert_act_backward_outer(
        kernels, draw, pre, routing, activation, weights, rows, **drop
    )
    out = empty(H, E, r, dtype=fp32).permute(1, 0, 2)
    options = {"row_weights": weights, "gather": True}
    composed.expert_shrink_outer(
        kernels, x, down_B.transpose(1, 2), xa, routing, 1.0, out, **options
    )
    lora = {"xa": yb, "lora_B": up_A.transpose(1, 2)}
    kernels.expert_linear(pre, up.transpose(1, 2), routing, **lora, **drop)
    kernels.expert_outer(yb, x, routing, empty(E, r, H, dtype=fp32), gather_right=True, **drop)


def launch_ungated(dtype, kind, T=8192, E=128, top_k=6, H=2688, I=1856, r=16, p=0.0):  # noqa: E741
    """`launch_layer` with an activation without a gate; narrow last tiles of 64 and 128 columns."""
    from peft_moe_lora.ops import Activation

    launch_layer(T, E, top_k, H, I, r, dtype, Activation(kind, gated=False), p=p)


def launch_ordered(dtype, r, T=2048, E=8, top_k=2, K=1000, N=1544, p=0.0):
    """Products of ordered rows, in both orders of the weight, with and without a bias; on meta.

    Args:
        p: of dropout.
    """
    from peft_moe_lora.ops import Dropout, kernels
    from peft_moe_lora.ops.ranks import stored_rank

    routing = kernels.route(empty(T, top_k, dtype=torch.int64), E)
    x, bias = empty(T * top_k, K, dtype=dtype), empty(E, N, dtype=dtype)
    xa = empty(T * top_k, stored_rank(r), dtype=dtype) if r else None
    lora_B = empty(N, r * E, dtype=torch.float32).view(N, E, r).permute(1, 0, 2) if r else None
    for weight in (empty(E, N, K, dtype=dtype), empty(E, K, N, dtype=dtype).transpose(1, 2)):
        for b in (None, bias):
            dropout = Dropout(p, empty(1, dtype=torch.int64)) if p else None
            kernels.expert_linear(x, weight, routing, bias=b, xa=xa, lora_B=lora_B, dropout=dropout)


def launch_linear(dtype, T, r, K=2048, N=4096):
    """The update of a linear layer in both directions, on meta tensors."""
    from peft_moe_lora.ops import kernels

    x, y = empty(T, K, dtype=dtype), empty(T, N, dtype=dtype)
    A, B = empty(r, K, dtype=torch.float32), empty(N, r, dtype=torch.float32)
    routing = kernels.one_expert(x)
    xa = kernels.add_low_rank(x, A, B, 2.0, y, torch.empty_like(y))
    # without y: beside a layer that computes its own part of the gradient
    for dx in (x, None):
        yb = kernels.add_low_rank(y, B.mT, A.mT, 2.0, dx, torch.empty_like(x))
    kernels.expert_outer(yb, x, routing, torch.empty_like(A)[None])
    kernels.expert_outer(y, xa, routing, torch.empty_like(B)[None])


FORMS = (False, False), (True, False), (True, True)


def launch_gathered(
    dtype,
    r,
    kinds=("silu",),
    limit=None,
    forms=FORMS,
    T=2048,
    E=8,
    top_k=2,
    K=1024,
    I=392,  # noqa: E741
):
    """Products of gathered rows, without an activation and with each of these, on meta tensors.

    Args:
        forms: (gated, interleaved) of an activation.
    """
    from peft_moe_lora.ops import Activation, kernels
    from peft_moe_lora.ops.ranks import stored_rank

    routing = kernels.route(empty(T, top_k, dtype=torch.int64), E)
    x = empty(T, K, dtype=dtype)
    xa = empty(T * top_k, stored_rank(r), dtype=dtype) if r else None
    activations = [
        Activation(kind, gated, inter, limit=limit) for kind in kinds for gated, inter in forms
    ]
    for activation in (None, *activations):
        N = 2 * I if activation is None or activation.gated else I
        lora_B = empty(N, r * E, dtype=torch.float32).view(N, E, r).permute(1, 0, 2) if r else None
        weights = [empty(E, N, K, dtype=dtype), empty(E, K, N, dtype=dtype).transpose(1, 2)]
        # roles do not take gate and up halves of a transposed weight
        halves = activation is not None and activation.gated and not activation.interleaved
        for weight in weights[: 1 if halves else 2]:
            for bias in (None, empty(E, N, dtype=dtype)):
                rest = {"bias": bias, "xa": xa, "lora_B": lora_B, "gather": True}
                if activation is None:
                    kernels.expert_linear(x, weight, routing, **rest)
                else:
                    kernels.expert_linear_act(x, weight, routing, activation, **rest)


def empty(*size, dtype=torch.uint8):
    return torch.empty(*size, dtype=dtype, device="meta")


def codes_4bit(E, R, C, dtype):
    """Stacks of 4-bit codes as they are used: with nested, plain and exponent scales."""
    from peft_moe_lora.ops.quantized import Codes4bit

    n, fp32 = E * R * C, torch.float32
    four = {
        "stored_shape": (E, R, C),
        "dtype": dtype,
        "packed": empty(n // 2),
        "code": empty(16, dtype=fp32),
    }
    nested = {
        "nested_code": empty(256, dtype=fp32),
        "nested_scales": empty(n // 64 // 256 + 1, dtype=fp32),
    }
    nested |= {"offset": empty((), dtype=fp32)}
    return [
        Codes4bit(format="nf4", blocksize=64, scales=empty(n // 64 + 1), **four, **nested),
        Codes4bit(format="nf4", blocksize=64, scales=empty(n // 64 + 1, dtype=fp32), **four),
        Codes4bit(format="mxfp4", blocksize=32, scales=empty(n // 32 + 1), low_first=True, **four),
    ]


def launch_decoding(dtype, E=8, R=1536, C=2048, uneven=False):
    """Every kernel that decodes experts into a scratch buffer, on meta tensors."""
    from peft_moe_lora.ops import kernels
    from peft_moe_lora.ops.quantized import Codes8bit

    offsets = empty(E + 1, dtype=torch.int32)
    # the formats as they are used; if uneven, also with blocks across experts
    for size in ((R, C), (R - 2, C - 2)) if uneven else ((R, C),):
        common = {"stored_shape": (E, *size), "dtype": dtype}
        weights = [
            *codes_4bit(E, *size, dtype),
            Codes8bit(
                format="fp8",
                tile=(128, 128),
                scales=empty(E, 12, 16, dtype=torch.float32),
                codes=empty(E, *size, dtype=torch.float8_e4m3fn),
                **common,
            ),
            Codes8bit(
                format="int8",
                tile=(1, size[1]),
                scales=empty(E, size[0], 1, dtype=torch.float32),
                unit=0.5,
                codes=empty(E, *size, dtype=torch.int8),
                **common,
            ),
        ]
        for weight in weights:
            kernels.dequantize(weight, offsets, 0, empty(3, *size, dtype=dtype))


def launch_products_of_codes(T, dtype, E=8, top_k=2, H=2048, I=768, r=16):  # noqa: E741
    """Products that decode their weight, in both orders of its bytes, on meta tensors.

    With and without an adapter.
    """
    from peft_moe_lora.ops import Activation, kernels
    from peft_moe_lora.ops.kernels.codes import product_4bit as product
    from peft_moe_lora.ops.ranks import stored_rank

    # every tile size that has a row in the table
    product.MAX_BLOCK_M = 32

    routing = kernels.route(empty(T, top_k, dtype=torch.int64), E)
    x, xa, pre, act = (
        empty(n, width, dtype=dtype)
        for n, width in ((T, H), (T * 2, stored_rank(r)), (T * 2, 2 * I), (T * 2, I))
    )
    up_B, down_B = (
        empty(n, r * E, dtype=torch.float32).view(n, E, r).permute(1, 0, 2) for n in (2 * I, H)
    )
    for up, turned in zip(
        codes_4bit(E, 2 * I, H, dtype), codes_4bit(E, H, 2 * I, dtype), strict=True
    ):
        lora = {"xa": xa, "lora_B": up_B, "gather": True}
        kernels.expert_linear_act(x, up, routing, Activation(), **lora)
        kernels.expert_linear_act(x, turned.transpose(1, 2), routing, Activation(), **lora)
        kernels.expert_linear(pre, up.transpose(1, 2), routing, xa=xa, lora_B=down_B)
    for down in codes_4bit(E, H, I, dtype)[:1]:
        kernels.expert_linear(act, down, routing, xa=xa, lora_B=down_B)
        kernels.expert_linear(x, down.transpose(1, 2), routing, gather=True)


if __name__ == "__main__":
    arch = int(sys.argv[1])
    import peft_moe_lora.ops.kernels  # noqa: F401

    with rules_of_tuples(), compiling_for(arch) as compiled:
        for case in json.loads(sys.argv[2]):
            case["dtype"] = getattr(torch, case["dtype"])
            launches = {"decoding": launch_decoding, "products": launch_products_of_codes}
            launches |= {"ordered": launch_ordered, "gathered": launch_gathered}
            launches |= {"ungated": launch_ungated, "linear": launch_linear}
            launches.get(case.pop("launch", None), launch_layer)(**case)
    for kernel in compiled:
        print(json.dumps({"arch": arch} | resources(kernel)))
