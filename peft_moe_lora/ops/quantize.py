"""codes = nearest(W / scale): dense stacks into the formats of `quantized`, bit for bit as bitsandbytes makes them.

Stacks are quantized a slice at a time, so that no fp32 copy of one is ever held.
"""

from functools import cache

import torch

from .quantized import INT8_UNIT, Codes4bit, Codes8bit, QuantizedWeight

# the quantiles of a normal distribution, Dettmers et al. 2023, arXiv:2305.14314, appendix E
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# 1 sign, 2 exponent and 1 mantissa bit, in the order of their bits, over the largest
FP4 = (
    0.0,
    0.0625,
    8.0,
    12.0,
    4.0,
    6.0,
    2.0,
    3.0,
    -0.0,
    -0.0625,
    -8.0,
    -12.0,
    -4.0,
    -6.0,
    -2.0,
    -3.0,
)
# e2m1, OCP Microscaling Formats 1.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

FORMATS = ("nf4", "fp4", "int8")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKSIZE = 256
# values quantized at a time: some 400 MB of fp32 and indices, whatever the stack's size
SLICE = 1 << 24


def code_of(format: str, device: torch.device) -> torch.Tensor:
    """[16] fp32 values of the codes of a 4-bit format."""
    code = torch.tensor({"nf4": NF4, "fp4": FP4, "mxfp4": E2M1}[format])
    return (code if format == "mxfp4" else code / code.abs().max()).to(device)


@cache
def _dynamic_code() -> tuple[float, ...]:
    """256 sorted values whose precision moves between exponent and fraction.

    Source: Dettmers 2015, arXiv:1511.04561: 7 exponents of ten, in each twice as many fractions as in the one below.
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
    """A stack of experts in another format.

    Args:
        stack: [E, R, C] fp32, bf16 or fp16.
        format: "nf4" or "fp4", blocks of the flat stack; "int8", one scale a row.
        blocksize: values that share a scale; not for int8.
        double_quant: whether scales are stored in 8 bits too; not for int8.
    Returns: the codes, on the device of the stack, of its dtype.
    Raises:
        ValueError: if the format or blocksize does not exist, or a value is not finite.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}, got {format!r}.")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize!r}.")
    stack = stack.detach().contiguous()
    quantized = (
        _quantize_8bit(stack)
        if format == "int8"
        else _quantize_4bit(stack, format, blocksize, double_quant)
    )
    scales = (
        quantized.scales if quantized.scales.dtype == torch.float32 else quantized.nested_scales
    )
    if not torch.isfinite(scales).all():
        raise ValueError(
            f"the weights hold NaN or infinity, which {format} cannot store; load them again."
        )
    return quantized


def quantize_like(weight: QuantizedWeight, dense: torch.Tensor) -> QuantizedWeight:
    """A dense [E, N, K] stored as `weight` is: same format, blocks and order of bytes.

    Raises:
        ValueError: for a format that is only read here.
    """
    if weight.format not in FORMATS:
        raise ValueError(f"weights are read from {weight.format}, but not written in it.")
    stored = dense.transpose(1, 2) if weight.transposed else dense
    settings = {}
    if isinstance(weight, Codes4bit):
        settings = {"blocksize": weight.blocksize, "double_quant": weight.nested_code is not None}
    quantized = quantize(stored.to(weight.dtype), weight.format, **settings)
    return quantized.transpose(1, 2) if weight.transposed else quantized


def _quantize_4bit(stack, format, blocksize, double_quant) -> Codes4bit:
    flat = stack.view(-1)
    code = code_of(format, stack.device)
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8, device=stack.device)
    scales = torch.empty(-(-flat.numel() // blocksize), device=stack.device)
    for start in range(0, flat.numel(), SLICE):
        values = flat[start : start + SLICE].float()
        scaled, scales[start // blocksize : -(-(start + values.numel()) // blocksize)] = _scaled(
            values, blocksize
        )
        q = _nearest(torch.nn.functional.pad(scaled, (0, scaled.numel() % 2)), code).view(-1, 2)
        packed[start // 2 : start // 2 + q.shape[0]] = (q[:, 0] << 4) | q[:, 1]
    nested = {}
    if double_quant:
        offset = scales.mean()
        nested_code = torch.tensor(_dynamic_code(), device=stack.device)
        scaled, nested_scales = _scaled(scales - offset, NESTED_BLOCKSIZE)
        scales = _nearest(scaled, nested_code)
        nested = {"nested_code": nested_code, "nested_scales": nested_scales, "offset": offset}
    return Codes4bit(
        format=format, stored_shape=tuple(stack.shape), dtype=stack.dtype, packed=packed, code=code, scales=scales,
        blocksize=blocksize, **nested,
    )  # fmt: skip


def _scaled(values: torch.Tensor, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values over the largest of their block, in [-1, 1], and those largest, [blocks]; the last block may be short."""
    whole = values.numel() - values.numel() % blocksize
    blocks = values[:whole].view(-1, blocksize)
    largest = blocks.abs().amax(1)
    scaled = (blocks * (1 / largest.clamp(min=1e-38))[:, None]).view(-1)
    if whole < values.numel():
        # the short block is divided, not multiplied: another rounding, bitsandbytes' own
        last = values[whole:].abs().max().clamp(min=1e-38)
        largest = torch.cat((largest, last[None]))
        scaled = torch.cat((scaled, values[whole:] / last))
    return scaled.clamp(-1, 1), largest


def _nearest(scaled: torch.Tensor, code: torch.Tensor) -> torch.Tensor:
    """uint8 index of the nearest value of the code; of two as near, the lower value."""
    ascending, order = torch.sort(code, stable=True)
    return order.to(torch.uint8)[
        torch.bucketize(scaled, (ascending[:-1] + ascending[1:]) / 2, out_int32=True)
    ]


def _quantize_8bit(stack: torch.Tensor) -> Codes8bit:
    E, R, C = stack.shape
    codes = torch.empty(E, R, C, dtype=torch.int8, device=stack.device)
    scales = torch.empty(E, R, 1, device=stack.device)
    for e in range(E):
        scales[e] = stack[e].abs().amax(1, keepdim=True)
        # a row of zeros stays one
        codes[e] = torch.round(stack[e] * (127.0 / scales[e]).masked_fill(scales[e] == 0, 0)).to(
            torch.int8
        )
    return Codes8bit(
        format="int8", stored_shape=(E, R, C), dtype=stack.dtype, codes=codes, scales=scales, tile=(1, C),
        unit=INT8_UNIT,
    )  # fmt: skip
