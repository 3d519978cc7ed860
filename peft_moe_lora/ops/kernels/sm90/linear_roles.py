"""y[m] = W[e] x[row] + bias[e] + B[e] xa[m], and act[m] = activation(y[m]): products by warps of two roles, for sm_90.

Some warps load, eight multiply and store, so that the next tile is on its way whatever becomes of this one. Rows in
expert order are copied in boxes, by one warp; gathered rows one by one, by four. The low-rank term is more steps of
the K loop, as in `linear_ordered`, but such a step multiplies no more ranks than there are: 16 of 64 at r = 16.

Time over that of the kernels that run elsewhere, interleaved (NVIDIA H200, 2026-11-21; 8192 tokens, and 32768):
    rows in order, down and dX, over `linear_ordered`, the same bits: qwen3-30b 0.92 and 0.95 (0.93 and 0.94),
        qwen3.5-35b 0.93 and 0.91, olmoe 0.97 and 0.95, the gpt-oss shape 1.01 and 0.99, the deepseek-v3 slice 0.93
        and 1.00
    gathered, gate_up and d act, over `linear_act` and `linear`, the same bits at r = 16 without a bias: qwen3-30b 0.94
        and 0.92 (0.97 and 0.96), qwen3.5-35b 0.87 and 0.91, olmoe 0.95 and 0.95, the gpt-oss shape 0.99 and 0.97, the
        deepseek-v3 slice 1.03 and 0.98, mixtral 1.02 and 1.02
Those are of tiles without tails. With them, over without, the same bits, gate_up, down, d act and dX on a rested card
(NVIDIA H200, 2026-11-22; 8192 tokens): qwen3.5-35b 0.95, 0.95, 0.97 and 0.95, qwen3-30b 0.98, 1.00, 1.00 and 0.99. A
tail multiplied as 64 more rows of 256 columns, half of them nobody's, gave 1.00 in all.

Written in Gluon, Triton's language of layouts, barriers and roles. It is an experiment of Triton's still: `by_roles`
imports this file where the table asks for it, and does without where the import fails.

Legend, of one program:
    half: 64 rows of a tile of 128 rows, 256 columns; each is one consumer's: four warps, an accumulator [64, 256]
    tail: up to 32 rows of the same expert behind a full tile, all that the table's next line has. They are multiplied
        with the tile: a tile of their own would read the weight once more, for a quarter of a tile's rows or fewer.
        The weight's columns are rows of that product, since the instruction takes columns by eights and rows by 64;
        each consumer has 64 columns of the left half of the tile and 64 of the right, [64, 32] each
    HALVES: 2 where a tile holds the same 128 columns of a gate half and of an up half, else 1
    step: 64 columns of x, or of xa; its boxes lie in a ring of STAGES
    rows ([2 * STAGES, 64, 64], [STAGES, 32, 64]): the rows of x or xa of each step, two halves and a tail; they come
        in boxes of 32 rows
    columns [STAGES, 256, 64] where K_UNIT, else [STAGES, 64, 256]: boxes of the weight or B
    stages: rows, columns and the barriers of the ring, as `rings` says
    messages: a ring of (expert, first row, end with the tail, column tile), one a tile; expert -1: no more
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ...activation import Activation
from ...routing import Routing
from ..launching.launch import facts, launch
from ..launching.table import ceil_div, padded_rank
from ..tiles.activation import activate, activate_plain, activation_constants
from ..tiles.descriptors import make_descriptor, operand_descriptors
from ..tiles.tile import halves, position, strides_or_zeros, table_line, table_size
from .pieces import WIDE, load_box, load_rows, store_box
from .rings import barriers, hear, message_ring, place, tell, wait_empty, wait_full

# a tile and a step of its K loop: the form of the kernel, not a setting
HALF_M, BOX_M, BLOCK_N, BLOCK_K = (
    gl.constexpr(64),
    gl.constexpr(32),
    gl.constexpr(256),
    gl.constexpr(64),
)
# boxes of a step's rows: two of each half, and a tail
BOXES = gl.constexpr(5)
# bytes of a step's columns, and of a box of rows
COLUMN_BYTES, BOX_BYTES = gl.constexpr(256 * 64 * 2), gl.constexpr(32 * 64 * 2)
# threads that copy or store rows, 16 bytes each
BY_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
# a pass without an activation
NO_ACTIVATION = {
    "KIND": None,
    "GATED": False,
    "INTERLEAVED": False,
    "LIMIT": None,
    "ALPHA": 1.0,
    "UP_SHIFT": 0.0,
}


# ---- the warps that load -------------------------------------------------------------------------------------------


@gluon.jit
def _line(tiles_ptr, tile, TAILS: gl.constexpr):
    """(expert, first row, end) of a tile, with TAILS of one and its tail: then a tail itself has no rows left."""
    e, first_row, end = table_line(tiles_ptr, tile)
    if TAILS:
        e_before = gl.load(tiles_ptr + 2 * gl.maximum(tile - 1, 0))
        e_behind, _, end_behind = table_line(tiles_ptr, tile + 1)
        is_tail = (tile > 0) & (e_before == e) & (end - first_row <= BOX_M)
        has_tail = (e_behind == e) & (end_behind - end <= BOX_M)
        end = gl.where(is_tail, first_row, gl.where(has_tail, end_behind, end))
    return e, first_row, end


@gluon.jit
def _load_columns(desc, columns, there, s, e, n, k, HALVES: gl.constexpr, K_UNIT: gl.constexpr):
    """Start the copy of a step's columns; beyond N, K and r come zeros."""
    if K_UNIT:
        WIDTH: gl.constexpr = BLOCK_N // HALVES
        load_box(
            desc, [e, 0, n * WIDTH, k], there, columns.index(s).reshape([1, HALVES, WIDTH, BLOCK_K])
        )
    else:
        load_box(desc, [e, k, n * BLOCK_N], there, columns.index(s).reshape([1, BLOCK_K, BLOCK_N]))


