"""pre[m] = W[e] x[row] + bias[e] + B[e] xa[m]; act[m] = f(gate) * (up + up_shift).

gate and up are the two halves of pre or, if interleaved, its even and its odd columns.
row = row_token[m] where x is gathered, else m.

A tile holds the same columns of the gate half and of the up half, so the activation is part of the
product's epilogue.
"""

import torch
import triton
import triton.language as tl

from ..activation import Activation
from ..quantized import Codes4bit, QuantizedWeight
from ..routing import Routing
from .codes.product_4bit import weight_operands
from .launching.launch import facts, launch
from .launching.table import dot_precision, padded_rank
from .operands import Act, Bias, Codes, Drop, Format, LowRank, Operand, Shape, Weight
from .parts import of_experts, parts
from .routing import with_tiles
from .sm90.by_roles import by_roles
from .tiles.activation import activate, activate_plain, activation_constants
from .tiles.tile import (
    Descriptors,
    Inputs,
    Spot,
    Tile,
    halves,
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
def _store_act(acc, outputs, offs_m, end, n, N, cols, mask_n, ACT: tl.constexpr):
    """Store a tile [BLOCK_M, BLOCK_N] of pre, if it is wanted, and its activation."""
    BLOCK_M: tl.constexpr = acc.shape[0]
    BLOCK_I: tl.constexpr = acc.shape[1] // 2 if ACT.GATED else acc.shape[1]
    pre_ptr, act_ptr = outputs
    mask_m = (offs_m < end)[:, None]
    rows_out = offs_m.to(tl.int64)[:, None]
    dtype = act_ptr.dtype.element_ty
    offs_i = n * BLOCK_I + tl.arange(0, BLOCK_I)
    I = N // 2 if ACT.GATED else N  # noqa: E741
    mask_i = mask_m & (offs_i < I)[None, :]
    act_ptrs = act_ptr + rows_out * I + offs_i[None, :]
    if not ACT.GATED or ACT.INTERLEAVED:
        if pre_ptr is not None:
            mask_pre = mask_m & mask_n[None, :]
            tl.store(pre_ptr + rows_out * N + cols[None, :], acc.to(dtype), mask=mask_pre)
    if not ACT.GATED:
        tl.store(act_ptrs, activate_plain(acc, ACT).to(dtype), mask=mask_i)
    else:
        if ACT.INTERLEAVED:
            gate, up = tl.split(acc.reshape(BLOCK_M, BLOCK_I, 2))
        else:
            gate, up = halves(acc, BLOCK_M, BLOCK_I)
            if pre_ptr is not None:
                tl.store(pre_ptr + rows_out * N + offs_i[None, :], gate.to(dtype), mask=mask_i)
                tl.store(pre_ptr + rows_out * N + (I + offs_i)[None, :], up.to(dtype), mask=mask_i)
        # act is computed from the rounded values that are stored: fp32 values need more registers
        gate = gate.to(dtype).to(tl.float32)
        up = up.to(dtype).to(tl.float32)
        tl.store(act_ptrs, activate(gate, up, ACT).to(dtype), mask=mask_i)


@triton.jit
def _linear_act_tile(
    inputs, outputs, row_token_ptr, e, first_row, end, n, TILE: tl.constexpr, ACT: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Compute column tile n of expert e, for rows first_row up to min(first_row + BLOCK_M, end)."""
    HALVES: tl.constexpr = 2 if ACT.GATED and not ACT.INTERLEAVED else 1
    N = inputs.shape.N
    offs_m = first_row + tl.arange(0, TILE.M)
    # past the expert's last row, that row is repeated: loads need no mask. Copies are not stored
    rows = tl.minimum(offs_m, end - 1)
    x_rows = rows
    if TILE.GATHER:
        x_rows = tl.load(row_token_ptr + rows)
    n0 = n * (TILE.N // HALVES)
    cols, mask_n = tile_columns(n0, N // HALVES, TILE.N, HALVES)
    spot = Spot(e, first_row, n0, rows, x_rows, cols, mask_n)
    acc = tile_product(inputs, spot, TILE, FORMAT)
    _store_act(acc, outputs, offs_m, end, n, N, cols, mask_n, ACT)


@triton.jit(do_not_specialize=["lines"])
def _linear_act_kernel(
    weight_desc, x_ptr, weight_ptr, scales_ptr, code_ptr, nested_code_ptr, nested_scales_ptr,
    offset_ptr, bias_ptr, xa_ptr, lora_B_ptr, pre_ptr, act_ptr, row_token_ptr, tiles_ptr, lines, N,
    K, r, stride_xm, stride_xk, stride_we, stride_wn, stride_wk, stride_xam, stride_xar, stride_be,
    stride_bn, stride_br, stride_biase, stride_biasn,
    KIND: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, LIMIT: tl.constexpr,
    ALPHA: tl.constexpr, UP_SHIFT: tl.constexpr, GATHER: tl.constexpr, R: tl.constexpr,
    PRECISION: tl.constexpr, GROUP: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, K_UNIT: tl.constexpr,
    BLOCKSIZE: tl.constexpr, SPAN: tl.constexpr, NESTED: tl.constexpr, EXPONENTS: tl.constexpr,
    LOW_FIRST: tl.constexpr,
):  # fmt: skip
    """Persistent grid: each program computes every num_programs-th output tile."""
    TILE: tl.constexpr = Tile(BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, K_UNIT, GATHER, 0.0, R, PRECISION)
    HALF_TILE: tl.constexpr = Tile(
        BLOCK_M // 2, BLOCK_N, BLOCK_K, EVEN_K, K_UNIT, GATHER, 0.0, R, PRECISION
    )
    ACT: tl.constexpr = Act(KIND, GATED, INTERLEAVED, LIMIT, ALPHA, UP_SHIFT, 1)
    FORMAT: tl.constexpr = Format(BLOCKSIZE, SPAN, NESTED, EXPONENTS, LOW_FIRST)
    lora_B = Weight(lora_B_ptr, stride_be, stride_bn, stride_br)
    inputs = Inputs(
        Descriptors(None, weight_desc),
        Operand(x_ptr, stride_xm, stride_xk),
        Weight(weight_ptr, stride_we, stride_wn, stride_wk),
        Codes(scales_ptr, code_ptr, nested_code_ptr, nested_scales_ptr, offset_ptr),
        Bias(bias_ptr, stride_biase, stride_biasn),
        LowRank(Operand(xa_ptr, stride_xam, stride_xar), lora_B),
        Drop(None, None),
        Shape(N, K, r),
    )
    outputs = pre_ptr, act_ptr
    HALVES: tl.constexpr = 2 if GATED and not INTERLEAVED else 1
    num_tiles = table_size(tiles_ptr, lines)
    num_n = tl.cdiv(N // HALVES, BLOCK_N // HALVES)
    total = num_tiles * num_n
    tile, n = position(tl.minimum(tl.program_id(0), total - 1), num_tiles, num_n, GROUP)
    e, first_row, end = table_line(tiles_ptr, tl.maximum(tile, 0))
    # for large ranks nothing is hoisted out of the loop: hoisted values would take their registers
    LARGE_RANK: tl.constexpr = R > 16 and not INTERLEAVED
    for t in tl.range(tl.program_id(0), total, tl.num_programs(0), disable_licm=LARGE_RANK):
        # the table line of the next tile is loaded while this tile is computed
        next_tile, next_n = position(
            tl.minimum(t + tl.num_programs(0), total - 1), num_tiles, num_n, GROUP
        )
        next_e, next_first_row, next_end = table_line(tiles_ptr, next_tile)
        if TAIL and end - first_row <= BLOCK_M // 2:
            # an expert's last rows, if they fill at most half a tile
            _linear_act_tile(
                inputs, outputs, row_token_ptr, e, first_row, end, n, HALF_TILE, ACT, FORMAT
            )
        else:
            _linear_act_tile(
                inputs, outputs, row_token_ptr, e, first_row, end, n, TILE, ACT, FORMAT
            )
        e = next_e
        first_row = next_first_row
        end = next_end
        n = next_n


def expert_linear_act(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    routing: Routing,
    activation: Activation,
    *,
    bias: torch.Tensor | None = None,
    xa: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    gather: bool = False,
    keep_pre: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """pre = `expert_linear`, act = activation(pre).

    Args:
        x: [M, K] rows, or [T, K] tokens with gather; bf16, fp16 or fp32.
        weight: [E, N, K], quantized or in the dtype of x. Any strides; fast if the stride of N or
            of K is 1.
        bias: [E, N].
        xa: [M, R] rows of rank r, dtype of x.
        lora_B: [E, N, r], any strides and float dtype; given with xa.
        gather: whether row m reads token row_token[m].
        keep_pre: whether pre is wanted; if not, it is not written to memory.
    Returns: pre [M, N], or None without keep_pre, and act [M, I]; dtype of x.
    Twin: `reference.expert_linear_act`.
    """
    routing = with_tiles(routing)
    M = routing.num_rows
    N = weight.shape[1]
    pre = torch.empty(M, N, dtype=x.dtype, device=x.device) if keep_pre else None
    act = torch.empty(M, activation.width(N), dtype=x.dtype, device=x.device)
    if M > 0:
        for experts, part_weight, part in parts(weight, routing):
            part_bias = of_experts(bias, experts)
            part_B = of_experts(lora_B, experts)
            _linear_act(x, part_weight, part, activation, part_bias, xa, part_B, gather, pre, act)
    return pre, act


def _linear_act(
    x: torch.Tensor,
    weight: torch.Tensor | Codes4bit,
    routing: Routing,
    activation: Activation,
    bias: torch.Tensor | None,
    xa: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    gather: bool,
    pre: torch.Tensor | None,
    act: torch.Tensor,
) -> None:
    """Write the rows of pre, if given, and of act that belong to the routing's tiles."""
    packed = not isinstance(weight, torch.Tensor)
    if not packed and by_roles(x, weight, routing, bias, xa, lora_B, pre, gather, activation, act):
        return
    _, N, K = weight.shape
    r = rank_of(xa, lora_B)
    precision = dot_precision(x.dtype)
    op = "linear_act"
    if packed:
        op = "linear_act_4bit"
    programs, blocks, weight_desc = launch_facts(op, x, weight, routing.block_m, activation.halves)
    weight_tensors, codes = weight_operands(weight, blocks, activation.halves)

    def rest() -> tuple[tuple, tuple, dict]:
        strides = (
            *x.stride(), *weight.stride(), *strides_or_zeros(xa, 2), *strides_or_zeros(lora_B, 3),
            *strides_or_zeros(bias, 2),
        )  # fmt: skip
        constants = {"GATHER": gather, "R": padded_rank(r), "PRECISION": precision}
        constants |= activation_constants(activation) | blocks | codes
        return tensors, (N, K, r, *strides), constants

    key = (
        "linear_act", facts(x, weight, bias, xa, lora_B), N, K, r, activation, gather, precision,
        routing.block_m, weight_desc is None, pre is None, *codes.values(),
    )  # fmt: skip
    tensors = x, *weight_tensors, bias, xa, lora_B, pre, act, routing.row_token, routing.tiles
    lines = routing.tiles.shape[0]
    launch(key, _linear_act_kernel, (programs, 1, 1), tensors, rest, (lines,), (weight_desc,))
