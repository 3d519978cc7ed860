"""y[m] = W[e] x[row] + bias[e] + mask * (B[e] xa[m]), row = row_token[m] where x is gathered, else m."""

import torch
import triton
import triton.language as tl

from ..dropout import Dropout
from ..routing import Routing
from .codes.product_4bit import weight_operands
from .launching.launch import facts, launch
from .launching.table import dot_precision, padded_rank
from .linear_ordered import linear_ordered
from .parts import of_experts, parts
from .routing import with_tiles
from .sm90.by_roles import by_roles
from .tiles.descriptors import row_descriptor
from .tiles.tile import (
    launch_facts,
    position,
    strides_or_zeros,
    table_line,
    table_size,
    tile_columns,
    tile_product,
)


@triton.jit
def _linear_tile(
    x_ptr, x_desc, weight_ptr, weight_desc, codes, bias_ptr, xa_ptr, lora_B_ptr, y_ptr, seed_ptr, row_token_ptr,
    row_slot_ptr, e, first_row, end, n0, N, K, r,
    stride_xm, stride_xk, stride_we, stride_wn, stride_wk, stride_xam, stride_xar, stride_be, stride_bn, stride_br,
    stride_biase, stride_biasn, stride_ym,
    GATHER: tl.constexpr, P: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, K_UNIT: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Rows first_row up to min(first_row + BLOCK_M, end) of expert e, columns n0 up to n0 + BLOCK_N."""
    offs_m = first_row + tl.arange(0, BLOCK_M)
    # a row past the expert's last computes the last again, unmasked, and is not stored
    rows = tl.minimum(offs_m, end - 1)
    x_rows = tl.load(row_token_ptr + rows) if GATHER else rows
    cols, mask_n = tile_columns(n0, N, BLOCK_N, 1)
    acc = tile_product(
        x_ptr, x_desc, weight_ptr, weight_desc, codes, bias_ptr, xa_ptr, lora_B_ptr, seed_ptr, row_slot_ptr,
        e, rows, x_rows, first_row, n0, cols, mask_n, K, r,
        stride_xm, stride_xk, stride_we, stride_wn, stride_wk, stride_xam, stride_xar, stride_be, stride_bn, stride_br,
        stride_biase, stride_biasn, P, R, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, K_UNIT,
        FORMAT,
    )  # fmt: skip
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + cols[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_m < end)[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["lines"])
def _linear_kernel(
    x_desc, weight_desc, x_ptr, weight_ptr, scales_ptr, code_ptr, nested_code_ptr, nested_scales_ptr, offset_ptr,
    bias_ptr, xa_ptr, lora_B_ptr, y_ptr, seed_ptr, row_token_ptr, row_slot_ptr, tiles_ptr, lines, N, K, r,
    stride_xm, stride_xk, stride_we, stride_wn, stride_wk, stride_xam, stride_xar, stride_be, stride_bn, stride_br,
    stride_biase, stride_biasn, stride_ym,
    GATHER: tl.constexpr, P: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr,
    TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    K_UNIT: tl.constexpr, BLOCKSIZE: tl.constexpr, SPAN: tl.constexpr, NESTED: tl.constexpr, EXPONENTS: tl.constexpr,
    LOW_FIRST: tl.constexpr,
):  # fmt: skip
    """Persistent grid: each program takes every num_programs-th output tile."""
    codes = (scales_ptr, code_ptr, nested_code_ptr, nested_scales_ptr, offset_ptr)
    FORMAT: tl.constexpr = (BLOCKSIZE, SPAN, NESTED, EXPONENTS, LOW_FIRST)
    num_tiles = table_size(tiles_ptr, lines)
    num_n = tl.cdiv(N, BLOCK_N)
    total = num_tiles * num_n
    tile, n = position(tl.minimum(tl.program_id(0), total - 1), num_tiles, num_n, GROUP)
    e, first_row, end = table_line(tiles_ptr, tl.maximum(tile, 0))
    # what is hoisted out of this loop holds registers that the steps of large ranks need
    LARGE_RANK: tl.constexpr = R > 16
    for t in tl.range(tl.program_id(0), total, tl.num_programs(0), disable_licm=LARGE_RANK):
        # the next tile's line is on its way while this tile is computed
        next_tile, next_n = position(
            tl.minimum(t + tl.num_programs(0), total - 1), num_tiles, num_n, GROUP
        )
        next_e, next_first_row, next_end = table_line(tiles_ptr, next_tile)
        if TAIL and end - first_row <= BLOCK_M // 2:
            # half a tile's rows in half its time
            _linear_tile(
                x_ptr, None, weight_ptr, weight_desc, codes, bias_ptr, xa_ptr, lora_B_ptr, y_ptr, seed_ptr,
                row_token_ptr, row_slot_ptr, e, first_row, end, n * BLOCK_N, N, K, r, stride_xm, stride_xk, stride_we,
                stride_wn, stride_wk, stride_xam, stride_xar, stride_be, stride_bn, stride_br, stride_biase,
                stride_biasn, stride_ym, GATHER, P, R, PRECISION, BLOCK_M // 2, BLOCK_N, BLOCK_K, EVEN_K, K_UNIT,
                FORMAT,
            )  # fmt: skip
        else:
            _linear_tile(
                x_ptr, x_desc, weight_ptr, weight_desc, codes, bias_ptr, xa_ptr, lora_B_ptr, y_ptr, seed_ptr,
                row_token_ptr, row_slot_ptr, e, first_row, end, n * BLOCK_N, N, K, r, stride_xm, stride_xk, stride_we,
                stride_wn, stride_wk, stride_xam, stride_xar, stride_be, stride_bn, stride_br, stride_biase,
                stride_biasn, stride_ym, GATHER, P, R, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, K_UNIT,
                FORMAT,
            )  # fmt: skip
        e, first_row, end, n = next_e, next_first_row, next_end, next_n


def expert_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    routing: Routing,
    *,
    bias: torch.Tensor | None = None,
    xa: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    gather: bool = False,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """y[m] = W[e] x[m] + bias[e] + drop(B[e] xa[m]).

    Args:
        x: [M, K] rows, or [T, K] tokens with gather; bf16, fp16 or fp32.
        weight: [E, N, K] dtype of x, any strides, fast where one of the last two is 1; or quantized.
        bias: [E, N].
        xa: [M, r], dtype of x, with its lora_B [E, N, r], any strides and float dtype.
        dropout: masks the low-rank term at the output: the input gradient of a layer that dropped its input.
    Returns: [M, N], dtype of x.
    Twin: `reference.expert_linear`.
    """
    routing = with_tiles(routing)
    M, N = routing.num_rows, weight.shape[1]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        for experts, held, part in parts(weight, routing):
            low_rank = xa, of_experts(lora_B, experts)
            _linear(x, held, part, of_experts(bias, experts), *low_rank, gather, dropout, y)
    return y


def _linear(x, weight, routing, bias, xa, lora_B, gather, dropout, y) -> None:
    """Write the rows of y that belong to the routing's tiles."""
    packed = not isinstance(weight, torch.Tensor)
    if not (packed or dropout):
        if by_roles(x, weight, routing, bias, xa, lora_B, y, gather):
            return
        if not gather and linear_ordered(x, weight, routing, bias, xa, lora_B, y):
            return
    _, N, K = weight.shape
    r, precision = 0 if xa is None else xa.shape[1], dot_precision(x.dtype)
    op = "linear_4bit" if packed else "linear_gathered" if gather else "linear"
    programs, blocks, weight_desc = launch_facts(op, x, weight, routing.block_m)
    x_desc = None
    if weight_desc is not None and not gather:
        x_desc = row_descriptor(x, blocks["BLOCK_M"], blocks["BLOCK_K"])
    p, seed = (dropout.p, dropout.seed) if dropout else (0.0, None)
    weight_tensors, codes = weight_operands(weight, blocks)

    def rest():
        strides = (
            *x.stride(), *weight.stride(), *strides_or_zeros(xa, 2), *strides_or_zeros(lora_B, 3),
            *strides_or_zeros(bias, 2), N,
        )  # fmt: skip
        constants = {
            "GATHER": gather,
            "P": p,
            "R": padded_rank(r),
            "PRECISION": precision,
            **blocks,
            **codes,
        }
        return (N, K, r, *strides), constants

    key = (
        "linear", facts(x, weight, bias, xa, lora_B), N, K, r, gather, p, precision, routing.block_m,
        x_desc is None, weight_desc is None, *codes.values(),
    )  # fmt: skip
    tensors = (
        x,
        *weight_tensors,
        bias,
        xa,
        lora_B,
        y,
        seed,
        routing.row_token,
        routing.row_slot,
        routing.tiles,
    )
    launch(
        key,
        _linear_kernel,
        (programs, 1, 1),
        tensors,
        rest,
        (routing.tiles.shape[0],),
        (x_desc, weight_desc),
    )
