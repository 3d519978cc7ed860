"""acc[m, n] += sum over k of x[row, k] * code[q[e, n, k]] * scale: 4-bit codes, decoded in registers by their product.

Where experts have few rows, a product waits for its weight. Codes are a quarter of it, and nothing is written between
decoding and multiplying; where rows are many, tiles of them would decode the same codes again and again, and
`parts` decodes each once.

Legend:
    codes: (scales_ptr, code_ptr, nested_code_ptr, nested_scales_ptr, offset_ptr), a weight's tensors but for packed
    FORMAT: (BLOCKSIZE, SPAN, NESTED, EXPONENTS, LOW_FIRST), its constants
    span: SPAN values, one after the other in memory, that share a scale
    strides of the weight: those of its values, of which a byte holds two
"""

from math import gcd

import torch
import triton
import triton.language as tl

from ...quantized import Codes4bit, QuantizedWeight
from ..launching.table import device_facts, lookup

# rows of the largest tiles whose products decode for themselves: forward of qwen3-30b's experts at 16 rows an expert
# 0.95 ms, 1.02 by a scratch; at 32, tiles of 32, 1.18 and 1.05 (NVIDIA H200, 2026-11-21)
MAX_BLOCK_M = 16
_DENSE = {"BLOCKSIZE": 0, "SPAN": 0, "NESTED": 0, "EXPONENTS": False, "LOW_FIRST": False}