@gluon.jit
def _load_boxes(
    rows_desc, columns_desc, steps, stages, step, e, first_row, end, n,
    GATHER: gl.constexpr, HALVES: gl.constexpr, K_UNIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the copies of so many steps whose rows lie in expert order: of boxes that have rows."""
    rows, columns, full, empty = stages
    boxes = gl.cdiv(end - first_row, BOX_M)
    for i in range(steps):
        s = place(step, STAGES)
        wait_empty(empty, step, STAGES)
        there = full.index(s)
        for j in gl.static_range(BOXES):
            mbarrier.expect(there, COLUMN_BYTES + (j + 1) * BOX_BYTES, pred=boxes == j + 1)
        for j in gl.static_range(BOXES - 1):
            box = rows[0].index(2 * s + j // 2).slice(j % 2 * BOX_M, BOX_M, 0)
            load_box(rows_desc, [first_row + j * BOX_M, i * BLOCK_K], there, box, pred=j < boxes)
        load_box(
            rows_desc,
            [first_row + 2 * HALF_M, i * BLOCK_K],
            there,
            rows[1].index(s),
            pred=boxes == BOXES,
        )
        _load_columns(columns_desc, columns, there, s, e, n, i * BLOCK_K, HALVES, K_UNIT)
        if GATHER:
            # the barrier waits for every thread of four warps, which here copies nothing
            async_copy.mbarrier_arrive(there, increment_count=False)
        step += 1
    return step


@gluon.jit
def _row_pointers(x_ptr, row_token_ptr, first_row, end, stride_xm, ROWS: gl.constexpr):
    """Where the first BLOCK_K columns of so many rows lie; a row past the expert's last is the last again."""
    offs_m = gl.minimum(first_row + gl.arange(0, ROWS, gl.SliceLayout(1, BY_ROWS)), end - 1)
    tokens = gl.load(row_token_ptr + offs_m).to(gl.int64)
    return (
        x_ptr
        + tokens[:, None] * stride_xm
        + gl.arange(0, BLOCK_K, gl.SliceLayout(0, BY_ROWS))[None, :]
    )


@gluon.jit
def _load_gathered(
    x, weight_desc, steps, stages, step, e, first_row, end, n,
    HALVES: gl.constexpr, K_UNIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the copies of so many steps whose rows are gathered."""
    rows, columns, full, empty = stages
    x_ptr, row_token_ptr, stride_xm = x
    upper = _row_pointers(x_ptr, row_token_ptr, first_row, end, stride_xm, HALF_M)
    lower = _row_pointers(x_ptr, row_token_ptr, first_row + HALF_M, end, stride_xm, HALF_M)
    tail = _row_pointers(x_ptr, row_token_ptr, first_row + 2 * HALF_M, end, stride_xm, BOX_M)
    for i in range(steps):
        s = place(step, STAGES)
        wait_empty(empty, step, STAGES)
        there = full.index(s)
        mbarrier.expect(there, COLUMN_BYTES)
        _load_columns(weight_desc, columns, there, s, e, n, i * BLOCK_K, HALVES, K_UNIT)
        load_rows(rows[0].index(2 * s), upper)
        if first_row + HALF_M < end:
            load_rows(rows[0].index(2 * s + 1), lower)
        if first_row + 2 * HALF_M < end:
            load_rows(rows[1].index(s), tail)
        # each thread's copies arrive when they are done
        async_copy.mbarrier_arrive(there, increment_count=False)
        upper += BLOCK_K
        lower += BLOCK_K
        tail += BLOCK_K
        step += 1
    return step


@gluon.jit
def _produce(
    operands, x, tiles_ptr, lines, stages, messages, N, K, GROUP: gl.constexpr, TAILS: gl.constexpr,
    GATHER: gl.constexpr, HALVES: gl.constexpr, R_STEPS: gl.constexpr, K_UNIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warps that load: they take output tiles from the queue until there are none.

    With every num_programs-th tile instead, programs fall out of step and each reads its weight tiles from memory for
    itself: 21 GB in dX of the deepseek-v3 slice, 7.9 by the queue (NVIDIA H200, 2026-11-21). Who computes a tile is
    left to chance so, and not what comes out.
    """
    x_desc, weight_desc, xa_desc, lora_B_desc = operands
    WARPS: gl.constexpr = 4 if GATHER else 1
    counter_ptr = tiles_ptr + 2 * lines - 1
    num_tiles, num_n = table_size(tiles_ptr, lines), gl.cdiv(N, BLOCK_N)
    total = num_tiles * num_n
    # steps and messages so far
    step, message = 0, 0
    t = gl.program_id(0)
    while t < total:
        tile, n = position(t, num_tiles, num_n, GROUP)
        e, first_row, end = _line(tiles_ptr, tile, TAILS)
        if first_row < end:
            tell(messages, message, e, first_row, end, n, WARPS)
            message += 1
            steps = gl.cdiv(K, BLOCK_K)
            if GATHER:
                step = _load_gathered(
                    x,
                    weight_desc,
                    steps,
                    stages,
                    step,
                    e,
                    first_row,
                    end,
                    n,
                    HALVES,
                    K_UNIT,
                    STAGES,
                )
            else:
                step = _load_boxes(
                    x_desc,
                    weight_desc,
                    steps,
                    stages,
                    step,
                    e,
                    first_row,
                    end,
                    n,
                    False,
                    HALVES,
                    K_UNIT,
                    STAGES,
                )
            if R_STEPS > 0:
                step = _load_boxes(
                    xa_desc, lora_B_desc, R_STEPS, stages, step, e, first_row, end, n, GATHER, HALVES, K_UNIT,
                    STAGES,
                )  # fmt: skip
        taken = gl.atomic_add(counter_ptr, 1, sem="relaxed")
        # a tile, an addition: this was the last one, and the next kernel finds the counter at 0
        if taken == total - 1:
            gl.store(counter_ptr, 0)
        t = gl.num_programs(0) + taken
    tell(messages, message, -1, 0, 0, 0, WARPS)


# ---- the warps that multiply and store -----------------------------------------------------------------------------


@gluon.jit
def _multiply_step(
    acc, left, right, stages, step, continued, HALF: gl.constexpr, TAIL: gl.constexpr, WIDTH: gl.constexpr,
    COPIED: gl.constexpr, K_UNIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The sums plus products of a step's first WIDTH columns of x; the step before goes back to the warps that load.

    Args:
        acc: of a half. left, right: of a tail, with TAIL.
        continued: whether there is a step before in this tile.
        COPIED: whether threads wrote the rows, not the copy engine: products are to see that.
    """
    rows, columns, full, empty = stages
    s = place(step, STAGES)
    wait_full(full, step, STAGES)
    if COPIED:
        fence_async_shared()
    x, weight, tail = rows[0].index(2 * s + HALF), columns.index(s), rows[1].index(s)
    if WIDTH < BLOCK_K:
        x, weight, tail = (
            x.slice(0, WIDTH, 1),
            weight.slice(0, WIDTH, 1 if K_UNIT else 0),
            tail.slice(0, WIDTH, 1),
        )
    if K_UNIT:
        weight = weight.permute([1, 0])
    acc = warpgroup_mma(x, weight, acc, is_async=True)  # [M, K] @ [K, N] -> [M, N]
    # the products of one step stay in flight
    if TAIL:
        tail = tail.permute([1, 0])
        left = warpgroup_mma(
            weight.slice(64 * HALF, 64, 1).permute([1, 0]), tail, left, is_async=True
        )
        right = warpgroup_mma(
            weight.slice(128 + 64 * HALF, 64, 1).permute([1, 0]), tail, right, is_async=True
        )
        acc, left, right = warpgroup_mma_wait(3, deps=[acc, left, right])
    else:
        acc = warpgroup_mma_wait(1, deps=[acc])
    mbarrier.arrive(empty.index(place(step - 1, STAGES)), pred=continued)
    return acc, left, right, step + 1


@gluon.jit
def _store_rows(t, ptr, first_row, end, half, col, width, stride_m):
    """The rows that exist of t [rows, columns]; those past the expert's last are another's, or nobody's."""
    offs_m = first_row + gl.arange(0, t.shape[0], gl.SliceLayout(1, t.type.layout))
    offs_n = col + gl.arange(0, t.shape[1], gl.SliceLayout(0, t.type.layout))
    ptrs = ptr + offs_m.to(gl.int64)[:, None] * stride_m + (half * width + offs_n)[None, :]
    gl.store(
        ptrs, t.to(ptr.dtype.element_ty), mask=(offs_m < end)[:, None] & (offs_n < width)[None, :]
    )


@gluon.jit
def _store_chunk(chunk, output, box, first_row, end, half, col, width, stride_m):
    """The rows that exist of a chunk [64, 64] of a tile, by a box."""
    desc, ptr = output
    # it may still be read for the chunk before
    tma.store_wait(0)
    if col < width:
        box.store(chunk.to(ptr.dtype.element_ty))
        if first_row + HALF_M <= end:
            fence_async_shared()
            store_box(desc, [half, first_row, col], box.reshape([1, HALF_M, 64]))
        else:
            _store_rows(box.load(BY_ROWS), ptr, first_row, end, half, col, width, stride_m)


@gluon.jit
def _store_tail_chunk(chunk, y, bias, box, e, first_row, end, half, col, N, HALVES: gl.constexpr):
    """The rows that exist of a chunk [64 columns, BOX_M] of a tail, with the bias; returned [BOX_M, 64] as stored."""
    bias_ptr, stride_biase, stride_biasn = bias
    width = N // HALVES
    if bias_ptr is not None:
        offs_n = col + gl.arange(0, 64, gl.SliceLayout(1, chunk.type.layout))
        # int64: an expert index times a stride passes 2**31
        ptrs = bias_ptr + e.to(gl.int64) * stride_biase + (half * width + offs_n) * stride_biasn
        chunk += gl.load(ptrs, mask=offs_n < width, other=0.0).to(gl.float32)[:, None]
    box = box.slice(0, BOX_M, 0)
    # it may still be read for the tile before
    tma.store_wait(0)
    box.store(chunk.to(y[1].dtype.element_ty).permute([1, 0]))
    rows = box.load(BY_ROWS)
    _store_rows(rows, y[1], first_row, end, half, col, width, N)
    return rows.to(gl.float32)


@gluon.jit
def _store_tail(
    left, right, y, act, bias, box, e, first_row, end, n, N, HALF: gl.constexpr, HALVES: gl.constexpr,
    KIND: gl.constexpr, GATED: gl.constexpr, LIMIT: gl.constexpr, ALPHA: gl.constexpr, UP_SHIFT: gl.constexpr,
):  # fmt: skip
    """The rows of a tail, and their activation, of what is stored, in the chunks that are this consumer's."""
    if HALVES == 2:
        # gate on the left, up on the right
        col = n * 128 + 64 * HALF
        gate = _store_tail_chunk(left, y, bias, box, e, first_row, end, 0, col, N, 2)
        up = _store_tail_chunk(right, y, bias, box, e, first_row, end, 1, col, N, 2)
        result = activate(gate, up, KIND, LIMIT, ALPHA, UP_SHIFT)
        _store_rows(result, act[1], first_row, end, 0, col, N // 2, N // 2)
    else:
        chunks = left, right
        for i in gl.static_range(2):
            col = n * BLOCK_N + 128 * i + 64 * HALF
            rows = _store_tail_chunk(chunks[i], y, bias, box, e, first_row, end, 0, col, N, 1)
            if GATED:
                gate, up = rows.reshape([BOX_M, 32, 2]).split()
                result = activate(gate, up, KIND, LIMIT, ALPHA, UP_SHIFT)
                _store_rows(result, act[1], first_row, end, 0, col // 2, N // 2, N // 2)


@gluon.jit
def _store_half(
    acc, y, act, box, first_row, end, n, N, HALVES: gl.constexpr, KIND: gl.constexpr, GATED: gl.constexpr,
    LIMIT: gl.constexpr, ALPHA: gl.constexpr, UP_SHIFT: gl.constexpr,
):  # fmt: skip
    """The rows of a half that exist, and their activation, of what is stored, in chunks of 64 columns."""
    dtype: gl.constexpr = y[1].dtype.element_ty
    left, right = halves(acc, HALF_M, 128)
    if HALVES == 2:
        # gate on the left, up on the right: the same 64 columns of both, twice
        gates, ups = halves(left, HALF_M, 64), halves(right, HALF_M, 64)
        I = N // 2  # noqa: E741
        for i in gl.static_range(2):
            col = n * 128 + i * 64
            gate, up = gates[i].to(dtype), ups[i].to(dtype)
            _store_chunk(gate, y, box, first_row, end, 0, col, I, N)
            _store_chunk(up, y, box, first_row, end, 1, col, I, N)
            result = activate(gate.to(gl.float32), up.to(gl.float32), KIND, LIMIT, ALPHA, UP_SHIFT)
            _store_chunk(result, act, box, first_row, end, 0, col, I, I)
    else:
        wide = left, right
        for i in gl.static_range(2):
            chunks = halves(wide[i], HALF_M, 64)
            col = n * BLOCK_N + i * 128
            for j in gl.static_range(2):
                chunk = chunks[j].to(dtype)
                _store_chunk(chunk, y, box, first_row, end, 0, col + 64 * j, N, N)
                if KIND is not None and not GATED:
                    result = activate_plain(chunk.to(gl.float32), KIND, ALPHA)
                    _store_chunk(result, act, box, first_row, end, 0, col + 64 * j, N, N)
            if KIND is not None and GATED:
                gate, up = wide[i].to(dtype).to(gl.float32).reshape([HALF_M, 64, 2]).split()
                result = activate(gate, up, KIND, LIMIT, ALPHA, UP_SHIFT)
                _store_chunk(result, act, box, first_row, end, 0, col // 2, N // 2, N // 2)


@gluon.jit
def _consume(
    output, box, stages, messages, N, K, HALF: gl.constexpr, TAILS: gl.constexpr,
    GATHER: gl.constexpr, HALVES: gl.constexpr, R_STEPS: gl.constexpr, R_WIDTH: gl.constexpr, K_UNIT: gl.constexpr,
    STAGES: gl.constexpr, KIND: gl.constexpr, GATED: gl.constexpr, LIMIT: gl.constexpr, ALPHA: gl.constexpr,
    UP_SHIFT: gl.constexpr,
):  # fmt: skip
    """Four warps that multiply and store half of each tile, until there are no more."""
    y, act, bias = output
    bias_ptr, stride_biase, stride_biasn = bias
    full, empty = stages[2], stages[3]
    WIDTH: gl.constexpr = BLOCK_N // HALVES
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    tail_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BOX_M.value, 16])
    k_steps = gl.cdiv(K, BLOCK_K)
    # steps and messages so far
    step, message = 0, 0
    e, first_row, end, n = hear(messages, message)
    while e >= 0:
        tail_end = end
        end = gl.minimum(end, first_row + 2 * HALF_M)
        first_row += HALF * HALF_M
        if first_row < end:
            if bias_ptr is not None:
                # ahead of the K loop, which hides its latency, two columns a thread
                j = gl.arange(0, BLOCK_N, gl.BlockedLayout([2], [32], [4], [0]))
                in_half = n * WIDTH + j % WIDTH
                cols = j // WIDTH * (N // HALVES) + in_half
                # int64: an expert index times a stride passes 2**31
                bias_ptrs = bias_ptr + e.to(gl.int64) * stride_biase + cols * stride_biasn
                values = gl.load(bias_ptrs, mask=in_half < N // HALVES, other=0.0)
            acc = gl.zeros([HALF_M, BLOCK_N], gl.float32, layout)
            left = gl.zeros([64, BOX_M], gl.float32, tail_layout)
            right = gl.zeros([64, BOX_M], gl.float32, tail_layout)
            # loops without a tail and with one, of which one kind runs: as branches they would not stay in flight
            for TAIL in gl.static_range(2 if TAILS else 1):
                runs = gl.where(tail_end > end, TAIL, 1 - TAIL)
                for i in range(k_steps * runs):
                    acc, left, right, step = _multiply_step(
                        acc,
                        left,
                        right,
                        stages,
                        step,
                        i > 0,
                        HALF,
                        TAIL,
                        BLOCK_K,
                        GATHER,
                        K_UNIT,
                        STAGES,
                    )
                for _ in range(R_STEPS * runs):
                    acc, left, right, step = _multiply_step(
                        acc,
                        left,
                        right,
                        stages,
                        step,
                        True,
                        HALF,
                        TAIL,
                        R_WIDTH,
                        False,
                        K_UNIT,
                        STAGES,
                    )
                if TAIL:
                    acc, left, right = warpgroup_mma_wait(0, deps=[acc, left, right])
                else:
                    acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(place(step - 1, STAGES)))
            if TAILS and tail_end > end:
                _store_tail(
                    left, right, y, act, bias, box, e, end, tail_end, n, N, HALF, HALVES, KIND, GATED, LIMIT, ALPHA,
                    UP_SHIFT,
                )  # fmt: skip
            if bias_ptr is not None:
                acc += gl.convert_layout(values, gl.SliceLayout(0, layout)).to(gl.float32)[None, :]
            _store_half(
                acc, y, act, box, first_row, end, n, N, HALVES, KIND, GATED, LIMIT, ALPHA, UP_SHIFT
            )
        else:
            # nothing was loaded for this half: it keeps step with the other
            for _ in range(k_steps + R_STEPS):
                wait_full(full, step, STAGES)
                mbarrier.arrive(empty.index(place(step, STAGES)))
                step += 1
        message += 1
        e, first_row, end, n = hear(messages, message)
    tma.store_wait(0)


# ---- a program -----------------------------------------------------------------------------------------------------


@gluon.jit(do_not_specialize=["lines"])
def _linear_roles_kernel(
    x_desc, weight_desc, xa_desc, lora_B_desc, y_desc, act_desc, y_ptr, act_ptr, x_ptr, bias_ptr, row_token_ptr,
    tiles_ptr, lines, N, K, stride_xm, stride_biase, stride_biasn,
    GATHER: gl.constexpr, R_STEPS: gl.constexpr, R_WIDTH: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr,
    K_UNIT: gl.constexpr, STAGES: gl.constexpr, PRODUCER: gl.constexpr, CONSUMER: gl.constexpr,
    KIND: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr, LIMIT: gl.constexpr, ALPHA: gl.constexpr,
    UP_SHIFT: gl.constexpr,
):  # fmt: skip
    """Persistent grid. PRODUCER, CONSUMER: registers a thread of each has."""
    gl.static_assert(BLOCK_M == 2 * HALF_M)
    HALVES: gl.constexpr = 2 if GATED and not INTERLEAVED else 1
    # not with an ungated activation or an erf of alternating columns, which need their registers
    TAILS: gl.constexpr = KIND is None or (GATED and not (INTERLEAVED and KIND == "gelu"))
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    row_halves = gl.allocate_shared_memory(dtype, [STAGES * 2, HALF_M, BLOCK_K], WIDE)
    row_tails = gl.allocate_shared_memory(dtype, [STAGES, BOX_M, BLOCK_K], WIDE)
    columns = gl.allocate_shared_memory(
        dtype, [STAGES, BLOCK_N, BLOCK_K] if K_UNIT else [STAGES, BLOCK_K, BLOCK_N], WIDE
    )
    # what each consumer stores by
    box0 = gl.allocate_shared_memory(dtype, [HALF_M, 64], WIDE)
    box1 = gl.allocate_shared_memory(dtype, [HALF_M, 64], WIDE)
    # who fills a stage: the copy engine, and where rows are gathered each of 128 threads
    full, empty = barriers(STAGES, 129 if GATHER else 1, 2)
    stages, messages = ((row_halves, row_tails), columns, full, empty), message_ring(2)
    operands, x = (x_desc, weight_desc, xa_desc, lora_B_desc), (x_ptr, row_token_ptr, stride_xm)
    output = (y_desc, y_ptr), (act_desc, act_ptr), (bias_ptr, stride_biase, stride_biasn)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    output, box0, stages, messages, N, K, 0, TAILS, GATHER, HALVES, R_STEPS, R_WIDTH, K_UNIT, STAGES,
                    KIND, GATED, LIMIT, ALPHA, UP_SHIFT,
                ),
            ),
            (
                _consume,
                (
                    output, box1, stages, messages, N, K, 1, TAILS, GATHER, HALVES, R_STEPS, R_WIDTH, K_UNIT, STAGES,
                    KIND, GATED, LIMIT, ALPHA, UP_SHIFT,
                ),
            ),
            (
                _produce,
                (
                    operands, x, tiles_ptr, lines, stages, messages, N, K, GROUP, TAILS, GATHER, HALVES, R_STEPS,
                    K_UNIT, STAGES,
                ),
            ),
        ],
        [4, 4 if GATHER else 1],
        [CONSUMER, PRODUCER],
    )  # fmt: skip


