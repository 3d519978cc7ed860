"""y[m] = W[e] x[row] + bias[e] + mask * (B[e] xa[m]), and act[m] = activation(y[m]).

A persistent, warp-specialized kernel. One or four of its warps load (`linear_roles_load`), and
eight warps multiply and store (`linear_roles_store`). So the next tile is loaded while this tile is
stored. The low-rank term is computed in additional steps of the K loop, as in `linear_ordered`. But
such a step multiplies only the columns that r needs: 16 of 64 at r = 16. With dropout these steps
come first, and their sums are multiplied by the mask. The kernel takes 0.87 to 1.03 of the time of
the kernels for other GPUs (NVIDIA H200, 2026-11-21; docs/performance.md).

Legend, of one program (its sizes are in `linear_roles_tile`):
    half: 64 of the 128 rows of a tile, with its 256 columns. Each half belongs to one consumer:
        four warps, which hold its sums acc [64, 256] in registers.
    narrow tile: the last column tile of a row tile, if at most half of its 256 columns exist. Its
        box of the weight is loaded as every other box, with zeros past column N. But only 128
        columns are multiplied, and acc is [64, 128]. With a tail it is computed as a full tile is.
    tail: up to 32 rows of the same expert after a full tile, if the next line of the tile table has
        no more rows than these. They are multiplied together with the full tile, because a tile of
        their own would load the weight again for at most a quarter of a tile's rows. wgmma always
        computes 64 rows, but any multiple of 8 columns. So the product of a tail is transposed: its
        rows are the weight's columns. Each consumer computes 64 from the left half of the tile's
        columns and 64 from the right half: left and right, [64, 32] each.
    step: 64 columns of x or of xa; the operands of each step are one stage of a pipeline
    messages: the pipeline through which the warps that load send each output tile to the consumers:
        (expert, first row, end of the rows and the tail, column tile). Expert -1 means that there
        are no more tiles.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...activation import Activation
from ..launching.launch import facts, launch
from ..launching.table import ceil_div, options_of, padded_rank
from ..operands import Act, Bias, Operand, Output, Routes
from ..tiles.descriptors import operand_descriptors
from ..tiles.dropout import NO_DROPOUT, dropped, probability_and_drop, row_hash
from ..tiles.product import Product
from .linear_roles_load import produce
from .linear_roles_store import store_half, store_tail
from .linear_roles_tile import BLOCK_K, BLOCK_N, BOX_M, HALF_M, NARROW_N, Line, Sizes, Stages
from .pieces import WIDE
from .pipeline import make_barriers, make_messages, receive, stage_of, wait_full


@gluon.jit
def _multiply_step(
    acc, left, right, stages, step, continued, HALF: gl.constexpr, TAIL: gl.constexpr,
    WIDTH: gl.constexpr, COPIED: gl.constexpr, SIZES,
):  # fmt: skip
    """Add the products of a step's first WIDTH columns of x, and release the previous step's stage.

    Args:
        acc: sums of a half. left, right: sums of a tail, used with TAIL.
        continued: whether the previous step belongs to the same tile.
        COPIED: whether threads copied the rows, not TMA. Then a fence makes them visible to wgmma.
    Returns: acc, left, right, the number of the next step.
    """
    s = stage_of(step, SIZES.STAGES)
    wait_full(stages.full, step, SIZES.STAGES)
    if COPIED:
        fence_async_shared()
    x = stages.halves.index(2 * s + HALF)
    weight = stages.columns.index(s)
    tail = stages.tails.index(s)
    if WIDTH < BLOCK_K:
        x = x.slice(0, WIDTH, 1)
        weight = weight.slice(0, WIDTH, 1 if SIZES.K_UNIT else 0)
        tail = tail.slice(0, WIDTH, 1)
    if SIZES.K_UNIT:
        weight = weight.permute([1, 0])
    if acc.shape[1] < BLOCK_N:
        weight = weight.slice(0, acc.shape[1], 1)
    acc = warpgroup_mma(x, weight, acc, is_async=True)  # [M, K] @ [K, N] -> [M, N]
    # below, wait for the previous step's products; this step's products stay in flight
    if TAIL:
        tail = tail.permute([1, 0])
        # [N, K] @ [K, M] -> [N, M]
        left_columns = weight.slice(64 * HALF, 64, 1).permute([1, 0])
        left = warpgroup_mma(left_columns, tail, left, is_async=True)
        right_columns = weight.slice(128 + 64 * HALF, 64, 1).permute([1, 0])
        right = warpgroup_mma(right_columns, tail, right, is_async=True)
        acc, left, right = warpgroup_mma_wait(3, deps=[acc, left, right])
    else:
        acc = warpgroup_mma_wait(1, deps=[acc])
    mbarrier.arrive(stages.empty.index(stage_of(step - 1, SIZES.STAGES)), pred=continued)
    return acc, left, right, step + 1


@gluon.jit
def _masked_low_rank(acc, left, right, drop, stages, step, line, HALF: gl.constexpr, SIZES):
    """The low-rank term of a tile, multiplied by the mask of dropout.

    Returns: acc, left, right, the number of the next step.
    """
    _, first_row, end, tail_end, n = line
    # loaded before the products, which hide the latency
    seed = gl.load(drop.seed)
    rows = first_row + gl.arange(0, HALF_M, gl.SliceLayout(1, acc.type.layout))
    slots = gl.load(drop.row_slot + gl.minimum(rows, end - 1))
    for TAIL in gl.static_range(2 if SIZES.TAILS else 1):
        runs = gl.where(tail_end > end, TAIL, 1 - TAIL)
        for i in range(SIZES.R_STEPS * runs):
            acc, left, right, step = _multiply_step(
                acc, left, right, stages, step, i > 0, HALF, TAIL, SIZES.R_WIDTH, False, SIZES
            )
        if TAIL:
            acc, left, right = warpgroup_mma_wait(0, deps=[acc, left, right])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(stages.empty.index(stage_of(step - 1, SIZES.STAGES)))
    # columns are counted from the tile's first one, which saves two instructions for each hash
    hashes = row_hash(seed, slots) ^ (n * (BLOCK_N // 2))
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, acc.type.layout))
    acc = dropped(acc, hashes[:, None], columns[None, :], SIZES.P)
    if SIZES.TAILS and tail_end > end:
        # the product of a tail is transposed
        tail_rows = end + gl.arange(0, BOX_M, gl.SliceLayout(0, left.type.layout))
        tail_slots = gl.load(drop.row_slot + gl.minimum(tail_rows, tail_end - 1))
        tail_hashes = row_hash(seed, tail_slots) ^ (n * (BLOCK_N // 2))
        cols = 64 * HALF + gl.arange(0, 64, gl.SliceLayout(1, left.type.layout))
        left = dropped(left, tail_hashes[None, :], cols[:, None], SIZES.P)
        right = dropped(right, tail_hashes[None, :], 128 + cols[:, None], SIZES.P)
    return acc, left, right, step


@gluon.jit
def _bias_values(bias, e, n, N, COLUMNS: gl.constexpr, HALVES: gl.constexpr):
    """The bias [COLUMNS] of a tile's columns, two columns a thread."""
    WIDTH: gl.constexpr = BLOCK_N // HALVES
    j = gl.arange(0, COLUMNS, gl.BlockedLayout([2], [32], [4], [0]))
    in_half = n * WIDTH + j % WIDTH
    cols = j // WIDTH * (N // HALVES) + in_half
    # int64: an expert index times a stride passes 2**31
    ptrs = bias.ptr + e.to(gl.int64) * bias.stride_e + cols * bias.stride_n
    return gl.load(ptrs, mask=in_half < N // HALVES, other=0.0)


@gluon.jit
def _compute_half(
    output, bias, drop, stages, step, line, N, K, COLUMNS: gl.constexpr, HALF: gl.constexpr,
    SIZES, ACT,
):  # fmt: skip
    """Multiply and store the first COLUMNS columns of a half of a tile, and its tail.

    Returns: the number of the next step.
    """
    TAILS: gl.constexpr = SIZES.TAILS and COLUMNS == BLOCK_N
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    tail_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BOX_M.value, 16])
    # of the steps after the K loop
    R_STEPS: gl.constexpr = 0 if SIZES.P > 0 else SIZES.R_STEPS
    e, _, end, tail_end, n = line
    if bias.ptr is not None:
        # loaded before the K loop, so that it hides the latency
        values = _bias_values(bias, e, n, N, COLUMNS, SIZES.HALVES)
    acc = gl.zeros([HALF_M, COLUMNS], gl.float32, layout)
    left = gl.zeros([64, BOX_M], gl.float32, tail_layout)
    right = gl.zeros([64, BOX_M], gl.float32, tail_layout)
    if SIZES.P > 0:
        acc, left, right, step = _masked_low_rank(
            acc, left, right, drop, stages, step, line, HALF, SIZES
        )
    # one K loop without a tail and one with it; one of the two has no iterations. In a single loop
    # with a branch, products would not stay in flight
    for TAIL in gl.static_range(2 if TAILS else 1):
        runs = gl.where(tail_end > end, TAIL, 1 - TAIL)
        for i in range(gl.cdiv(K, BLOCK_K) * runs):
            acc, left, right, step = _multiply_step(
                acc, left, right, stages, step, i > 0, HALF, TAIL, BLOCK_K, SIZES.GATHER, SIZES
            )
        for _ in range(R_STEPS * runs):
            acc, left, right, step = _multiply_step(
                acc, left, right, stages, step, True, HALF, TAIL, SIZES.R_WIDTH, False, SIZES
            )
        if TAIL:
            acc, left, right = warpgroup_mma_wait(0, deps=[acc, left, right])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(stages.empty.index(stage_of(step - 1, SIZES.STAGES)))
    if TAILS and tail_end > end:
        store_tail(left, right, output, bias, line, N, HALF, SIZES, ACT)
    if bias.ptr is not None:
        acc += gl.convert_layout(values, gl.SliceLayout(0, layout)).to(gl.float32)[None, :]
    store_half(acc, output, line, N, SIZES, ACT)
    return step


