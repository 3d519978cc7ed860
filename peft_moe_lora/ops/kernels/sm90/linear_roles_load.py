"""The warps of `linear_roles` that load: they take output tiles and fill the pipeline.

Rows in expert order and the weight's columns are copied in TMA boxes; one thread starts each copy.
Gathered rows are copied one by one with cp.async, by the 128 threads of four warps.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..tiles.tile import position, table_line, table_size
from .linear_roles_tile import (
    BLOCK_K,
    BLOCK_N,
    BOX_BYTES,
    BOX_M,
    BOXES,
    BY_ROWS,
    COLUMN_BYTES,
    HALF_M,
)
from .pieces import load_box, load_rows
from .pipeline import send, stage_of, wait_empty


@gluon.jit
def _tile_rows(tiles_ptr, tile, TAILS: gl.constexpr):
    """(expert, first row, end) of a tile.

    With TAILS a tile's rows include its tail. The tail's own line of the table then has no rows.
    """
    e, first_row, end = table_line(tiles_ptr, tile)
    if TAILS:
        e_before = gl.load(tiles_ptr + 2 * gl.maximum(tile - 1, 0))
        e_behind, _, end_behind = table_line(tiles_ptr, tile + 1)
        is_tail = (tile > 0) & (e_before == e) & (end - first_row <= BOX_M)
        has_tail = (e_behind == e) & (end_behind - end <= BOX_M)
        end = gl.where(is_tail, first_row, gl.where(has_tail, end_behind, end))
    return e, first_row, end


@gluon.jit
def _load_columns(desc, columns, full, s, e, n, k, SIZES):
    """Start the copy of a step's columns into stage s; past N, K and r TMA writes zeros."""
    if SIZES.K_UNIT:
        WIDTH: gl.constexpr = BLOCK_N // SIZES.HALVES
        first = n * WIDTH
        box = columns.index(s).reshape([1, SIZES.HALVES, WIDTH, BLOCK_K])
        load_box(desc, [e, 0, first, k], full, box)
    else:
        load_box(desc, [e, k, n * BLOCK_N], full, columns.index(s).reshape([1, BLOCK_K, BLOCK_N]))


