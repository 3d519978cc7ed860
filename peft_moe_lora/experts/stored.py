"""How a projection of an experts module is stored: as a dense tensor, or as codes and scales.

Codes are the quantized values, and a scale multiplies a group of decoded values. Nothing is decoded
here: a quantized projection becomes a `QuantizedWeight`, which is decoded where it is used.
"""

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..ops.quantize import code_of
from ..ops.quantized import Codes4bit, Codes8bit, QuantizedWeight
from .decoding import Decoding, parametrizations

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FP8 = torch.float8_e4m3fn
# number of values that share a scale in MXFP4
MXFP4_BLOCKSIZE = 32
_E2M1_CODES: dict[torch.device, torch.Tensor] = {}

Weight = torch.Tensor | QuantizedWeight


def shape_of(tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor, dense or quantized.

    DeepSpeed's ZeRO-3 leaves an empty tensor in each process, with the shape beside it.
    """
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


class UnsupportedExperts(ValueError):
    """A module holds routed experts, but not in a form that adapters support."""


def is_stacked(module: nn.Module, name: str) -> bool:
    """Whether the module has a projection of that name with one matrix for each expert.

    Args:
        module: any module.
        name: name of the projection's parameter, which may be dense or quantized.
    """
    if parametrize.is_parametrized(module, name):
        return True
    weight = getattr(module, name, None)
    return isinstance(weight, torch.Tensor) and len(shape_of(weight)) == 3


def stored_weight(module: nn.Module, name: str) -> Weight:
    """A projection as it is stored: [E, R, C] (R rows, C columns), dense or quantized.

    Args:
        module: an experts module.
        name: name of the projection's parameter.
    Raises:
        UnsupportedExperts: if it is stored in an unknown way. The message names what is missing.
    """
    if "parametrizations" in module._modules and parametrize.is_parametrized(module, name):
        return _parametrized(module, name)
    # of a registered parameter, `getattr` takes a microsecond more, in every forward
    registered = module._parameters
    weight: Any = registered[name] if name in registered else getattr(module, name)
    # plain weights return early, so that torch.compile does not trace the code below
    if type(weight) in (nn.Parameter, torch.Tensor) and weight.dtype in FLOATS:
        return weight
    if hasattr(module, f"{name}_scale_inv") and weight.dtype not in FLOATS:
        return _block_scaled(module, name, weight)
    if type(weight).__module__.startswith("torchao."):
        return _torchao(_where(module, name), weight)
    if weight.dtype not in FLOATS:
        raise UnsupportedExperts(
            f"{_where(module, name)} is stored as {weight.dtype} without scales in a known place; "
            "adapters need fp32, bf16 or fp16 experts, or one of the quantized formats in "
            "docs/guides/quantized-bases.md. Load the model dequantized; "
            "quantize_experts(model) can quantize it again."
        )
    return weight


def _where(module: nn.Module, name: str) -> str:
    """The name of a projection in error messages."""
    return f"{type(module).__name__}.{name}"


# ---- bitsandbytes and `quantize_experts`: a parametrized projection ------------------------------


def _parametrized(module: nn.Module, name: str) -> QuantizedWeight:
    listed = parametrizations(module, name)
    if len(listed) == 1:
        codes = listed.original.detach()
        only = listed[0]
        if isinstance(only, Decoding):
            return only.weight(codes)
        # by name, because bitsandbytes need not be installed
        if type(only).__name__ == "Bnb4bitParametrization":
            state = cast(Any, only).quant_state
            shape = _stack_shape(module, name, tuple(state.shape))
            return _bitsandbytes(codes, state, shape)
    raise UnsupportedExperts(
        f"{_where(module, name)} is parametrized by {[type(p).__name__ for p in listed]}, which is "
        "not supported: remove the parametrization, or take the experts out of target_modules."
    )


def _stack_shape(module: nn.Module, name: str, quantized: tuple[int, ...]) -> tuple[int, int, int]:
    """[E, R, C] of a stack that was quantized with its own shape, or flattened to [E * R, C]."""
    if len(quantized) == 3:
        return _three(quantized)
    E = getattr(module, "num_experts", None)
    if len(quantized) == 2 and isinstance(E, int) and E > 0 and quantized[0] % E == 0:
        # codes and scales have the order of the values, which flattening keeps
        return E, quantized[0] // E, quantized[1]
    raise UnsupportedExperts(
        f"{_where(module, name)} was quantized with shape {list(quantized)}, but adapters need a "
        f"3-D stack [E, N, K], or [E * N, K] with num_experts = E on the module, which is {E}; "
        "load the model unquantized and call quantize_experts(model)."
    )


# `state` is bitsandbytes' QuantState, which is not typed
def _bitsandbytes(packed: torch.Tensor, state: Any, shape: tuple[int, int, int]) -> Codes4bit:
    if state.absmax.device != packed.device:
        # bitsandbytes does not move the scales with the module
        state.to(packed.device)
    weight = Codes4bit(
        format=state.quant_type,
        stored_shape=shape,
        dtype=state.dtype,
        packed=packed.view(torch.uint8).view(-1),
        code=state.code,
        scales=state.absmax,
        blocksize=state.blocksize,
    )
    if not state.nested:
        return weight
    return replace(
        weight,
        nested_code=state.state2.code,
        nested_scales=state.state2.absmax,
        nested_blocksize=state.state2.blocksize,
        offset=state.offset,
    )


# ---- transformers' FP8Experts: codes beside a parameter of scales --------------------------------


def _block_scaled(module: nn.Module, name: str, weight: torch.Tensor) -> QuantizedWeight:
    """Codes in `weight`, scales in the parameter `name`_scale_inv.

    The codes are e4m3 with one scale for each tile, or e2m1 packed in int8 with one scale for each
    32 values of a row.
    """
    where = _where(module, name)
    scales = getattr(module, f"{name}_scale_inv").detach()
    if scales.dtype == torch.float8_e8m0fnu:
        # powers of two, stored as their exponents
        scales = scales.view(torch.uint8)
    if scales.dtype not in (torch.float32, torch.uint8):
        scales = scales.float()
    dtype = _compute_dtype(module)
    if weight.dtype == torch.int8:
        return _packed_e2m1(where, weight.detach(), scales, dtype)
    if weight.dtype != _FP8:
        raise UnsupportedExperts(
            f"{where} is stored as {weight.dtype}, but {_FP8} is the only supported 8-bit float; "
            "load the model dequantized."
        )
    block_size = getattr(module, "block_size", None)
    tile = _tile(tuple(weight.shape[1:]), tuple(scales.shape[1:]), block_size)
    if tile is None:
        raise UnsupportedExperts(
            f"{where} {list(weight.shape)} has scales {list(scales.shape)}, which do not fit "
            f"block_size={block_size}; load the model dequantized."
        )
    return Codes8bit(
        format="fp8",
        stored_shape=_three(weight.shape),
        dtype=dtype,
        codes=weight.detach(),
        scales=scales.contiguous(),
        tile=tile,
    )


def _packed_e2m1(
    where: str, packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> Codes4bit:
    """Two codes in each int8 [E, R, C / 2]; scales [E, R, C / 32]."""
    E, R, columns = packed.shape
    C = 2 * columns
    if scales.shape != (E, R, C // MXFP4_BLOCKSIZE):
        raise UnsupportedExperts(
            f"{where}: 4-bit codes need scales [E, R, C / {MXFP4_BLOCKSIZE}] = "
            f"{[E, R, C // MXFP4_BLOCKSIZE]}, got {list(scales.shape)}; load the model dequantized."
        )
    return Codes4bit(
        format="mxfp4",
        stored_shape=(E, R, C),
        dtype=dtype,
        packed=packed.view(torch.uint8).view(-1),
        code=_e2m1_code(packed.device),
        scales=scales.reshape(-1),
        blocksize=MXFP4_BLOCKSIZE,
        low_first=True,
    )


def _e2m1_code(device: torch.device) -> torch.Tensor:
    """The values of the 16 codes, made once for each device.

    A module's weight is put together in every forward, and a copy from the host would make the host
    wait for the device each time.
    """
    code = _E2M1_CODES.get(device)
    if code is not None:
        return code
    # an inference tensor could not be kept for a backward
    with torch.inference_mode(False):
        code = code_of("mxfp4", device)
    # the tensors of a trace stand for others, or live only until its next run
    if type(code) is torch.Tensor and not torch.compiler.is_compiling():
        _E2M1_CODES[device] = code
    return code


def _compute_dtype(module: nn.Module) -> torch.dtype:
    """The dtype in which a quantized module computes: the dtype of its config, or else bf16."""
    dtype = getattr(getattr(module, "config", None), "dtype", None)
    if dtype in FLOATS:
        return dtype
    return torch.bfloat16


def _tile(
    size: tuple[int, ...], counts: tuple[int, ...], block_size: tuple[int, int] | None
) -> tuple[int, int] | None:
    """(rows, columns) that share a scale; None if `size` and `counts` do not match.

    Args:
        size: (R, C) of one expert.
        counts: numbers of scales along R and along C.
        block_size: the module's own block_size, or None.
    """
    found = []
    for n, count, block in zip(size, counts, block_size or (None, None), strict=True):
        if block is not None and math.ceil(n / block) == count:
            found.append(block)
        elif n % count == 0:
            # one scale for the whole tensor, or one for gate and one for up
            found.append(n // count)
        else:
            return None
    rows, columns = found
    return rows, columns


# ---- torchao's Float8Tensor ----------------------------------------------------------------------


# `weight` is a tensor subclass of torchao, which need not be installed
def _torchao(where: str, weight: Any) -> Codes8bit:
    codes = getattr(weight, "qdata", None)
    scales = getattr(weight, "scale", None)
    known = type(weight).__name__ == "Float8Tensor" and getattr(codes, "dtype", None) == _FP8
    if not known or codes is None or scales is None:
        raise UnsupportedExperts(
            f"{where} is torchao's {type(weight).__name__}, but Float8Tensor of {_FP8} is the only "
            "supported format of torchao; load the model unquantized and call "
            "quantize_experts(model)."
        )
    size = _three(codes.shape)
    scales = scales.detach().float()
    tile = None
    if scales.ndim == 3 and scales.shape[0] in (1, size[0]):
        tile = _tile(size[1:], tuple(scales.shape[1:]), None)
    if tile is None:
        raise UnsupportedExperts(
            f"{where} {list(size)} has scales {list(scales.shape)}, which do not divide it into "
            "tiles; load the model unquantized and call quantize_experts(model)."
        )
    return Codes8bit(
        format="fp8",
        stored_shape=size,
        dtype=weight.dtype,
        codes=codes.detach(),
        scales=scales.expand(size[0], -1, -1).contiguous(),
        tile=tile,
    )


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    E, R, C = shape
    return E, R, C