@gluon.jit
def _consume(
    output, bias, drop, stages, messages, N, K, HALF: gl.constexpr, SIZES,
    ACT,
):  # fmt: skip
    """In four warps: multiply and store one half of every tile, until there are no more tiles."""
    # numbers of steps and of messages so far
    step = 0
    message = 0
    e, first_row, end, n = receive(messages, message)
    while e >= 0:
        tail_end = end
        end = gl.minimum(end, first_row + 2 * HALF_M)
        first_row += HALF * HALF_M
        line = Line(e, first_row, end, tail_end, n)
        if first_row < end:
            if SIZES.NARROW and (n == gl.cdiv(N, BLOCK_N) - 1) & (tail_end == end):
                step = _compute_half(
                    output, bias, drop, stages, step, line, N, K, NARROW_N, HALF, SIZES, ACT
                )
            else:
                step = _compute_half(
                    output, bias, drop, stages, step, line, N, K, BLOCK_N, HALF, SIZES, ACT
                )
        else:
            # this half has no rows, and nothing was loaded for it: release its stages at once
            for _ in range(gl.cdiv(K, BLOCK_K) + SIZES.R_STEPS):
                wait_full(stages.full, step, SIZES.STAGES)
                mbarrier.arrive(stages.empty.index(stage_of(step, SIZES.STAGES)))
                step += 1
        message += 1
        e, first_row, end, n = receive(messages, message)


