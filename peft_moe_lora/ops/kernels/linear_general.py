"""y[m] = W[e] x[row] + bias[e] + mask * (B[e] xa[m]), and act[m] = f(gate) * (up + up_shift).

gate and up are the two halves of y or, if interleaved, its even and its odd columns.
row = row_token[m] where x is gathered, else m.

One kernel for products with an activation and without, and for every case: dropout, quantized
weights, any strides, any GPU. A tile holds the same columns of the gate half and of the up half, so
the activation is part of the product's epilogue.
"""

import torch
import triton
import triton.language as tl

from .codes.decode_4bit import ROUNDED
from .codes.product_4bit import weight_operands
from .launching.launch import facts, launch
from .launching.table import dot_precision, options_of, padded_rank
from .operands import Act, Bias, LowRank, Operand, Output, Routes, Shape, Weight
from .tiles.activation import activate, activate_plain
from .tiles.descriptors import row_descriptor
from .tiles.dropout import probability_and_drop
from .tiles.product import Product
from .tiles.tile import (
    Descriptors,
    Inputs,
    Spot,
    Tile,
    halves,
    launch_facts,
    position,
    table_line,
    table_size,
    tile_columns,
    tile_product,
)


@triton.jit
def _store_act(acc, output, offs_m, end, n, N, cols, mask_n, ACT):
    """Store a tile [BLOCK_M, BLOCK_N] of y, if it is wanted, and its activation."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_I: tl.constexpr = acc.shape[1] // 2 if ACT.GATED else acc.shape[1]
    y_ptr, act_ptr = output
    mask_m = (offs_m < end)[:, None]
    rows_out = offs_m.to(tl.int64)[:, None]
    dtype = act_ptr.dtype.element_ty
    offs_i = n * BLOCK_I + tl.arange(0, BLOCK_I)
    I = N // 2 if ACT.GATED else N  # noqa: E741
    mask_i = mask_m & (offs_i < I)[None, :]
    act_ptrs = act_ptr + rows_out * I + offs_i[None, :]
    if ACT.HALVES == 1:
        if y_ptr is not None:
            mask_y = mask_m & mask_n[None, :]
            tl.store(y_ptr + rows_out * N + cols[None, :], acc.to(dtype), mask=mask_y)
    if not ACT.GATED:
        tl.store(act_ptrs, activate_plain(acc, ACT).to(dtype), mask=mask_i)
    else:
        if ACT.INTERLEAVED:
            gate, up = tl.split(acc.reshape(BLOCK_M, BLOCK_I, 2))
        else:
            gate, up = halves(acc, BLOCK_M, BLOCK_I)
            if y_ptr is not None:
                tl.store(y_ptr + rows_out * N + offs_i[None, :], gate.to(dtype), mask=mask_i)
                tl.store(y_ptr + rows_out * N + (I + offs_i)[None, :], up.to(dtype), mask=mask_i)
        # act is computed from the rounded values that are stored: fp32 values need more registers
        gate = gate.to(dtype).to(tl.float32)
        up = up.to(dtype).to(tl.float32)
        tl.store(act_ptrs, activate(gate, up, ACT).to(dtype), mask=mask_i)


@triton.jit
def _linear_tile(inputs, output, row_token_ptr, e, first_row, end, n, TILE, ACT, FORMAT):
    """Compute column tile n of expert e, for rows first_row up to min(first_row + BLOCK_M, end)."""
    N = inputs.shape.N
    offs_m = first_row + tl.arange(0, TILE.M)
    # past the expert's last row, that row is repeated: loads need no mask. Copies are not stored
    rows = tl.minimum(offs_m, end - 1)
    x_rows = rows
    if TILE.GATHER:
        x_rows = tl.load(row_token_ptr + rows)
    n0 = n * (TILE.N // ACT.HALVES)
    cols, mask_n = tile_columns(n0, N // ACT.HALVES, TILE.N, ACT.HALVES)
    spot = Spot(e, first_row, n0, rows, x_rows, cols, mask_n)
    acc = tile_product(inputs, spot, TILE, FORMAT)
    if ACT.KIND is None:
        y_ptrs = output.y + offs_m.to(tl.int64)[:, None] * N + cols[None, :]
        mask = (offs_m < end)[:, None] & mask_n[None, :]
        tl.store(y_ptrs, acc.to(output.y.dtype.element_ty), mask=mask)
    else:
        _store_act(acc, output, offs_m, end, n, N, cols, mask_n, ACT)


@triton.jit(do_not_specialize=["lines"])
def _linear_kernel(
    x_desc, weight_desc, x, weight, codes, bias, low_rank, output, drop, routes, lines, shape,
    TILE, ACT, FORMAT,
):  # fmt: skip
    """Persistent grid: each program computes every num_programs-th output tile."""
    HALF_TILE: tl.constexpr = Tile(
        TILE.M // 2, TILE.N, TILE.K, TILE.EVEN_K, TILE.K_UNIT, TILE.GATHER, TILE.P, TILE.R,
        TILE.PRECISION, TILE.GROUP, TILE.TAIL,
    )  # fmt: skip
    descs = Descriptors(x_desc, weight_desc)
    inputs = Inputs(descs, x, weight, codes, bias, low_rank, drop, shape)
    # the descriptor of x has boxes of BLOCK_M rows
    half_descs = Descriptors(None, weight_desc)
    half_inputs = Inputs(half_descs, x, weight, codes, bias, low_rank, drop, shape)
    num_tiles = table_size(routes.tiles, lines)
    num_n = tl.cdiv(shape.N // ACT.HALVES, TILE.N // ACT.HALVES)
    total = num_tiles * num_n
    tile, n = position(tl.minimum(tl.program_id(0), total - 1), num_tiles, num_n, TILE.GROUP)
    e, first_row, end = table_line(routes.tiles, tl.maximum(tile, 0))
    # for large ranks nothing is hoisted out of the loop: hoisted values would take their registers
    LARGE_RANK: tl.constexpr = TILE.R > 16 and not ACT.INTERLEAVED
    for t in tl.range(tl.program_id(0), total, tl.num_programs(0), disable_licm=LARGE_RANK):
        # the table line of the next tile is loaded while this tile is computed
        next_tile, next_n = position(
            tl.minimum(t + tl.num_programs(0), total - 1), num_tiles, num_n, TILE.GROUP
        )
        next_e, next_first_row, next_end = table_line(routes.tiles, next_tile)
        if TILE.TAIL and end - first_row <= TILE.M // 2:
            # an expert's last rows, if they fill at most half a tile
            _linear_tile(
                half_inputs, output, routes.row_token, e, first_row, end, n, HALF_TILE, ACT, FORMAT
            )
        else:
            _linear_tile(inputs, output, routes.row_token, e, first_row, end, n, TILE, ACT, FORMAT)
        e = next_e
        first_row = next_first_row
        end = next_end
        n = next_n


def _op(product: Product) -> str:
    """The name of the product in the table of block sizes."""
    op = "linear"
    if product.activation is not None:
        op = "linear_act"
    if not isinstance(product.weight, torch.Tensor):
        return op + "_4bit"
    if product.gather and product.activation is None:
        return op + "_gathered"
    return op


def linear_general(product: Product) -> None:
    """Write y and, with an activation, act.

    Args:
        product: its weight is dense or in 4-bit codes.
    """
    x = product.x
    weight = product.weight
    routing = product.routing
    activation = product.activation
    factors = product.xa, product.lora_B
    _, N, K = weight.shape
    r = product.rank
    precision = dot_precision(x.dtype)
    programs, blocks, weight_desc = launch_facts(
        _op(product), x, weight, routing.block_m, product.halves
    )
    x_desc = None
    if weight_desc is not None and not product.gather and activation is None:
        x_desc = row_descriptor(x, blocks["BLOCK_M"], blocks["BLOCK_K"])
    p, drop = probability_and_drop(product.dropout, routing)
    values, codes, form = weight_operands(weight, blocks, product.halves)
    output = Output(product.y, product.act)

    def arguments() -> tuple[tuple, tuple, dict]:
        tile = Tile(
            M=blocks["BLOCK_M"],
            N=blocks["BLOCK_N"],
            K=blocks["BLOCK_K"],
            EVEN_K=blocks["EVEN_K"],
            K_UNIT=blocks["K_UNIT"],
            GATHER=product.gather,
            P=p,
            R=padded_rank(r),
            PRECISION=precision,
            GROUP=blocks["GROUP"],
            TAIL=blocks["TAIL"],
        )
        operands = (
            Operand.of(x), Weight(values, *weight.stride()), codes, Bias.of(product.bias),
            LowRank.of(*factors), output, drop, Routes(routing.tiles, routing.row_token),
        )  # fmt: skip
        constants = {"TILE": tile, "ACT": Act.of(activation), "FORMAT": form, **options_of(blocks)}
        if codes.scales is not None:
            constants |= ROUNDED
        return operands, (Shape(N, K, r),), constants

    op = "linear"
    if activation is not None:
        op = "linear_act"
    key = (
        op, facts(x, weight, product.bias, *factors), N, K, r, activation, product.gather, p,
        precision, routing.block_m, x_desc is None, weight_desc is None, product.y is None, form,
    )  # fmt: skip
    tensors = (
        x, values, *codes, product.bias, *factors, *output, *drop, routing.tiles, routing.row_token,
    )  # fmt: skip
    lines = routing.tiles.shape[0]
    descriptors = x_desc, weight_desc
    launch(key, _linear_kernel, (programs, 1, 1), tensors, arguments, (lines,), descriptors)
