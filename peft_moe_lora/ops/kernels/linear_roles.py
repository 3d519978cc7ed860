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

Written in Gluon, Triton's language of layouts, barriers and roles. It is an experiment of Triton's still: `by_roles`
imports this file where the table asks for it, and does without where the import fails.

Legend, of one program:
    half: 64 rows of a tile of 128 rows, 256 columns; each is one consumer's: four warps, an accumulator [64, 256]
    HALVES: 2 where a tile holds the same 128 columns of a gate half and of an up half, else 1
    step: 64 columns of x, or of xa; its boxes lie in a ring of STAGES
    rows [2 * STAGES, 64, 64]: boxes of x or xa, two halves of each step
    columns [STAGES, 256, 64] where K_UNIT, else [STAGES, 64, 256]: boxes of the weight or B
    stages: rows, columns and the barriers of the ring, as `rings` says
    messages: a ring of (expert, first row, end, column tile), one a tile; expert -1: no more
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

from ..activation import Activation
from ..routing import Routing
from .activation import activate, activate_plain, activation_constants
from .config import ceil_div, padded_rank
from .launch import facts, launch
from .linear_ordered import operand_descriptors
from .rings import MESSAGES, after, barriers, before, hear, message_ring, tell
from .tile import halves, make_descriptor, position, strides_or_zeros, table_line, table_size

# triton 3.6: other names; drop when the floor is 3.9
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_load_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

# a tile and a step of its K loop: the form of the kernel, not a setting
HALF_M, BLOCK_N, BLOCK_K = gl.constexpr(64), gl.constexpr(256), gl.constexpr(64)
# bytes of a step's columns, and of one half's rows
COLUMN_BYTES, ROW_BYTES = gl.constexpr(256 * 64 * 2), gl.constexpr(64 * 64 * 2)
# a pass without an activation
NO_ACTIVATION = {"KIND": None, "GATED": False, "INTERLEAVED": False, "LIMIT": None, "ALPHA": 1.0, "UP_SHIFT": 0.0}


# ---- the warps that load -------------------------------------------------------------------------------------------


@gluon.jit
def _load_columns(desc, columns, there, s, e, n, k, HALVES: gl.constexpr, K_UNIT: gl.constexpr):
    """Start the copy of a step's columns; beyond N, K and r come zeros."""
    if K_UNIT:
        WIDTH: gl.constexpr = BLOCK_N // HALVES
        _load(desc, [e, 0, n * WIDTH, k], there, columns.index(s).reshape([1, HALVES, WIDTH, BLOCK_K]))
    else:
        _load(desc, [e, k, n * BLOCK_N], there, columns.index(s).reshape([1, BLOCK_K, BLOCK_N]))


