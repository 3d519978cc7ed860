"""acc[m, n] = mask * (B[e] xa[m]) + bias[e] + W[e] x[row]: one tile of one expert, shared by the three linear kernels.

Legend, of one tile:
    e: expert             rows [BLOCK_M]: rows of xa and of the output, clamped to the expert's last
    x_rows [BLOCK_M]: rows of x, tokens where it is gathered    cols [BLOCK_N]: columns of weight, bias and lora_B
    HALVES: 2 where a tile holds the same BLOCK_N / 2 columns of a gate half and of an up half, else 1
    n0: first column within a half              width: columns of a half
    weight_desc: 4-D descriptor [E, HALVES, width, K] where K_UNIT, else 3-D [E, K, N]; None to load by pointers
The low-rank term stands first: the accumulator it leaves can be masked, and is the one the K loop goes on with.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .config import device_facts, find
from .dropout import dropout_mask

# an expert's weight past this stays not in L2 while its rows pass: then tiles of many rows go together
LARGE_EXPERT_BYTES = 32 * 2**20


@triton.jit
def position(t, num_tiles, num_n, GROUP: tl.constexpr):
    """(row tile, column tile) of output tile t: GROUP row tiles share each weight tile before the next one is read."""
    first = t // (GROUP * num_n) * GROUP
    size = tl.minimum(num_tiles - first, GROUP)
    within = t % (GROUP * num_n)
    return first + within % size, within // size


@triton.jit
def tile_columns(n0, width, BLOCK_N: tl.constexpr, HALVES: tl.constexpr):
    """Columns [BLOCK_N] of a tile, and which of them exist."""
    j = tl.arange(0, BLOCK_N)
    if HALVES == 1:
        return n0 + j, n0 + j < width
    in_half = n0 + j % (BLOCK_N // HALVES)
    return j // (BLOCK_N // HALVES) * width + in_half, in_half < width


@triton.jit
def halves(tile, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The left and the right half [ROWS, WIDTH] of a tile's columns."""
    return tl.split(tile.reshape(ROWS, 2, WIDTH).permute(0, 2, 1))


@triton.jit
def low_rank(
    xa_ptr, lora_B_ptr, bias_ptr, seed_ptr, row_slot_ptr, e, rows, cols, mask_n, r,
    stride_xam, stride_xar, stride_be, stride_bn, stride_br, stride_biase, stride_biasn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr, P: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] fp32: the low-rank term, masked where P > 0, plus the bias; zeros without either."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if xa_ptr is not None:
        BLOCK_R: tl.constexpr = min(R, 64)
        for r0 in tl.static_range(0, R, BLOCK_R):
            offs_r = r0 + tl.arange(0, BLOCK_R)
            xa_ptrs = xa_ptr + rows.to(tl.int64)[:, None] * stride_xam + offs_r[None, :] * stride_xar
            # int64: a column times r * E passes 2**31
            lora_B_ptrs = lora_B_ptr + e * stride_be + cols.to(tl.int64)[None, :] * stride_bn
            lora_B_ptrs += offs_r.to(tl.int64)[:, None] * stride_br
            xa = tl.load(xa_ptrs, mask=offs_r[None, :] < r, other=0.0)  # [M, R]
            lora_B = tl.load(lora_B_ptrs, mask=(offs_r[:, None] < r) & mask_n[None, :], other=0.0)  # [R, N]
            acc = tl.dot(xa, lora_B.to(DTYPE), acc, input_precision=PRECISION)
        if P > 0:
            acc *= dropout_mask(seed_ptr, tl.load(row_slot_ptr + rows), cols, P)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + e * stride_biase + cols * stride_biasn, mask=mask_n, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    return acc


@triton.jit
def add_product(
    acc, x_ptr, x_desc, weight_ptr, weight_desc, e, x_rows, first_row, n0, cols, mask_n, K,
    stride_xm, stride_xk, stride_we, stride_wn, stride_wk,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, K_UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + x W[e]^T.  [M, K] @ [K, N] -> [M, N]"""
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + x_rows.to(tl.int64)[:, None] * stride_xm + offs_k[None, :] * stride_xk
    weight_ptrs = weight_ptr + e * stride_we + cols.to(tl.int64)[None, :] * stride_wn
    weight_ptrs += offs_k.to(tl.int64)[:, None] * stride_wk
    for k in range(0, K, BLOCK_K):
        if x_desc is not None:
            x = x_desc.load([first_row, k])
        elif EVEN_K:
            x = tl.load(x_ptrs)
        else:
            x = tl.load(x_ptrs, mask=offs_k[None, :] < K - k, other=0.0)
        if weight_desc is None:
            weight = tl.load(weight_ptrs, mask=(offs_k[:, None] < K - k) & mask_n[None, :], other=0.0)
        elif K_UNIT:
            weight = weight_desc.load([e.to(tl.int32), 0, n0, k]).reshape(BLOCK_N, BLOCK_K).trans()
        else:
            weight = weight_desc.load([e.to(tl.int32), k, n0]).reshape(BLOCK_K, BLOCK_N)
        acc = tl.dot(x, weight, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_K * stride_xk
        weight_ptrs += BLOCK_K * stride_wk
    return acc


def _aligned(t: torch.Tensor) -> bool:
    """Whether the copy engine takes t: address and all strides but the last, unit one in multiples of 16 bytes."""
    return (
        t.stride(-1) == 1
        and t.data_ptr() % 16 == 0
        and all(s * t.element_size() % 16 == 0 and s > 0 for s in t.stride()[:-1])
    )


def weight_descriptor(weight: torch.Tensor, halves: int, block_n: int, block_k: int) -> TensorDescriptor | None:
    """A descriptor of weight [E, N, K] that loads one tile, or None where its strides, alignment or halves forbid."""
    N = weight.shape[1]
    if weight.stride(2) == 1:
        split = weight.unflatten(1, (halves, N // halves))
        box = [1, halves, block_n // halves, block_k]
        return TensorDescriptor.from_tensor(split, box) if _aligned(split) else None
    transposed = weight.transpose(1, 2)
    if halves == 1 and _aligned(transposed):
        return TensorDescriptor.from_tensor(transposed, [1, block_k, block_n])
    return None


def row_descriptor(x: torch.Tensor, block_m: int, block_k: int) -> TensorDescriptor | None:
    """A descriptor of rows x [M, K] that loads one tile, or None where strides or alignment forbid."""
    return TensorDescriptor.from_tensor(x, [block_m, block_k]) if _aligned(x) else None


def launch_facts(op: str, x: torch.Tensor, weight: torch.Tensor, block_m: int, halves: int = 1):
    """(programs, constexprs, weight descriptor) of a linear kernel over this x and weight."""
    arch, sms = device_facts(x.device)
    blocks = dict(find(op, arch, x.element_size(), block_m))
    descriptor = None
    if blocks.pop("DESCRIPTOR"):
        descriptor = weight_descriptor(weight, halves, blocks["BLOCK_N"], blocks["BLOCK_K"])
    large = weight.stride(0) * weight.element_size() > LARGE_EXPERT_BYTES
    K = weight.shape[2]
    blocks |= {
        "BLOCK_M": block_m,
        "GROUP": 16 if large else 2,
        "EVEN_K": K % blocks["BLOCK_K"] == 0,
        "K_UNIT": weight.stride(2) == 1,
    }
    return sms, blocks, descriptor


def strides_or_zeros(t: torch.Tensor | None, ndim: int) -> tuple[int, ...]:
    """The strides of an argument that may be absent."""
    return (0,) * ndim if t is None else t.stride()