def _descriptor(t: torch.Tensor, shape, strides, box) -> TensorDescriptor:
    """A descriptor whose boxes lie in shared memory as products and the copy engine take them."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(box))
    return TensorDescriptor(t, shape, strides, box, layout)


def _output_descriptor(y: torch.Tensor, parts: int) -> TensorDescriptor | None:
    """A descriptor that stores chunks of y [M, N], whose columns are in so many parts, and never past a part's end."""
    (M, N), box = y.shape, [1, HALF_M.value, 64]
    return make_descriptor(y, [parts, M, N // parts], [N // parts, N, 1], box, _descriptor)


def linear_roles(
    programs: int,
    blocks: dict,
    x: torch.Tensor,
    weight: torch.Tensor,
    routing: Routing,
    bias: torch.Tensor | None,
    xa: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    y: torch.Tensor,
    gather: bool = False,
    activation: Activation | None = None,
    act: torch.Tensor | None = None,
) -> bool:
    """`expert_linear` without dropout into y, or `expert_linear_act` into y and act; nothing where strides forbid.

    Args:
        programs, blocks: as `tile.linear_blocks` gives them.
        routing: with tiles.
        y: [M, N], dtype of x, contiguous; receives the rows of the routing's tiles. act: [M, I], likewise.
    Returns: whether it was done.
    """
    (_, N, K), k_unit, r = weight.shape, blocks["K_UNIT"], 0 if xa is None else xa.shape[1]
    parts = 1 if activation is None else activation.halves
    # rows are gathered in copies of 16 bytes, without a mask
    if gather and (K % BLOCK_K.value or x.stride(1) != 1 or x.stride(0) % 16 or x.data_ptr() % 16):
        return False
    box = BOX_M.value, BLOCK_N.value, BLOCK_K.value
    outputs = [_output_descriptor(y, parts)] + ([] if act is None else [_output_descriptor(act, 1)])
    if None in outputs:
        return False
    operands = operand_descriptors(
        None if gather else x, weight, xa, lora_B, k_unit, parts, *box, _descriptor
    )
    if operands is None:
        return False
    steps = ceil_div(r, box[2]), min(box[2], padded_rank(r))
    constants = {"GATHER": gather, "R_STEPS": steps[0], "R_WIDTH": steps[1], **blocks}
    constants |= NO_ACTIVATION if activation is None else activation_constants(activation)
    stride_xm = x.stride(0) if gather else 0
    key = (
        "linear_roles",
        facts(bias),
        N,
        K,
        x.dtype,
        *steps,
        k_unit,
        blocks["GROUP"],
        gather,
        stride_xm,
        activation,
    )
    gathered = (x, routing.row_token) if gather else (None, None)
    launch(
        key, _linear_roles_kernel, (programs, 1, 1), (y, act, gathered[0], bias, gathered[1], routing.tiles),
        lambda: ((N, K, stride_xm, *strides_or_zeros(bias, 2)), constants), (routing.tiles.shape[0],),
        (*operands, *outputs, *[None] * (2 - len(outputs))),
    )  # fmt: skip
    return True
