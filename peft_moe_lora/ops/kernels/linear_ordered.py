"""y[m] = W[e] x[m] + bias[e] + B[e] xa[m] for rows in expert order, loaded by descriptors.

The low-rank term is computed in additional steps of the K loop, which load xa and B instead of x
and W. So no product comes before or after this loop, and Triton can flatten it with the loop over
output tiles: the operands of the next tile are loaded while this tile is stored. A separate
low-rank term takes longer: this kernel takes 3 to 12 % less time, casts of B included (NVIDIA H200,
2026-11-21). The general kernel is in `linear`.
"""

import torch
import triton
import triton.language as tl

from ..routing import Routing
from .launching.launch import facts, launch
from .launching.table import ceil_div
from .tiles.descriptors import operand_descriptors
from .tiles.tile import (
    linear_blocks,
    position,
    rank_of,
    strides_or_zeros,
    table_line,
    table_size,
    tile_columns,
)


@triton.jit(do_not_specialize=["lines"])
def _linear_ordered_kernel(
    x_desc, weight_desc, xa_desc, lora_B_desc, y_ptr, bias_ptr, tiles_ptr, lines, N, K,
    stride_biase, stride_biasn, R_STEPS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, K_UNIT: tl.constexpr,
):  # fmt: skip
    """Persistent grid: each program computes every num_programs-th output tile."""
    num_tiles = table_size(tiles_ptr, lines)
    num_n = tl.cdiv(N, BLOCK_N)
    k_steps = tl.cdiv(K, BLOCK_K)
    for t in tl.range(tl.program_id(0), num_tiles * num_n, tl.num_programs(0), flatten=True):
        tile, n = position(t, num_tiles, num_n, GROUP)
        e, first_row, end = table_line(tiles_ptr, tile)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for i in range(k_steps + R_STEPS):
            # past K and past r, loads by descriptor return zeros
            k = i * BLOCK_K
            rows_desc = x_desc
            columns_desc = weight_desc
            if R_STEPS > 0:
                low_rank = i >= k_steps
                k = tl.where(low_rank, k - k_steps * BLOCK_K, k)
                if low_rank:
                    rows_desc = xa_desc
                    columns_desc = lora_B_desc
            x = rows_desc.load([first_row, k])
            if K_UNIT:
                weight = columns_desc.load([e, 0, n * BLOCK_N, k]).reshape(BLOCK_N, BLOCK_K).trans()
            else:
                weight = columns_desc.load([e, k, n * BLOCK_N]).reshape(BLOCK_K, BLOCK_N)
            acc = tl.dot(x, weight, acc)  # [M, K] @ [K, N] -> [M, N]
        cols, mask_n = tile_columns(n * BLOCK_N, N, BLOCK_N, 1)
        if bias_ptr is not None:
            # int64: an expert index times a stride passes 2**31
            bias_ptrs = bias_ptr + e.to(tl.int64) * stride_biase + cols * stride_biasn
            acc += tl.load(bias_ptrs, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        # rows from `end` on belong to another expert or to none, and are not stored
        offs_m = first_row + tl.arange(0, BLOCK_M)
        y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * N + cols[None, :]
        mask = (offs_m < end)[:, None] & mask_n[None, :]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def linear_ordered(
    x: torch.Tensor,
    weight: torch.Tensor,
    routing: Routing,
    bias: torch.Tensor | None,
    xa: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    y: torch.Tensor,
) -> bool:
    """Write `expert_linear` of rows in expert order, without dropout, into y, if possible.

    It is not possible if the table has no row, or if strides or alignment allow no descriptor.

    Args:
        routing: with tiles.
        y: [M, N], dtype of x, contiguous; the rows of the routing's tiles are written.
    Returns: whether y was written.
    """
    found = linear_blocks("linear_ordered", x, weight, routing.block_m)
    if found is None:
        return False
    programs, _, blocks = found
    _, N, K = weight.shape
    k_unit = blocks["K_UNIT"]
    box = routing.block_m, blocks["BLOCK_N"], blocks["BLOCK_K"]
    descriptors = operand_descriptors(x, weight, xa, lora_B, k_unit, 1, *box)
    if descriptors is None:
        return False
    r_steps = ceil_div(rank_of(xa, lora_B), blocks["BLOCK_K"])

    def rest() -> tuple[tuple, tuple, dict]:
        return tensors, (N, K, *strides_or_zeros(bias, 2)), {"R_STEPS": r_steps, **blocks}

    key = (
        "linear_ordered", facts(bias), N, K, x.dtype, r_steps, k_unit, routing.block_m,
        blocks["GROUP"],
    )  # fmt: skip
    tensors = y, bias, routing.tiles
    lines = routing.tiles.shape[0]
    launch(key, _linear_ordered_kernel, (programs, 1, 1), tensors, rest, (lines,), descriptors)
    return True
