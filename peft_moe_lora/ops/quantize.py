"""codes = nearest(W / scale), which quantizes dense [E, R, C] stacks to the formats of `quantized`.

The codes and scales are bit for bit those of bitsandbytes. A stack is quantized one slice at a
time, so that no fp32 copy of the whole stack exists.

`KNOWN_FORMATS` describes each format. A new 4-bit format with 16 other values is a new row there.
"""

from functools import cache
from typing import Any, NamedTuple

import torch

from .quantized import INT8_UNIT, Codes4bit, Codes8bit, QuantizedWeight

# quantiles of a normal distribution; Dettmers et al. 2023, arXiv:2305.14314, appendix E
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# 1 sign, 2 exponent and 1 mantissa bit, in bitsandbytes' order; divided by the largest value, 12
_FP4 = (
    0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, -0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0,
)  # fmt: skip
# e2m1, OCP Microscaling Formats 1.0
_E2M1 = (
    0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0,
)  # fmt: skip


class Format(NamedTuple):
    """The description of a format.

    Attributes:
        code: the values of its 16 codes; None for an 8-bit format.
        element_size: upper bound of the bytes per value, scales included.
        written: whether `quantize` can write the format; if not, such weights can only be read.
    """

    code: tuple[float, ...] | None
    element_size: float
    written: bool


KNOWN_FORMATS = {
    "nf4": Format(_NF4, 0.57, written=True),
    "fp4": Format(tuple(value / 12 for value in _FP4), 0.57, written=True),
    "mxfp4": Format(_E2M1, 0.57, written=False),
    "int8": Format(None, 1.01, written=True),
    "fp8": Format(None, 1.01, written=False),
}
# the formats that `quantize` can write
FORMATS = tuple(name for name, known in KNOWN_FORMATS.items() if known.written)
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
# number of values quantized at a time, which needs about 400 MB of fp32 values and indices
SLICE = 1 << 24


def code_of(format: str, device: torch.device) -> torch.Tensor:
    """The values of the 16 codes of a 4-bit format, [16] fp32."""
    return torch.tensor(KNOWN_FORMATS[format].code, device=device)


@cache
def _dynamic_code() -> tuple[float, ...]:
    """The 256 values, in ascending order, of the 8-bit codes that store nested scales.

    There are 7 powers of ten, and each has twice as many values as the next smaller one.

    Source: Dettmers 2015, arXiv:1511.04561, dynamic tree quantization.
    """
    values = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        means = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += [*means.tolist(), *(-means).tolist()]
    return tuple(sorted(values))


