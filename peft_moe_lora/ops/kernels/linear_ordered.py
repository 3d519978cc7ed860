"""y[m] = W[e] x[m] + bias[e] + B[e] xa[m] for rows in expert order, loaded by descriptors.

The low-rank term is computed in additional steps of the K loop, which load xa and B instead of x
and W. So no product comes before or after this loop, and Triton can flatten it with the loop over
output tiles: the operands of the next tile are loaded while this tile is stored. A separate
low-rank term takes longer: this kernel takes 3 to 12 % less time, casts of B included (NVIDIA H200,
2026-11-21). The kernel for every case is in `linear_general`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .launching.launch import facts, launch
from .launching.table import ceil_div, options_of
from .operands import Bias
from .tiles.descriptors import operand_descriptors
from .tiles.product import Product
from .tiles.tile import linear_blocks, position, table_line, table_size, tile_columns


class _Tile(NamedTuple):
    """Constants of the kernel.

    Attributes:
        M, N, K: rows and columns of a tile, and columns of x in a step of the loop.
        K_UNIT: whether adjacent values of the weight lie along K.
        R_STEPS: steps of the low-rank term.
        GROUP: as in `tiles.tile.position`.
    """

    M: Any
    N: Any
    K: Any
    K_UNIT: Any
    R_STEPS: Any
    GROUP: Any


@triton.jit(do_not_specialize=["lines"])
def _linear_ordered_kernel(
    x_desc, weight_desc, xa_desc, lora_B_desc, y_ptr, bias, tiles_ptr, lines, N, K, TILE
):
    """Persistent grid: each program computes every num_programs-th output tile."""
    num_tiles = table_size(tiles_ptr, lines)
    num_n = tl.cdiv(N, TILE.N)
    k_steps = tl.cdiv(K, TILE.K)
    for t in tl.range(tl.program_id(0), num_tiles * num_n, tl.num_programs(0), flatten=True):
        tile, n = position(t, num_tiles, num_n, TILE.GROUP)
        e, first_row, end = table_line(tiles_ptr, tile)
        acc = tl.zeros((TILE.M, TILE.N), dtype=tl.float32)
        for i in range(k_steps + TILE.R_STEPS):
            # past K and past r, loads by descriptor return zeros
            k = i * TILE.K
            rows_desc = x_desc
            columns_desc = weight_desc
            if TILE.R_STEPS > 0:
                low_rank = i >= k_steps
                k = tl.where(low_rank, k - k_steps * TILE.K, k)
                if low_rank:
                    rows_desc = xa_desc
                    columns_desc = lora_B_desc
            x = rows_desc.load([first_row, k])
            if TILE.K_UNIT:
                weight = columns_desc.load([e, 0, n * TILE.N, k]).reshape(TILE.N, TILE.K).trans()
            else:
                weight = columns_desc.load([e, k, n * TILE.N]).reshape(TILE.K, TILE.N)
            acc = tl.dot(x, weight, acc)  # [M, K] @ [K, N] -> [M, N]
        cols, mask_n = tile_columns(n * TILE.N, N, TILE.N, 1)
        if bias.ptr is not None:
            # int64: an expert index times a stride passes 2**31
            bias_ptrs = bias.ptr + e.to(tl.int64) * bias.stride_e + cols * bias.stride_n
            acc += tl.load(bias_ptrs, mask=mask_n, other=0.0).to(tl.float32)[None, :]
        # rows from `end` on belong to another expert or to none, and are not stored
        offs_m = first_row + tl.arange(0, TILE.M)
        y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * N + cols[None, :]
        mask = (offs_m < end)[:, None] & mask_n[None, :]
        tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


def linear_ordered(product: Product) -> bool:
    """Write y of rows in expert order, without dropout and without an activation, if possible.

    It is not possible if the table has no row, or if strides or alignment allow no descriptor.

    Args:
        product: its weight is dense.
    Returns: whether y was written.
    """
    if product.gather or product.dropout is not None or product.activation is not None:
        return False
    x = product.x
    weight = product.weight
    routing = product.routing
    bias = product.bias
    y = product.y
    found = linear_blocks("linear_ordered", x, weight, routing.block_m)
    if found is None:
        return False
    programs, _, blocks = found
    _, N, K = weight.shape
    k_unit = blocks["K_UNIT"]
    box = routing.block_m, blocks["BLOCK_N"], blocks["BLOCK_K"]
    descriptors = operand_descriptors(x, weight, product.xa, product.lora_B, k_unit, 1, *box)
    if descriptors is None:
        return False
    r_steps = ceil_div(product.rank, blocks["BLOCK_K"])

    def arguments() -> tuple[tuple, tuple, dict]:
        tile = _Tile(
            M=blocks["BLOCK_M"],
            N=blocks["BLOCK_N"],
            K=blocks["BLOCK_K"],
            K_UNIT=k_unit,
            R_STEPS=r_steps,
            GROUP=blocks["GROUP"],
        )
        return (y, Bias.of(bias), routing.tiles), (N, K), {"TILE": tile, **options_of(blocks)}

    key = (
        "linear_ordered", facts(bias), N, K, x.dtype, r_steps, k_unit, routing.block_m,
        blocks["GROUP"],
    )  # fmt: skip
    tensors = y, bias, routing.tiles
    lines = routing.tiles.shape[0]
    grid = programs, 1, 1
    launch(key, _linear_ordered_kernel, grid, tensors, arguments, (lines,), descriptors)
    return True
