"""value = code[q] * scale: the parts of a kernel that turn 4-bit codes into values.

`dequantize_4bit` writes these values to memory; `product_4bit` multiplies by them in registers.

Legend:
    codes: `operands.Codes`, the tensors of `Codes4bit` without the packed bytes
    FORMAT: `operands.Format`, the constants of `Codes4bit`
"""

import triton
import triton.language as tl

# options of a kernel that decodes: no multiplication is fused with an addition, so that the bits of
# a value are those of bitsandbytes
ROUNDED = {"enable_fp_fusion": False}


@triton.jit
def load_scales(codes, block, mask, FORMAT):
    """Load the stored scales of blocks and, if they are nested, the scales of these scales."""
    stored = tl.load(codes.scales + block, mask=mask, other=0)
    nested = stored
    if FORMAT.NESTED > 0:
        nested = tl.load(codes.nested_scales + block // FORMAT.NESTED, mask=mask, other=0.0)
    return stored, nested


@triton.jit
def decoded_scales(codes, stored, nested, FORMAT):
    """fp32 scales from the two results of `load_scales`."""
    if FORMAT.NESTED > 0:
        # bitsandbytes rounds the product and the sum, so kernels are compiled with `ROUNDED`
        scales = tl.load(codes.nested_code + stored.to(tl.int32)) * nested + tl.load(codes.offset)
    elif FORMAT.EXPONENTS:
        # e becomes the exponent bits of an fp32. e = 0 means 2**-127, a denormal with bits 1 << 22
        scales = tl.maximum(stored.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)
    else:
        scales = stored
    return scales


@triton.jit
def decoded_values(codes, packed, scales, dtype: tl.constexpr, FORMAT):
    """[..., 2 n] values of packed bytes [..., n], times scales that broadcast to [..., n]."""
    high = (tl.load(codes.code + (packed >> 4).to(tl.int32)) * scales).to(dtype)
    low = (tl.load(codes.code + (packed & 15).to(tl.int32)) * scales).to(dtype)
    return tl.interleave(low, high) if FORMAT.LOW_FIRST else tl.interleave(high, low)
