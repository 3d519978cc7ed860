"""xa[m, j] = scaling * sum over k of A[e, j, k] * mask[m, k] * x[row, k].

row = row_token[m] where x is gathered, else m. A program computes all r columns of a tile of rows.

With many ranks this is a product like those of the base weights, and `sm90.linear_roles` computes
it, from a copy of scaling * A in the dtype of x. For r = 256 the kernel of this file takes four
times as long (NVIDIA H200, 2026-11-30).
"""

import torch
import triton
import triton.language as tl

from ..dropout import Dropout
from ..ranks import stored_rank
from ..routing import Routing
from .launching.launch import facts, launch
from .launching.table import device_facts, dot_precision, find, padded_rank
from .routing import with_tiles
from .sm90.by_roles import by_roles
from .tiles.cast import cast_as_weight
from .tiles.dropout import dropout_mask, probability_and_seed
from .tiles.eights import as_eights, by_8
from .tiles.tile import linear_blocks, table_line

# from this rank on A is multiplied as a weight is
MANY_RANKS = 96
# up to this K the loop is short, and higher occupancy is worth more than more pipeline stages
SHORT_K = 2048


@triton.jit
def _shrink_kernel(
    x_ptr, lora_A_ptr, xa_ptr, seed_ptr, row_token_ptr, row_slot_ptr, tiles_ptr, K, r, width,
    scaling,
    stride_xm, stride_xk, stride_ae, stride_ar, stride_ak,
    PARTS: tl.constexpr, GATHER: tl.constexpr, P: tl.constexpr, R: tl.constexpr,
    PRECISION: tl.constexpr, EVEN_K: tl.constexpr, BY_8: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid [max_tiles * PARTS]: each tile of the table is cut into PARTS tiles of BLOCK_M rows."""
    e, first_row, end = table_line(tiles_ptr, tl.program_id(0) // PARTS)
    first_row += tl.program_id(0) % PARTS * BLOCK_M
    if e < 0 or first_row >= end:
        return
    # int64: an expert index times a stride passes 2**31
    e = e.to(tl.int64)
    offs_m = first_row + tl.arange(0, BLOCK_M)
    # past the expert's last row, that row is repeated: loads need no mask. Copies are not stored
    rows = tl.minimum(offs_m, end - 1)
    x_rows = rows
    if GATHER:
        x_rows = tl.load(row_token_ptr + rows)
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, R)
    K = as_eights(K, BY_8)
    stride_xm = as_eights(stride_xm, BY_8)
    x_ptrs = x_ptr + x_rows.to(tl.int64)[:, None] * stride_xm + offs_k[None, :] * stride_xk
    # int64: if lora_A is a transposed B, a column times r * E passes 2**31
    lora_A_ptrs = lora_A_ptr + e * stride_ae + offs_r.to(tl.int64)[None, :] * stride_ar
    lora_A_ptrs += offs_k.to(tl.int64)[:, None] * stride_ak
    if P > 0:
        slots = tl.load(row_slot_ptr + rows)
    acc = tl.zeros((BLOCK_M, R), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs)
            lora_A = tl.load(lora_A_ptrs, mask=(offs_r < r)[None, :], other=0.0)
        else:
            mask_k = offs_k < K - k
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            lora_A = tl.load(lora_A_ptrs, mask=mask_k[:, None] & (offs_r < r)[None, :], other=0.0)
        if P > 0:
            x = x.to(tl.float32) * dropout_mask(seed_ptr, slots[:, None], (k + offs_k)[None, :], P)
            x = x.to(x_ptr.dtype.element_ty)
        lora_A = lora_A.to(x_ptr.dtype.element_ty)
        acc = tl.dot(x, lora_A, acc, input_precision=PRECISION)  # [M, K] @ [K, R] -> [M, R]
        x_ptrs += BLOCK_K * stride_xk
        lora_A_ptrs += BLOCK_K * stride_ak
    xa_ptrs = xa_ptr + offs_m.to(tl.int64)[:, None] * width + offs_r[None, :]
    # zeros past rank r, also in a row that is not finite
    xa = tl.where((offs_r < r)[None, :], acc * scaling, 0.0).to(xa_ptr.dtype.element_ty)
    tl.store(xa_ptrs, xa, mask=(offs_m < end)[:, None] & (offs_r < width)[None, :])


def expert_shrink(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    routing: Routing,
    scaling: float,
    *,
    gather: bool = False,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """xa[m] = scaling * A[e] drop(x[m]).

    Args:
        x: [M, K] rows, or [T, K] tokens with gather; bf16, fp16 or fp32.
        lora_A: [E, r, K], any strides and float dtype; the kernel casts its tiles to the dtype of
            x.
        scaling: lora_alpha / r.
        gather: whether row m reads token row_token[m].
        dropout: masks x.
    Returns: [M, R], dtype of x, with R of `ranks.stored_rank`; zeros past rank r.
    Twin: `reference.expert_shrink`.
    """
    routing = with_tiles(routing)
    M = routing.num_rows
    _, r, K = lora_A.shape
    width = stored_rank(r)
    xa = torch.empty(M, width, dtype=x.dtype, device=x.device)
    if M == 0:
        return xa
    if dropout is None and _as_product(x, lora_A, routing, scaling, gather, xa):
        return xa
    op = "shrink"
    if K <= SHORT_K:
        op = "shrink_short"
    arch, _ = device_facts(x.device)
    blocks = dict(find(op, arch, x.element_size(), routing.block_m))
    blocks["BLOCK_M"] = min(blocks["BLOCK_M"], routing.block_m)
    parts = routing.block_m // blocks["BLOCK_M"]
    # the tile of A grows with the rank. So there are fewer stages, and more warps hold the sums
    if r > 64:
        blocks |= {"BLOCK_K": 32, "num_stages": 2, "num_warps": 8}
    elif r > 16:
        blocks["BLOCK_K"] = min(blocks["BLOCK_K"], 64)
    precision = dot_precision(x.dtype)
    p, seed = probability_and_seed(dropout)

    def rest() -> tuple[tuple, tuple, dict]:
        constants = {
            "PARTS": parts,
            "GATHER": gather,
            "P": p,
            "R": padded_rank(r),
            "PRECISION": precision,
            "EVEN_K": K % blocks["BLOCK_K"] == 0,
            "BY_8": by_8(x),
            **blocks,
        }
        return tensors, (K, r, width, scaling, *x.stride(), *lora_A.stride()), constants

    key = "shrink", facts(x, lora_A), K, r, scaling, gather, p, precision, routing.block_m
    tensors = x, lora_A, xa, seed, routing.row_token, routing.row_slot, routing.tiles
    # the last three lines of the table are never tiles
    max_tiles = routing.tiles.shape[0] - 3
    launch(key, _shrink_kernel, (max_tiles * parts, 1, 1), tensors, rest)
    return xa


def _as_product(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    routing: Routing,
    scaling: float,
    gather: bool,
    xa: torch.Tensor,
) -> bool:
    """Write xa by the kernel of large products; return whether it was written.

    That kernel writes all columns of xa, so A must have as many rows as xa has columns.
    """
    r = lora_A.shape[1]
    if r < MANY_RANKS or r != xa.shape[1]:
        return False
    if linear_blocks("linear_roles", x, lora_A, routing.block_m) is None:
        return False
    if lora_A.stride(2) == 1:
        weight = cast_as_weight(lora_A, lora_A.shape[2], x.dtype, True, scaling)
    else:
        # A is a transposed B, whose ranks lie next to each other
        transposed = cast_as_weight(lora_A.transpose(1, 2), r, x.dtype, True, scaling)
        weight = transposed.transpose(1, 2)
    return by_roles(x, weight, routing, None, None, None, xa, gather)