@triton.jit
def load_scales(codes, block, mask, FORMAT: tl.constexpr):
    """What is stored of the scales of blocks, and the scales of those, where they are nested."""
    NESTED: tl.constexpr = FORMAT[2]
    stored = tl.load(codes[0] + block, mask=mask, other=0)
    nested = stored
    if NESTED > 0:
        nested = tl.load(codes[3] + block // NESTED, mask=mask, other=0.0)
    return stored, nested


@triton.jit
def decoded_scales(codes, stored, nested, FORMAT: tl.constexpr):
    """fp32 scales from what `load_scales` gave."""
    if FORMAT[2] > 0:
        # two roundings, as bitsandbytes has: launched without fused multiply-add
        scales = tl.load(codes[2] + stored.to(tl.int32)) * nested + tl.load(codes[4])
    elif FORMAT[3]:
        # the exponent in an fp32's place; 2**-127 has no exponent there
        scales = tl.maximum(stored.to(tl.int32) << 23, 1 << 22).to(tl.float32, bitcast=True)
    else:
        scales = stored
    return scales


@triton.jit
def decoded_values(codes, packed, scales, dtype: tl.constexpr, FORMAT: tl.constexpr):
    """[..., 2 n] values of packed bytes [..., n], times scales that broadcast to them."""
    high = (tl.load(codes[1] + (packed >> 4).to(tl.int32)) * scales).to(dtype)
    low = (tl.load(codes[1] + (packed & 15).to(tl.int32)) * scales).to(dtype)
    return tl.interleave(low, high) if FORMAT[4] else tl.interleave(high, low)


@triton.jit
def _load_spans(packed_ptr, codes, flat, mask, FORMAT: tl.constexpr):
    """Bytes [P, Q, SPAN / 2] of the spans that begin at values flat [P, Q] of the stack, and `load_scales` of them."""
    HALF: tl.constexpr = FORMAT[1] // 2
    first = tl.multiple_of(flat // 2, [16, 16])
    bytes_ptrs = packed_ptr + first[:, :, None] + tl.arange(0, HALF)[None, None, :]
    packed = tl.load(bytes_ptrs, mask=mask[:, :, None], other=0)
    stored, nested = load_scales(codes, flat // FORMAT[0], mask, FORMAT)
    return packed, stored, nested


@triton.jit
def add_product_4bit(
    acc, x_ptrs, packed_ptr, codes, e, cols, mask_n, K, stride_xk, stride_we, stride_wn, stride_wk,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_UNIT: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] + x W[e]^T, x at x_ptrs [BLOCK_M, BLOCK_K], W of columns cols [BLOCK_N]."""
    SPAN: tl.constexpr = FORMAT[1]
    offs_k = tl.arange(0, BLOCK_K)
    if K_UNIT:
        # [N, K / SPAN]
        n, exists = cols[:, None], mask_n[:, None]
        span_k = tl.arange(0, BLOCK_K // SPAN)[None, :] * SPAN
    else:
        # [K, N / SPAN]: a span lies within a half, and past the last column as a whole
        n = tl.min(cols.reshape(BLOCK_N // SPAN, SPAN), 1)[None, :]
        exists = tl.max(mask_n.reshape(BLOCK_N // SPAN, SPAN).to(tl.int32), 1)[None, :] > 0
        span_k = offs_k[:, None]
    flat = e * stride_we + n.to(tl.int64) * stride_wn + span_k.to(tl.int64) * stride_wk
    packed, stored, nested = _load_spans(packed_ptr, codes, flat, exists & (span_k < K), FORMAT)
    x = tl.load(x_ptrs, mask=offs_k[None, :] < K, other=0.0)
    for k in range(0, K, BLOCK_K):
        # the next tile is on its way while this one is decoded
        x_ptrs += BLOCK_K * stride_xk
        flat += BLOCK_K * stride_wk
        left = K - k - BLOCK_K
        mask = exists & (span_k < left)
        next_packed, next_stored, next_nested = _load_spans(packed_ptr, codes, flat, mask, FORMAT)
        next_x = tl.load(x_ptrs, mask=offs_k[None, :] < left, other=0.0)
        scales = decoded_scales(codes, stored, nested, FORMAT)[:, :, None]
        weight = decoded_values(codes, packed, scales, x.dtype, FORMAT)
        if K_UNIT:
            weight = weight.reshape(BLOCK_N, BLOCK_K).trans()
        else:
            weight = weight.reshape(BLOCK_K, BLOCK_N)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)  # [M, K] @ [K, N] -> [M, N]
        x, packed, stored, nested = next_x, next_packed, next_stored, next_nested
    return acc


def decodes_in_kernel(weight: torch.Tensor | QuantizedWeight, block_m: int) -> bool:
    """Whether products of a weight decode it for themselves: 4 bits, tiles of few rows, rows of whole spans.

    Args:
        block_m: rows of a tile, which follow from the rows an expert has when routing is even.
    """
    if not isinstance(weight, Codes4bit) or block_m > MAX_BLOCK_M or weight.stored_shape[2] % 64:
        return False
    return (
        lookup("linear_4bit", device_facts(weight.device)[0], weight.dtype.itemsize, block_m)
        is not None
    )


def weight_operands(
    weight: torch.Tensor | Codes4bit, blocks: dict, halves: int = 1
) -> tuple[tuple, dict]:
    """(the weight's pointers, constexprs) of a linear kernel, for dense weights and codes.

    Args:
        blocks: constexprs of the kernel's tiles.
        halves: of a tile's columns, which lie apart in memory.
    """
    if isinstance(weight, torch.Tensor):
        return (weight, None, None, None, None, None), _DENSE
    C = weight.stored_shape[2]
    if blocks["K_UNIT"]:
        span = gcd(weight.blocksize, C, blocks["BLOCK_K"])
    else:
        span = gcd(weight.blocksize, C // halves, blocks["BLOCK_N"] // halves)
    return code_operands(weight, span)


def code_operands(weight: Codes4bit, span: int) -> tuple[tuple, dict]:
    """(pointers, constexprs) of the codes of a weight in spans of so many values."""
    nested = weight.nested_code is not None
    constants = {
        "BLOCKSIZE": weight.blocksize, "SPAN": span, "NESTED": nested * weight.nested_blocksize,
        "EXPONENTS": not nested and weight.scales.dtype == torch.uint8, "LOW_FIRST": weight.low_first,
        "enable_fp_fusion": False,
    }  # fmt: skip
    pointers = (
        weight.packed,
        weight.scales,
        weight.code,
        weight.nested_code,
        weight.nested_scales,
        weight.offset,
    )
    return pointers, constants
