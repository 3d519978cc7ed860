"""acc[m, n] += sum over k of x[row, k] * W[e, n, k], W decoded from 4-bit codes inside the K loop.

If experts have few rows, a product spends most of its time on loading the weight. Here only the
codes are loaded, a quarter of the bytes of a 16-bit weight, and the decoded tile never leaves the
registers. If experts have many rows, several row tiles would decode the same codes. Then `parts`
decodes each expert once into a scratch buffer, and a dense product reads this buffer.

Legend: codes, FORMAT and SPAN as in `decode_4bit`.
"""

from math import gcd

import torch
import triton
import triton.language as tl

from ...quantized import Codes4bit, QuantizedWeight
from ..launching.table import device_facts, lookup
from ..operands import Codes, Format
from .decode_4bit import decoded_scales, decoded_values, load_scales

# a product decodes its weight itself if its tiles have at most this many rows. With 16 rows an
# expert this took 0.95 ms, and 1.02 ms with a scratch buffer; with 32 rows it took 1.18 ms, and
# 1.05 ms with a scratch buffer (NVIDIA H200, 2026-11-21)
MAX_BLOCK_M = 16
# the arguments `codes` and FORMAT for a dense weight
_NO_CODES = Codes(None, None, None, None, None)
_NO_FORMAT = Format(0, 0, 0, False, False)


@triton.jit
def _load_spans(packed_ptr, codes, flat, mask, FORMAT):
    """Load the packed bytes [P, Q, SPAN / 2] and the stored scales [P, Q] of spans.

    flat [P, Q]: the index, in the flat stack, of the first value of each span.
    """
    HALF: tl.constexpr = FORMAT.SPAN // 2
    first = tl.multiple_of(flat // 2, [16, 16])
    bytes_ptrs = packed_ptr + first[:, :, None] + tl.arange(0, HALF)[None, None, :]
    packed = tl.load(bytes_ptrs, mask=mask[:, :, None], other=0)
    stored, nested = load_scales(codes, flat // FORMAT.BLOCKSIZE, mask, FORMAT)
    return packed, stored, nested


@triton.jit
def add_product_4bit(
    acc, x_ptrs, stride_xk, weight, codes, e, cols, mask_n, K, TILE,
    FORMAT,
):  # fmt: skip
    """acc [BLOCK_M, BLOCK_N] + x W[e]^T.

    x_ptrs [BLOCK_M, BLOCK_K]: the first tile of x. cols [BLOCK_N]: the columns of the tile.
    weight: `operands.Weight` of the packed bytes; its strides count values.
    TILE: as in `tiles.tile`.
    codes, FORMAT: as in `decode_4bit`.
    """
    SPAN: tl.constexpr = FORMAT.SPAN
    offs_k = tl.arange(0, TILE.K)
    if TILE.K_UNIT:
        # spans [N, K / SPAN]
        n = cols[:, None]
        exists = mask_n[:, None]
        span_k = tl.arange(0, TILE.K // SPAN)[None, :] * SPAN
    else:
        # spans [K, N / SPAN]: a span never crosses from the gate half to the up half, and either
        # all or none of its columns exist
        n = tl.min(cols.reshape(TILE.N // SPAN, SPAN), 1)[None, :]
        exists = tl.max(mask_n.reshape(TILE.N // SPAN, SPAN).to(tl.int32), 1)[None, :] > 0
        span_k = offs_k[:, None]
    flat = e * weight.stride_e + n.to(tl.int64) * weight.stride_n
    flat += span_k.to(tl.int64) * weight.stride_k
    packed, stored, nested = _load_spans(weight.ptr, codes, flat, exists & (span_k < K), FORMAT)
    x = tl.load(x_ptrs, mask=offs_k[None, :] < K, other=0.0)
    for k in range(0, K, TILE.K):
        # the loads of the next tile are in flight while this one is decoded
        x_ptrs += TILE.K * stride_xk
        flat += TILE.K * weight.stride_k
        left = K - k - TILE.K
        mask = exists & (span_k < left)
        next_packed, next_stored, next_nested = _load_spans(weight.ptr, codes, flat, mask, FORMAT)
        next_x = tl.load(x_ptrs, mask=offs_k[None, :] < left, other=0.0)
        scales = decoded_scales(codes, stored, nested, FORMAT)[:, :, None]
        values = decoded_values(codes, packed, scales, x.dtype, FORMAT)
        if TILE.K_UNIT:
            values = values.reshape(TILE.N, TILE.K).trans()
        else:
            values = values.reshape(TILE.K, TILE.N)
        acc = tl.dot(x, values, acc, input_precision=TILE.PRECISION)  # [M, K] @ [K, N] -> [M, N]
        x = next_x
        packed = next_packed
        stored = next_stored
        nested = next_nested
    return acc


def decodes_in_kernel(weight: torch.Tensor | QuantizedWeight, block_m: int) -> bool:
    """Whether the product decodes this weight itself, so that nothing is decoded before it.

    It does if the weight has 4-bit codes, row tiles are small, the stored rows have a multiple of
    64 values, and the table has a row for it.

    Args:
        block_m: rows of a tile; depends on the rows that an expert has when routing is even.
    """
    if not isinstance(weight, Codes4bit):
        return False
    if block_m > MAX_BLOCK_M or weight.stored_shape[2] % 64:
        return False
    arch, _ = device_facts(weight.device)
    return lookup("linear_4bit", arch, weight.dtype.itemsize, block_m) is not None


def weight_operands(
    weight: torch.Tensor | Codes4bit, blocks: dict, halves: int = 1
) -> tuple[torch.Tensor, Codes, Format]:
    """A linear kernel's arguments for a weight, dense or in 4-bit codes.

    Args:
        blocks: the constexprs of the kernel's tiles.
        halves: 2 if half of a tile's columns are gate and half up, which lie apart in memory.
    Returns: the weight itself or its packed bytes, the codes, and FORMAT.
    """
    if isinstance(weight, torch.Tensor):
        return weight, _NO_CODES, _NO_FORMAT
    C = weight.stored_shape[2]
    if blocks["K_UNIT"]:
        span = gcd(weight.blocksize, C, blocks["BLOCK_K"])
    else:
        span = gcd(weight.blocksize, C // halves, blocks["BLOCK_N"] // halves)
    return weight.packed, Codes.of(weight), Format.of(weight, span)
