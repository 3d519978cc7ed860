"""y[m] = W[e] x[row] + bias[e] + mask * (B[e] xa[m]).

row = row_token[m] where x is gathered, else m.

`expert_linear` chooses one of three kernels: `sm90.linear_roles`, `linear_ordered` for rows in
expert order, or the kernel of this file, which supports every case: dropout, quantized weights, any
strides, any GPU.
"""

import torch
import triton
import triton.language as tl

from ..dropout import Dropout
from ..quantized import Codes4bit, QuantizedWeight
from ..routing import Routing
from .codes.product_4bit import weight_operands
from .launching.launch import facts, launch
from .launching.table import dot_precision, padded_rank
from .linear_ordered import linear_ordered
from .operands import Bias, Codes, Drop, Format, LowRank, Operand, Shape, Weight
from .parts import of_experts, parts
from .routing import with_tiles
from .sm90.by_roles import by_roles
from .tiles.descriptors import row_descriptor
from .tiles.dropout import probability_and_seed
from .tiles.tile import (
    Descriptors,
    Inputs,
    Spot,
    Tile,
    launch_facts,
    position,
    rank_of,
    strides_or_zeros,
    table_line,
    table_size,
    tile_columns,
    tile_product,
)


@triton.jit
def _linear_tile(
    inputs, y_ptr, stride_ym, row_token_ptr, e, first_row, end, n, TILE: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Compute column tile n of expert e, for rows first_row up to min(first_row + BLOCK_M, end)."""
    n0 = n * TILE.N
    offs_m = first_row + tl.arange(0, TILE.M)
    # past the expert's last row, that row is repeated: loads need no mask. Copies are not stored
    rows = tl.minimum(offs_m, end - 1)
    x_rows = rows
    if TILE.GATHER:
        x_rows = tl.load(row_token_ptr + rows)
    cols, mask_n = tile_columns(n0, inputs.shape.N, TILE.N, 1)
    spot = Spot(e, first_row, n0, rows, x_rows, cols, mask_n)
    acc = tile_product(inputs, spot, TILE, FORMAT)
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + cols[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=(offs_m < end)[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["lines"])
def _linear_kernel(
    x_desc, weight_desc, x_ptr, weight_ptr, scales_ptr, code_ptr, nested_code_ptr,
    nested_scales_ptr, offset_ptr, bias_ptr, xa_ptr, lora_B_ptr, y_ptr, seed_ptr, row_token_ptr,
    row_slot_ptr, tiles_ptr, lines, N, K, r, stride_xm, stride_xk, stride_we, stride_wn, stride_wk,
    stride_xam, stride_xar, stride_be, stride_bn, stride_br, stride_biase, stride_biasn, stride_ym,
    GATHER: tl.constexpr, P: tl.constexpr, R: tl.constexpr, PRECISION: tl.constexpr,
    GROUP: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, K_UNIT: tl.constexpr, BLOCKSIZE: tl.constexpr,
    SPAN: tl.constexpr, NESTED: tl.constexpr, EXPONENTS: tl.constexpr, LOW_FIRST: tl.constexpr,
):  # fmt: skip
    """Persistent grid: each program computes every num_programs-th output tile."""
    TILE: tl.constexpr = Tile(BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, K_UNIT, GATHER, P, R, PRECISION)
    HALF_TILE: tl.constexpr = Tile(
        BLOCK_M // 2, BLOCK_N, BLOCK_K, EVEN_K, K_UNIT, GATHER, P, R, PRECISION
    )
    FORMAT: tl.constexpr = Format(BLOCKSIZE, SPAN, NESTED, EXPONENTS, LOW_FIRST)
    x = Operand(x_ptr, stride_xm, stride_xk)
    weight = Weight(weight_ptr, stride_we, stride_wn, stride_wk)
    codes = Codes(scales_ptr, code_ptr, nested_code_ptr, nested_scales_ptr, offset_ptr)
    bias = Bias(bias_ptr, stride_biase, stride_biasn)
    lora_B = Weight(lora_B_ptr, stride_be, stride_bn, stride_br)
    low_rank = LowRank(Operand(xa_ptr, stride_xam, stride_xar), lora_B)
    drop = Drop(seed_ptr, row_slot_ptr)
    shape = Shape(N, K, r)
    descs = Descriptors(x_desc, weight_desc)
    inputs = Inputs(descs, x, weight, codes, bias, low_rank, drop, shape)
    # the descriptor of x has boxes of BLOCK_M rows
    half_descs = Descriptors(None, weight_desc)
    half_inputs = Inputs(half_descs, x, weight, codes, bias, low_rank, drop, shape)
    num_tiles = table_size(tiles_ptr, lines)
    num_n = tl.cdiv(N, BLOCK_N)
    total = num_tiles * num_n
    tile, n = position(tl.minimum(tl.program_id(0), total - 1), num_tiles, num_n, GROUP)
    e, first_row, end = table_line(tiles_ptr, tl.maximum(tile, 0))
    # for large ranks nothing is hoisted out of the loop: hoisted values would take their registers
    LARGE_RANK: tl.constexpr = R > 16
    for t in tl.range(tl.program_id(0), total, tl.num_programs(0), disable_licm=LARGE_RANK):
        # the table line of the next tile is loaded while this tile is computed
        next_tile, next_n = position(
            tl.minimum(t + tl.num_programs(0), total - 1), num_tiles, num_n, GROUP
        )
        next_e, next_first_row, next_end = table_line(tiles_ptr, next_tile)
        if TAIL and end - first_row <= BLOCK_M // 2:
            # an expert's last rows, if they fill at most half a tile
            _linear_tile(
                half_inputs, y_ptr, stride_ym, row_token_ptr, e, first_row, end, n, HALF_TILE,
                FORMAT,
            )  # fmt: skip
        else:
            _linear_tile(
                inputs, y_ptr, stride_ym, row_token_ptr, e, first_row, end, n, TILE, FORMAT
            )
        e = next_e
        first_row = next_first_row
        end = next_end
        n = next_n


def expert_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
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
        weight: [E, N, K], quantized or in the dtype of x. Any strides; fast if the stride of N or
            of K is 1.
        bias: [E, N].
        xa: [M, R] rows of rank r, dtype of x.
        lora_B: [E, N, r], any strides and float dtype; given with xa.
        gather: whether row m reads token row_token[m].
        dropout: masks the low-rank term of the output. Backward uses it for the gradient of an
            input on which forward applied dropout.
    Returns: [M, N], dtype of x.
    Twin: `reference.expert_linear`.
    """
    routing = with_tiles(routing)
    M = routing.num_rows
    N = weight.shape[1]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        for experts, part_weight, part in parts(weight, routing):
            part_bias = of_experts(bias, experts)
            part_B = of_experts(lora_B, experts)
            _linear(x, part_weight, part, part_bias, xa, part_B, gather, dropout, y)
    return y


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor | Codes4bit,
    routing: Routing,
    bias: torch.Tensor | None,
    xa: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    gather: bool,
    dropout: Dropout | None,
    y: torch.Tensor,
) -> None:
    """Write the rows of y that belong to the routing's tiles."""
    packed = not isinstance(weight, torch.Tensor)
    if not packed:
        if by_roles(x, weight, routing, bias, xa, lora_B, y, gather, dropout=dropout):
            return
        if (
            dropout is None
            and not gather
            and linear_ordered(x, weight, routing, bias, xa, lora_B, y)
        ):
            return
    _, N, K = weight.shape
    r = rank_of(xa, lora_B)
    precision = dot_precision(x.dtype)
    if packed:
        op = "linear_4bit"
    elif gather:
        op = "linear_gathered"
    else:
        op = "linear"
    programs, blocks, weight_desc = launch_facts(op, x, weight, routing.block_m)
    x_desc = None
    if weight_desc is not None and not gather:
        x_desc = row_descriptor(x, blocks["BLOCK_M"], blocks["BLOCK_K"])
    p, seed = probability_and_seed(dropout)
    weight_tensors, codes = weight_operands(weight, blocks)

    def rest() -> tuple[tuple, tuple, dict]:
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
        return tensors, (N, K, r, *strides), constants

    key = (
        "linear", facts(x, weight, bias, xa, lora_B), N, K, r, gather, p, precision,
        routing.block_m, x_desc is None, weight_desc is None, *codes.values(),
    )  # fmt: skip
    tensors = (
        x, *weight_tensors, bias, xa, lora_B, y, seed, routing.row_token, routing.row_slot,
        routing.tiles,
    )  # fmt: skip
    lines = routing.tiles.shape[0]
    descriptors = x_desc, weight_desc
    launch(key, _linear_kernel, (programs, 1, 1), tensors, rest, (lines,), descriptors)