def quantize(
    stack: torch.Tensor, format: str, *, blocksize: int = 64, double_quant: bool = True
) -> QuantizedWeight:
    """Quantize a stack of experts.

    Args:
        stack: [E, R, C] fp32, bf16 or fp16.
        format: "nf4" or "fp4", with a scale for each block of the flat stack; "int8", with a scale
            for each row.
        blocksize: number of values that share a scale; ignored for int8.
        double_quant: whether scales are stored in 8 bits too; ignored for int8.
    Returns: the quantized stack, on the device of `stack`; it decodes to the dtype of `stack`.
    Raises:
        ValueError: if the format or the block size is not supported, or if a value is not finite.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}.")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize!r}.")
    stack = stack.detach().contiguous()
    quantized: QuantizedWeight
    if format == "int8":
        quantized = _quantize_8bit(stack)
    else:
        quantized = _quantize_4bit(stack, format, blocksize, double_quant)
    # a value that is not finite makes its scale not finite, and the scales are fp32 tensors here
    floats = [t for t in quantized.tensors() if t.dtype == torch.float32]
    if not all(torch.isfinite(t).all() for t in floats):
        raise ValueError(
            f"the weights hold NaN or infinity, which {format} cannot store; load the weights "
            "again."
        )
    return quantized


def quantize_like(weight: QuantizedWeight, dense: torch.Tensor) -> QuantizedWeight:
    """Quantize a dense [E, N, K] in the same way as `weight`: format, blocks, order of bytes.

    Raises:
        ValueError: if this package can read the format of `weight` but not write it.
    """
    if weight.format not in FORMATS:
        raise ValueError(
            f"the format must be one of {FORMATS}, got {weight.format!r}, which can only be read."
        )
    # oriented is its own inverse: it swaps the last two dimensions if the weight is transposed
    stored = weight.oriented(dense)
    quantized = quantize(stored.to(weight.dtype), weight.format, **weight.settings())
    if weight.transposed:
        return quantized.transpose(1, 2)
    return quantized


def _quantize_4bit(
    stack: torch.Tensor, format: str, blocksize: int, double_quant: bool
) -> Codes4bit:
    flat = stack.view(-1)
    code = code_of(format, stack.device)
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=stack.device)
    scales = torch.empty(-(-flat.numel() // blocksize), device=stack.device)
    for start in range(0, flat.numel(), SLICE):
        values = flat[start : start + SLICE].float()
        scaled, slice_scales = _scaled(values, blocksize)
        first_block = start // blocksize
        scales[first_block : first_block + slice_scales.numel()] = slice_scales
        # an odd number of values gets one more value to fill the last byte
        padded = torch.nn.functional.pad(scaled, (0, scaled.numel() % 2))
        q = _nearest(padded, code).view(-1, 2)
        packed[start // 2 : start // 2 + q.shape[0]] = (q[:, 0] << 4) | q[:, 1]
    nested: dict[str, Any] = {}
    if double_quant:
        offset = scales.mean()
        nested_code = torch.tensor(_dynamic_code(), device=stack.device)
        scaled, nested_scales = _scaled(scales - offset, NESTED_BLOCKSIZE)
        scales = _nearest(scaled, nested_code)
        nested = {"nested_code": nested_code, "nested_scales": nested_scales, "offset": offset}
    E, R, C = stack.shape
    return Codes4bit(
        format=format,
        stored_shape=(E, R, C),
        dtype=stack.dtype,
        packed=packed,
        code=code,
        scales=scales,
        blocksize=blocksize,
        **nested,
    )


def _scaled(values: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values divided by the largest magnitude of their block, and these magnitudes [blocks].

    The last block may be shorter than the others.
    """
    whole = values.numel() - values.numel() % blocksize
    blocks = values[:whole].view(-1, blocksize)
    largest = blocks.abs().amax(1)
    scaled = (blocks * (1 / largest.clamp(min=1e-38))[:, None]).view(-1)
    if whole < values.numel():
        # bitsandbytes divides the short block but multiplies the others by the inverse, and the two
        # round differently
        last = values[whole:].abs().max().clamp(min=1e-38)
        largest = torch.cat((largest, last[None]))
        scaled = torch.cat((scaled, values[whole:] / last))
    return scaled.clamp(-1, 1), largest


def _nearest(scaled: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """uint8 index of the nearest value of `code`; of two equally near values, the lower one."""
    ascending, order = torch.sort(code, stable=True)
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    return order.to(torch.uint8)[torch.bucketize(scaled, midpoints, out_int32=True)]


def _quantize_8bit(stack: torch.Tensor) -> Codes8bit:
    E, R, C = stack.shape
    codes = torch.empty(E, R, C, dtype=torch.int8, device=stack.device)
    scales = torch.empty(E, R, 1, device=stack.device)
    for e in range(E):
        scales[e] = stack[e].abs().amax(1, keepdim=True)
        # a row of zeros stays a row of zeros
        inverse = (127.0 / scales[e]).masked_fill(scales[e] == 0, 0)
        codes[e] = torch.round(stack[e] * inverse).to(torch.int8)
    return Codes8bit(
        format="int8",
        stored_shape=(E, R, C),
        dtype=stack.dtype,
        codes=codes,
        scales=scales,
        tile=(1, C),
        unit=INT8_UNIT,
    )