@gluon.jit(do_not_specialize=["lines"])
def _linear_roles_kernel(
    x_desc, weight_desc, xa_desc, lora_B_desc, output, x, bias, drop, routes, lines, N, K, SIZES,
    ACT,
):  # fmt: skip
    """Persistent grid."""
    y, act = output
    dtype: gl.constexpr = y.dtype.element_ty if act is None else act.dtype.element_ty
    STAGES: gl.constexpr = SIZES.STAGES
    row_halves = gl.allocate_shared_memory(dtype, [STAGES * 2, HALF_M, BLOCK_K], WIDE)
    row_tails = gl.allocate_shared_memory(dtype, [STAGES, BOX_M, BLOCK_K], WIDE)
    columns = gl.allocate_shared_memory(
        dtype, [STAGES, BLOCK_N, BLOCK_K] if SIZES.K_UNIT else [STAGES, BLOCK_K, BLOCK_N], WIDE
    )
    # arrivals that make a stage full: one for TMA and, if rows are gathered, one of each thread
    full, empty = make_barriers(STAGES, 129 if SIZES.GATHER else 1, 2)
    stages = Stages(row_halves, row_tails, columns, full, empty)
    messages = make_messages(2)
    descs = x_desc, weight_desc, xa_desc, lora_B_desc
    gl.warp_specialize(
        [
            (_consume, (output, bias, drop, stages, messages, N, K, 0, SIZES, ACT)),
            (_consume, (output, bias, drop, stages, messages, N, K, 1, SIZES, ACT)),
            (produce, (descs, x, routes, lines, stages, messages, N, K, SIZES)),
        ],
        [4, 4 if SIZES.GATHER else 1],
        [SIZES.CONSUMER, SIZES.PRODUCER],
    )


def _has_tails(activation: Activation | None) -> bool:
    """Whether tails are multiplied together with full tiles.

    They are not if exact gelu needs the registers: if it is ungated, or of interleaved pairs.
    """
    return activation is None or activation.kind != "gelu" or activation.halves == 2