@gluon.jit
def _load_boxes(
    rows_desc, columns_desc, steps, stages, step, e, first_row, end, n, GATHER: gl.constexpr,
    SIZES,
):  # fmt: skip
    """Start the copies of `steps` steps whose rows lie in expert order.

    Boxes without rows are not copied. GATHER: whether other steps of the tile gather their rows.
    Returns: the number of the next step.
    """
    boxes = gl.cdiv(end - first_row, BOX_M)
    for i in range(steps):
        s = stage_of(step, SIZES.STAGES)
        wait_empty(stages.empty, step, SIZES.STAGES)
        filled = stages.full.index(s)
        for j in gl.static_range(BOXES):
            mbarrier.expect(filled, COLUMN_BYTES + (j + 1) * BOX_BYTES, pred=boxes == j + 1)
        for j in gl.static_range(BOXES - 1):
            box = stages.halves.index(2 * s + j // 2).slice(j % 2 * BOX_M, BOX_M, 0)
            load_box(rows_desc, [first_row + j * BOX_M, i * BLOCK_K], filled, box, pred=j < boxes)
        load_box(
            rows_desc, [first_row + 2 * HALF_M, i * BLOCK_K], filled, stages.tails.index(s),
            pred=boxes == BOXES,
        )  # fmt: skip
        _load_columns(columns_desc, stages.columns, filled, s, e, n, i * BLOCK_K, SIZES)
        if GATHER:
            # the mbarrier expects 128 threads to arrive, also in this step where they copy nothing
            async_copy.mbarrier_arrive(filled, increment_count=False)
        step += 1
    return step


@gluon.jit
def _row_pointers(x, row_token_ptr, first_row, end, ROWS: gl.constexpr):
    """Pointers [ROWS, BLOCK_K] to the first columns of gathered rows.

    Past the expert's last row, that row is repeated. The stride is a multiple of 8, which is
    written in a form that the compiler sees: it then copies eight columns at once.
    """
    offs_m = gl.minimum(first_row + gl.arange(0, ROWS, gl.SliceLayout(1, BY_ROWS)), end - 1)
    tokens = gl.load(row_token_ptr + offs_m).to(gl.int64)
    row_ptrs = x.ptr + tokens[:, None] * (x.stride_m // 8 * 8)
    return row_ptrs + gl.arange(0, BLOCK_K, gl.SliceLayout(0, BY_ROWS))[None, :]


@gluon.jit
def _copy_rows(smem, ptrs, k, K, EVEN_K: gl.constexpr):
    """Start the copies of a step's columns of rows; past column K, a multiple of 8, zeros."""
    if EVEN_K:
        load_rows(smem, ptrs)
    else:
        cols = k + gl.arange(0, BLOCK_K, gl.SliceLayout(0, BY_ROWS))
        rows = gl.arange(0, ptrs.shape[0], gl.SliceLayout(1, BY_ROWS))
        load_rows(smem, ptrs, (rows >= 0)[:, None] & (cols // 8 < K // 8)[None, :])


@gluon.jit
def _load_gathered(
    x, row_token_ptr, weight_desc, steps, stages, step, e, first_row, end, n, K, SIZES
):
    """Start the copies of `steps` steps whose rows are gathered.

    Returns: the number of the next step.
    """
    upper = _row_pointers(x, row_token_ptr, first_row, end, HALF_M)
    lower = _row_pointers(x, row_token_ptr, first_row + HALF_M, end, HALF_M)
    tail = _row_pointers(x, row_token_ptr, first_row + 2 * HALF_M, end, BOX_M)
    for i in range(steps):
        s = stage_of(step, SIZES.STAGES)
        wait_empty(stages.empty, step, SIZES.STAGES)
        filled = stages.full.index(s)
        mbarrier.expect(filled, COLUMN_BYTES)
        _load_columns(weight_desc, stages.columns, filled, s, e, n, i * BLOCK_K, SIZES)
        _copy_rows(stages.halves.index(2 * s), upper, i * BLOCK_K, K, SIZES.EVEN_K)
        if first_row + HALF_M < end:
            _copy_rows(stages.halves.index(2 * s + 1), lower, i * BLOCK_K, K, SIZES.EVEN_K)
        if first_row + 2 * HALF_M < end:
            _copy_rows(stages.tails.index(s), tail, i * BLOCK_K, K, SIZES.EVEN_K)
        # each thread arrives when its own copies are complete
        async_copy.mbarrier_arrive(filled, increment_count=False)
        upper += BLOCK_K
        lower += BLOCK_K
        tail += BLOCK_K
        step += 1
    return step


@gluon.jit
def produce(descs, x, routes, lines, stages, messages, N, K, SIZES):
    """Take output tiles from the queue until it is empty; announce each tile and load its steps.

    The queue is a counter in global memory. Programs that take their tiles from it compute tiles
    near each other at the same time, and share the weight's columns in L2. Which program computes a
    tile differs from run to run, but the result is the same.
    """
    x_desc, weight_desc, xa_desc, lora_B_desc = descs
    tiles_ptr = routes.tiles
    GATHER: gl.constexpr = SIZES.GATHER
    WARPS: gl.constexpr = 4 if GATHER else 1
    counter_ptr = tiles_ptr + 2 * lines - 1
    num_tiles = table_size(tiles_ptr, lines)
    num_n = gl.cdiv(N, BLOCK_N)
    total = num_tiles * num_n
    # numbers of steps and of messages so far
    step = 0
    message = 0
    t = gl.program_id(0)
    while t < total:
        tile, n = position(t, num_tiles, num_n, SIZES.GROUP)
        e, first_row, end = _tile_rows(tiles_ptr, tile, SIZES.TAILS)
        if first_row < end:
            send(messages, message, e, first_row, end, n, WARPS)
            message += 1
            steps = gl.cdiv(K, BLOCK_K)
            if SIZES.P > 0:
                step = _load_boxes(
                    xa_desc, lora_B_desc, SIZES.R_STEPS, stages, step, e, first_row, end, n,
                    GATHER, SIZES,
                )  # fmt: skip
            if GATHER:
                step = _load_gathered(
                    x, routes.row_token, weight_desc, steps, stages, step, e, first_row, end, n, K,
                    SIZES,
                )  # fmt: skip
            else:
                step = _load_boxes(
                    x_desc, weight_desc, steps, stages, step, e, first_row, end, n, False, SIZES
                )
            if SIZES.R_STEPS > 0 and not SIZES.P > 0:
                step = _load_boxes(
                    xa_desc, lora_B_desc, SIZES.R_STEPS, stages, step, e, first_row, end, n,
                    GATHER, SIZES,
                )  # fmt: skip
        taken = gl.atomic_add(counter_ptr, 1, sem="relaxed")
        # every tile adds 1; after the last addition the counter is reset to 0 for the next kernel
        if taken == total - 1:
            gl.store(counter_ptr, 0)
        t = gl.num_programs(0) + taken
    send(messages, message, -1, 0, 0, 0, WARPS)