@gluon.jit
def _load_boxes(
    rows_desc, columns_desc, steps, stages, s, phase, e, first_row, present, n,
    GATHER: gl.constexpr, HALVES: gl.constexpr, K_UNIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the copies of so many steps whose rows lie in expert order: those of the halves that are present."""
    rows, columns, full, empty = stages
    for i in range(steps):
        mbarrier.wait(empty.index(s), phase)
        there = full.index(s)
        mbarrier.expect(there, COLUMN_BYTES + ROW_BYTES, pred=present == 1)
        mbarrier.expect(there, COLUMN_BYTES + 2 * ROW_BYTES, pred=present == 2)
        for half in gl.static_range(2):
            _load(
                rows_desc,
                [first_row + half * HALF_M, i * BLOCK_K],
                there,
                rows.index(2 * s + half),
                pred=half < present,
            )
        _load_columns(columns_desc, columns, there, s, e, n, i * BLOCK_K, HALVES, K_UNIT)
        if GATHER:
            # the barrier waits for every thread of four warps, which here copies nothing
            async_copy.mbarrier_arrive(there, increment_count=False)
        s, phase = after(s, phase, STAGES)
    return s, phase


@gluon.jit
def _row_pointers(x_ptr, row_token_ptr, first_row, end, stride_xm):
    """Where the first BLOCK_K columns of HALF_M rows lie; a row past the expert's last is the last again."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    offs_m = gl.minimum(first_row + gl.arange(0, HALF_M, gl.SliceLayout(1, layout)), end - 1)
    tokens = gl.load(row_token_ptr + offs_m).to(gl.int64)
    return x_ptr + tokens[:, None] * stride_xm + gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def _load_gathered(
    x, weight_desc, steps, stages, s, phase, e, first_row, end, present, n,
    HALVES: gl.constexpr, K_UNIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the copies of so many steps whose rows are gathered."""
    rows, columns, full, empty = stages
    x_ptr, row_token_ptr, stride_xm = x
    upper = _row_pointers(x_ptr, row_token_ptr, first_row, end, stride_xm)
    lower = _row_pointers(x_ptr, row_token_ptr, first_row + HALF_M, end, stride_xm)
    for i in range(steps):
        mbarrier.wait(empty.index(s), phase)
        there = full.index(s)
        mbarrier.expect(there, COLUMN_BYTES)
        _load_columns(weight_desc, columns, there, s, e, n, i * BLOCK_K, HALVES, K_UNIT)
        _load_rows(rows.index(2 * s), upper)
        if present == 2:
            _load_rows(rows.index(2 * s + 1), lower)
        # each thread's copies arrive when they are done
        async_copy.mbarrier_arrive(there, increment_count=False)
        upper += BLOCK_K
        lower += BLOCK_K
        s, phase = after(s, phase, STAGES)
    return s, phase


@gluon.jit
def _produce(
    operands, x, tiles_ptr, lines, stages, messages, N, K, GROUP: gl.constexpr,
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
    s, phase = 0, 1
    slot, slot_phase = 0, 1
    t = gl.program_id(0)
    while t < total:
        tile, n = position(t, num_tiles, num_n, GROUP)
        e, first_row, end = table_line(tiles_ptr, tile)
        slot, slot_phase = tell(messages, slot, slot_phase, e, first_row, end, n, WARPS)
        present = gl.where(first_row + HALF_M < end, 2, 1)
        steps = gl.cdiv(K, BLOCK_K)
        if GATHER:
            s, phase = _load_gathered(
                x, weight_desc, steps, stages, s, phase, e, first_row, end, present, n, HALVES, K_UNIT, STAGES
            )
        else:
            s, phase = _load_boxes(
                x_desc, weight_desc, steps, stages, s, phase, e, first_row, present, n, False, HALVES, K_UNIT, STAGES
            )
        if R_STEPS > 0:
            s, phase = _load_boxes(
                xa_desc, lora_B_desc, R_STEPS, stages, s, phase, e, first_row, present, n, GATHER, HALVES, K_UNIT,
                STAGES,
            )  # fmt: skip
        taken = gl.atomic_add(counter_ptr, 1, sem="relaxed")
        # a tile, an addition: this was the last one, and the next kernel finds the counter at 0
        if taken == total - 1:
            gl.store(counter_ptr, 0)
        t = gl.num_programs(0) + taken
    tell(messages, slot, slot_phase, -1, 0, 0, 0, WARPS)


# ---- the warps that multiply and store -----------------------------------------------------------------------------


@gluon.jit
def _multiply_step(
    acc, stages, s, phase, continued, HALF: gl.constexpr, WIDTH: gl.constexpr, COPIED: gl.constexpr,
    K_UNIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """acc plus the product of a step's first WIDTH columns of x; the step before goes back to the warps that load.

    Args:
        continued: whether there is one in this tile.
        COPIED: whether threads wrote the rows, not the copy engine: products are to see that.
    """
    rows, columns, full, empty = stages
    mbarrier.wait(full.index(s), phase)
    if COPIED:
        fence_async_shared()
    x, weight = rows.index(2 * s + HALF), columns.index(s)
    if WIDTH < BLOCK_K:
        x, weight = x.slice(0, WIDTH, 1), weight.slice(0, WIDTH, 1 if K_UNIT else 0)
    if K_UNIT:
        weight = weight.permute([1, 0])
    acc = warpgroup_mma(x, weight, acc, is_async=True)  # [M, K] @ [K, N] -> [M, N]
    # one product stays in flight
    acc = warpgroup_mma_wait(1, deps=[acc])
    mbarrier.arrive(empty.index(before(s, STAGES)), pred=continued)
    s, phase = after(s, phase, STAGES)
    return acc, s, phase


@gluon.jit
def _store_chunk(chunk, output, staging, i: gl.constexpr, first_row, end, half, col, width, stride_m):
    """The rows that exist of a chunk [64, 64], the i-th of a tile: 64 by two boxes in turn, fewer from registers."""
    desc, ptr = output
    t = chunk.to(ptr.dtype.element_ty)
    if col >= width:
        # no store: the next box must not take the one in flight for this chunk's
        tma.store_wait(0)
    elif first_row + HALF_M <= end:
        box = staging.index(i % 2)
        # the last store may be in flight, the one before it read this box
        tma.store_wait(1)
        box.store(t)
        fence_async_shared()
        _store(desc, [half, first_row, col], box.reshape([1, HALF_M, 64]))
    else:
        # rows past the expert's last are another's, or nobody's
        offs_m = first_row + gl.arange(0, HALF_M, gl.SliceLayout(1, t.type.layout))
        offs_n = col + gl.arange(0, 64, gl.SliceLayout(0, t.type.layout))
        ptrs = ptr + offs_m.to(gl.int64)[:, None] * stride_m + (half * width + offs_n)[None, :]
        gl.store(ptrs, t, mask=(offs_m < end)[:, None] & (offs_n < width)[None, :])


@gluon.jit
def _store_half(
    acc, y, act, staging, first_row, end, n, N, HALVES: gl.constexpr, KIND: gl.constexpr, GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr, LIMIT: gl.constexpr, ALPHA: gl.constexpr, UP_SHIFT: gl.constexpr,
):  # fmt: skip
    """The rows of a half that exist, and their activation, in chunks of 64 columns."""
    dtype: gl.constexpr = y[1].dtype.element_ty
    left, right = halves(acc, HALF_M, 128)
    if HALVES == 2:
        # gate on the left, up on the right: the same 64 columns of both, twice
        gates, ups = halves(left, HALF_M, 64), halves(right, HALF_M, 64)
        I = N // 2  # noqa: E741
        for i in gl.static_range(2):
            col = n * 128 + i * 64
            gate, up = gates[i].to(dtype), ups[i].to(dtype)
            _store_chunk(gate, y, staging, 3 * i, first_row, end, 0, col, I, N)
            _store_chunk(up, y, staging, 3 * i + 1, first_row, end, 1, col, I, N)
            # rounded as stored
            result = activate(gate.to(gl.float32), up.to(gl.float32), KIND, LIMIT, ALPHA, UP_SHIFT)
            _store_chunk(result, act, staging, 3 * i + 2, first_row, end, 0, col, I, I)
    else:
        wide = left, right
        for i in gl.static_range(2):
            chunks = halves(wide[i], HALF_M, 64)
            col = n * BLOCK_N + i * 128
            if KIND is None:
                for j in gl.static_range(2):
                    _store_chunk(chunks[j], y, staging, j, first_row, end, 0, col + 64 * j, N, N)
            elif GATED:
                for j in gl.static_range(2):
                    _store_chunk(chunks[j], y, staging, 3 * i + j, first_row, end, 0, col + 64 * j, N, N)
                gate, up = wide[i].to(dtype).to(gl.float32).reshape([HALF_M, 64, 2]).split()
                result = activate(gate, up, KIND, LIMIT, ALPHA, UP_SHIFT)
                _store_chunk(result, act, staging, 3 * i + 2, first_row, end, 0, col // 2, N // 2, N // 2)
            else:
                for j in gl.static_range(2):
                    _store_chunk(chunks[j], y, staging, 0, first_row, end, 0, col + 64 * j, N, N)
                    result = activate_plain(chunks[j], KIND, ALPHA)
                    _store_chunk(result, act, staging, 1, first_row, end, 0, col + 64 * j, N, N)


@gluon.jit
def _consume(
    output, staging, stages, messages, N, K, HALF: gl.constexpr,
    GATHER: gl.constexpr, HALVES: gl.constexpr, R_STEPS: gl.constexpr, R_WIDTH: gl.constexpr, K_UNIT: gl.constexpr,
    STAGES: gl.constexpr, KIND: gl.constexpr, GATED: gl.constexpr, INTERLEAVED: gl.constexpr, LIMIT: gl.constexpr,
    ALPHA: gl.constexpr, UP_SHIFT: gl.constexpr,
):  # fmt: skip
    """Four warps that multiply and store half of each tile, until there are no more."""
    y, act, bias_ptr, stride_biase, stride_biasn = output
    full, empty = stages[2], stages[3]
    WIDTH: gl.constexpr = BLOCK_N // HALVES
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    k_steps = gl.cdiv(K, BLOCK_K)
    s, phase = 0, 0
    slot, slot_phase = 0, 0
    e, first_row, end, n = hear(messages, slot, slot_phase)
    while e >= 0:
        first_row += HALF * HALF_M
        if first_row < end:
            if bias_ptr is not None:
                # ahead of the K loop, which hides its latency, two columns a thread
                j = gl.arange(0, BLOCK_N, gl.BlockedLayout([2], [32], [4], [0]))
                in_half = n * WIDTH + j % WIDTH
                cols = j // WIDTH * (N // HALVES) + in_half
                # int64: an expert index times a stride passes 2**31
                bias_ptrs = bias_ptr + e.to(gl.int64) * stride_biase + cols * stride_biasn
                bias = gl.load(bias_ptrs, mask=in_half < N // HALVES, other=0.0)
            acc = gl.zeros([HALF_M, BLOCK_N], gl.float32, layout)
            for i in range(k_steps):
                acc, s, phase = _multiply_step(acc, stages, s, phase, i > 0, HALF, BLOCK_K, GATHER, K_UNIT, STAGES)
            for _ in gl.static_range(R_STEPS):
                acc, s, phase = _multiply_step(acc, stages, s, phase, True, HALF, R_WIDTH, False, K_UNIT, STAGES)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(before(s, STAGES)))
            if bias_ptr is not None:
                acc += gl.convert_layout(bias, gl.SliceLayout(0, layout)).to(gl.float32)[None, :]
            _store_half(
                acc, y, act, staging, first_row, end, n, N, HALVES, KIND, GATED, INTERLEAVED, LIMIT, ALPHA, UP_SHIFT
            )
        else:
            # nothing was loaded for this half: it keeps step with the other
            for _ in range(k_steps + R_STEPS):
                mbarrier.wait(full.index(s), phase)
                mbarrier.arrive(empty.index(s))
                s, phase = after(s, phase, STAGES)
        slot, slot_phase = after(slot, slot_phase, MESSAGES)
        e, first_row, end, n = hear(messages, slot, slot_phase)
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
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    rows = gl.allocate_shared_memory(dtype, [STAGES * 2, HALF_M, BLOCK_K], swizzled)
    columns = gl.allocate_shared_memory(
        dtype, [STAGES, BLOCK_N, BLOCK_K] if K_UNIT else [STAGES, BLOCK_K, BLOCK_N], swizzled
    )
    staging0 = gl.allocate_shared_memory(dtype, [2, HALF_M, 64], swizzled)
    staging1 = gl.allocate_shared_memory(dtype, [2, HALF_M, 64], swizzled)
    # who fills a stage: the copy engine, and where rows are gathered each of 128 threads
    full, empty = barriers(STAGES, 129 if GATHER else 1, 2)
    stages, messages = (rows, columns, full, empty), message_ring(2)
    operands, x = (x_desc, weight_desc, xa_desc, lora_B_desc), (x_ptr, row_token_ptr, stride_xm)
    output = ((y_desc, y_ptr), (act_desc, act_ptr), bias_ptr, stride_biase, stride_biasn)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    output, staging0, stages, messages, N, K, 0, GATHER, HALVES, R_STEPS, R_WIDTH, K_UNIT, STAGES,
                    KIND, GATED, INTERLEAVED, LIMIT, ALPHA, UP_SHIFT,
                ),
            ),
            (
                _consume,
                (
                    output, staging1, stages, messages, N, K, 1, GATHER, HALVES, R_STEPS, R_WIDTH, K_UNIT, STAGES,
                    KIND, GATED, INTERLEAVED, LIMIT, ALPHA, UP_SHIFT,
                ),
            ),
            (
                _produce,
                (
                    operands, x, tiles_ptr, lines, stages, messages, N, K, GROUP, GATHER, HALVES, R_STEPS, K_UNIT,
                    STAGES,
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
    box = HALF_M.value, BLOCK_N.value, BLOCK_K.value
    outputs = [_output_descriptor(y, parts)] + ([] if act is None else [_output_descriptor(act, 1)])
    if None in outputs:
        return False
    operands = operand_descriptors(None if gather else x, weight, xa, lora_B, k_unit, parts, *box, _descriptor)
    if operands is None:
        return False
    steps = ceil_div(r, box[2]), min(box[2], padded_rank(r))
    constants = {"GATHER": gather, "R_STEPS": steps[0], "R_WIDTH": steps[1], **blocks}
    constants |= NO_ACTIVATION if activation is None else activation_constants(activation)
    stride_xm = x.stride(0) if gather else 0
    key = "linear_roles", facts(bias), N, K, x.dtype, *steps, k_unit, blocks["GROUP"], gather, stride_xm, activation
    gathered = (x, routing.row_token) if gather else (None, None)
    launch(
        key, _linear_roles_kernel, (programs, 1, 1), (y, act, gathered[0], bias, gathered[1], routing.tiles),
        lambda: ((N, K, stride_xm, *strides_or_zeros(bias, 2)), constants), (routing.tiles.shape[0],),
        (*operands, *outputs, *[None] * (2 - len(outputs))),
    )  # fmt: skip
    return True