def _descriptor(
    t: torch.Tensor, shape: list[int], strides: list[int], box: list[int]
) -> TensorDescriptor:
    """A descriptor whose boxes have the shared-memory layout that wgmma needs."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(box))
    return TensorDescriptor(t, shape, strides, box, layout)


def _stored_by_16_bytes(*outputs: torch.Tensor | None, parts: int) -> bool:
    """Whether each part of a row of the outputs can be stored eight elements at a time.

    Args:
        outputs: [M, N] each, contiguous; the first has `parts` parts, others have one.
    """
    for t in outputs:
        if t is not None and (t.shape[1] % (8 * parts) or t.data_ptr() % 16):
            return False
        parts = 1
    return True


def _descriptors(product: Product) -> tuple | None:
    """Descriptors (x, weight, xa, B), or None if one of them cannot be made.

    In the tuple, None stands for x if it is gathered, and for a tensor that is None.
    """
    box = BOX_M.value, BLOCK_N.value, BLOCK_K.value
    k_unit = product.weight.stride(2) == 1
    rows = None
    if not product.gather:
        rows = product.x
    factors = product.xa, product.lora_B
    return operand_descriptors(
        rows, product.weight, *factors, k_unit, product.halves, *box, _descriptor
    )


def _ends_narrow(N: int, activation: Activation | None, p: float) -> bool:
    """Whether the last column tile is narrow.

    It is not with a mask of dropout, and not with an activation other than relu2 without a gate:
    these need the registers.
    """
    if p or (activation is not None and (activation.gated or activation.kind != "relu2")):
        return False
    return 0 < N % BLOCK_N.value <= NARROW_N.value


def _low_rank_steps(r: int) -> tuple[int, int]:
    """(steps of the low-rank term, columns that each of these steps multiplies)."""
    return ceil_div(r, BLOCK_K.value), min(BLOCK_K.value, padded_rank(r))


def _gathers(x: torch.Tensor) -> bool:
    """Whether rows of x can be gathered by copies of 16 bytes."""
    if x.shape[1] % 8 or x.stride(1) != 1:
        return False
    return x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0


def linear_roles(programs: int, blocks: dict, product: Product) -> bool:
    """Write y and, with an activation, act.

    Args:
        programs, blocks: as `tile.linear_blocks` returns them.
        product: its weight is dense.
    Returns: whether the outputs were written. If strides or alignment do not allow TMA or stores of
        16 bytes, nothing is written.
    """
    x = product.x
    routing = product.routing
    activation = product.activation
    masks = product.dropout is not None
    assert not masks or activation is None, "the kernel masks no activation's operand"
    assert routing.block_m == 2 * HALF_M.value, "a tile has two halves"
    if product.gather and not _gathers(x):
        return False
    if not _stored_by_16_bytes(product.y, product.act, parts=product.halves):
        return False
    descriptors = _descriptors(product)
    if descriptors is None:
        return False
    _, N, K = product.weight.shape
    p = 0.0
    drop = NO_DROPOUT
    if product.xa is not None:
        p, drop = probability_and_drop(product.dropout, routing)
    r_steps, r_width = _low_rank_steps(product.rank)
    # rows in expert order are loaded by descriptor
    rows = None
    row_token = None
    if product.gather:
        rows = x
        row_token = routing.row_token
    output = Output(product.y, product.act)

    def arguments() -> tuple[tuple, tuple, dict]:
        sizes = Sizes(
            P=p,
            TAILS=_has_tails(activation),
            GATHER=product.gather,
            EVEN_K=K % BLOCK_K.value == 0,
            HALVES=product.halves,
            NARROW=_ends_narrow(N, activation, p),
            R_STEPS=r_steps,
            R_WIDTH=r_width,
            K_UNIT=blocks["K_UNIT"],
            STAGES=blocks["STAGES"],
            GROUP=blocks["GROUP"],
            PRODUCER=blocks["PRODUCER"],
            CONSUMER=blocks["CONSUMER"],
        )
        routes = Routes(routing.tiles, row_token)
        operands = output, Operand.of(rows), Bias.of(product.bias), drop, routes
        return operands, (N, K), {"SIZES": sizes, "ACT": Act.of(activation), **options_of(blocks)}

    key = (
        "linear_roles", facts(rows, product.bias), N, K, x.dtype, r_steps, r_width,
        blocks["K_UNIT"], blocks["GROUP"], activation, product.y is None, p,
    )  # fmt: skip
    tensors = *output, rows, product.bias, *drop, routing.tiles, row_token
    lines = routing.tiles.shape[0]
    grid = programs, 1, 1
    launch(key, _linear_roles_kernel, grid, tensors, arguments, (lines,), descriptors)
    return True
