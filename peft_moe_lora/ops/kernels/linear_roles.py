"""y[m] = W[e] x[m] + bias[e] + B[e] xa[m] for rows in expert order: `linear_ordered` by warps of two roles, for sm_90.

One warp loads, eight multiply and store, so that the next tile is on its way whatever becomes of this one. The
low-rank term is more steps of the K loop, as in `linear_ordered`, but such a step multiplies no more ranks than there
are, 16 of 64 at r = 16: most of the gain where K is small. Time over that of `linear_ordered`, which gives the same
bits, for down and dX (NVIDIA H200, 2026-11-21): 8192 tokens of qwen3-30b 0.92 and 0.95, of qwen3.5-35b 0.93 and 0.91,
of olmoe 0.97 and 0.95, of the gpt-oss shape 1.01 and 0.99, of the deepseek-v3 slice 0.93 and 1.00; 32768 of qwen3-30b
0.93 and 0.94; one kernel against itself came to 1.04 in that run.

Written in Gluon, Triton's language of layouts, barriers and roles. It is an experiment of Triton's still: `linear`
imports this file where the table asks for it, and does without where the import fails.

Legend, of one program:
    half: 64 rows of a tile of 128 rows, 256 columns; each is one consumer's: four warps, an accumulator [64, 256]
    step: 64 columns of x, or of xa; its boxes lie in a ring of STAGES
    rows [2 * STAGES, 64, 64]: boxes of x or xa, two halves of each step
    columns [STAGES, 256, 64] where K_UNIT, else [STAGES, 64, 256]: boxes of the weight or B
    full, empty [STAGES]: barriers of a step: its boxes are there; both consumers are done with them
    messages [2 * 4, 1]: a ring of two tiles, (expert, first row, end, column tile) each; expert -1: no more
    told, heard [2]: barriers of a message: it is written; both consumers have read it
The phase that goes with a place in a ring is what its barriers are waited for in: 0 or 1, changed with every turn.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..routing import Routing
from .config import ceil_div, padded_rank
from .launch import facts, launch
from .linear_ordered import operand_descriptors
from .tile import halves, linear_blocks, position, row_descriptor, strides_or_zeros, table_line, table_size

# triton 3.6: other names; drop when the floor is 3.9
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

# a tile and a step of its K loop: the form of the kernel, not a setting
HALF_M, BLOCK_N, BLOCK_K = gl.constexpr(64), gl.constexpr(256), gl.constexpr(64)
# bytes of a step's columns, and of one half's rows
COLUMN_BYTES, ROW_BYTES = gl.constexpr(256 * 64 * 2), gl.constexpr(64 * 64 * 2)


@gluon.jit
def _after(slot, phase, SLOTS: gl.constexpr):
    """The next slot of a ring, and its phase."""
    last = slot == SLOTS - 1
    return gl.where(last, 0, slot + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _before(slot, SLOTS: gl.constexpr):
    """The previous slot of a ring."""
    return gl.where(slot == 0, SLOTS - 1, slot - 1)


@gluon.jit
def _tell(ring, slot, phase, e, first_row, end, n):
    """Write a message once both consumers have read what stood in its place."""
    messages, told, heard = ring
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.wait(heard.index(slot), phase)
    messages.index(4 * slot).store(gl.full([1], e, gl.int32, layout))
    messages.index(4 * slot + 1).store(gl.full([1], first_row, gl.int32, layout))
    messages.index(4 * slot + 2).store(gl.full([1], end, gl.int32, layout))
    messages.index(4 * slot + 3).store(gl.full([1], n, gl.int32, layout))
    mbarrier.arrive(told.index(slot))
    return _after(slot, phase, 2)


@gluon.jit
def _hear(ring, slot, phase):
    """(expert, first row, end, column tile) of the next tile."""
    messages, told, heard = ring
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    mbarrier.wait(told.index(slot), phase)
    e = gl.max(messages.index(4 * slot).load(layout), 0)
    first_row = gl.max(messages.index(4 * slot + 1).load(layout), 0)
    end = gl.max(messages.index(4 * slot + 2).load(layout), 0)
    n = gl.max(messages.index(4 * slot + 3).load(layout), 0)
    mbarrier.arrive(heard.index(slot))
    return e, first_row, end, n


@gluon.jit
def _load_step(
    rows_desc, columns_desc, stages, s, phase, e, first_row, present, n0, k,
    K_UNIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the copies of one step: rows of the halves that are present, and columns; beyond K and r come zeros."""
    rows, columns, full, empty = stages
    mbarrier.wait(empty.index(s), phase)
    there = full.index(s)
    mbarrier.expect(there, COLUMN_BYTES + ROW_BYTES, pred=present == 1)
    mbarrier.expect(there, COLUMN_BYTES + 2 * ROW_BYTES, pred=present == 2)
    for half in gl.static_range(2):
        _load(rows_desc, [first_row + half * HALF_M, k], there, rows.index(2 * s + half), pred=half < present)
    if K_UNIT:
        _load(columns_desc, [e, 0, n0, k], there, columns.index(s).reshape([1, 1, BLOCK_N, BLOCK_K]))
    else:
        _load(columns_desc, [e, k, n0], there, columns.index(s).reshape([1, BLOCK_K, BLOCK_N]))
    return _after(s, phase, STAGES)


@gluon.jit
def _produce(
    operands, tiles_ptr, lines, stages, ring, N, K,
    R_STEPS: gl.constexpr, GROUP: gl.constexpr, K_UNIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that loads: it takes output tiles from the queue until there are none.

    With every num_programs-th tile instead, programs fall out of step and each reads its weight tiles from memory for
    itself: 21 GB in dX of the deepseek-v3 slice, 7.9 by the queue (NVIDIA H200, 2026-11-21). Who computes a tile is
    left to chance so, and not what comes out.
    """
    x_desc, weight_desc, xa_desc, lora_B_desc = operands
    counter_ptr = tiles_ptr + 2 * lines - 1
    num_tiles, num_n = table_size(tiles_ptr, lines), gl.cdiv(N, BLOCK_N)
    total = num_tiles * num_n
    s, phase = 0, 1
    slot, slot_phase = 0, 1
    t = gl.program_id(0)
    while t < total:
        tile, n = position(t, num_tiles, num_n, GROUP)
        e, first_row, end = table_line(tiles_ptr, tile)
        slot, slot_phase = _tell(ring, slot, slot_phase, e, first_row, end, n)
        present = gl.where(first_row + HALF_M < end, 2, 1)
        for i in range(gl.cdiv(K, BLOCK_K)):
            s, phase = _load_step(
                x_desc, weight_desc, stages, s, phase, e, first_row, present, n * BLOCK_N, i * BLOCK_K, K_UNIT, STAGES
            )
        for i in gl.static_range(R_STEPS):
            s, phase = _load_step(
                xa_desc, lora_B_desc, stages, s, phase, e, first_row, present, n * BLOCK_N, i * BLOCK_K, K_UNIT, STAGES
            )
        taken = gl.atomic_add(counter_ptr, 1, sem="relaxed")
        # a tile, an addition: this was the last one, and the next kernel finds the counter at 0
        if taken == total - 1:
            gl.store(counter_ptr, 0)
        t = gl.num_programs(0) + taken
    _tell(ring, slot, slot_phase, -1, 0, 0, 0)


@gluon.jit
def _multiply_step(
    acc, stages, s, phase, before, HALF: gl.constexpr, WIDTH: gl.constexpr, K_UNIT: gl.constexpr, STAGES: gl.constexpr
):
    """acc plus the product of a step's first WIDTH columns of x; the step before goes back to the producer.

    Args:
        before: whether there is one in this tile.
    """
    rows, columns, full, empty = stages
    mbarrier.wait(full.index(s), phase)
    x, weight = rows.index(2 * s + HALF), columns.index(s)
    if WIDTH < BLOCK_K:
        x, weight = x.slice(0, WIDTH, 1), weight.slice(0, WIDTH, 1 if K_UNIT else 0)
    if K_UNIT:
        weight = weight.permute([1, 0])
    acc = warpgroup_mma(x, weight, acc, is_async=True)  # [M, K] @ [K, N] -> [M, N]
    # one product stays in flight
    acc = warpgroup_mma_wait(1, deps=[acc])
    mbarrier.arrive(empty.index(_before(s, STAGES)), pred=before)
    s, phase = _after(s, phase, STAGES)
    return acc, s, phase


@gluon.jit
def _store_half(acc, y_desc, y_ptr, staging, first_row, end, n0, N):
    """The rows of a half that exist, in chunks of 64 columns: 64 rows by two boxes in turn, fewer from registers."""
    left, right = halves(acc.to(y_ptr.dtype.element_ty), HALF_M, 128)
    chunks = halves(left, HALF_M, 64) + halves(right, HALF_M, 64)
    for j in gl.static_range(4):
        y = chunks[j]
        if n0 + 64 * j >= N:
            # no store: the next box must not take the one in flight for this chunk's
            tma.store_wait(0)
        elif first_row + HALF_M <= end:
            box = staging.index(j % 2)
            # the last store may be in flight, the one before it read this box
            tma.store_wait(1)
            box.store(y)
            fence_async_shared()
            _store(y_desc, [first_row, n0 + 64 * j], box)
        else:
            # rows past the expert's last are another's, or nobody's
            offs_m = first_row + gl.arange(0, HALF_M, gl.SliceLayout(1, y.type.layout))
            offs_n = n0 + 64 * j + gl.arange(0, 64, gl.SliceLayout(0, y.type.layout))
            y_ptrs = y_ptr + offs_m.to(gl.int64)[:, None] * N + offs_n[None, :]
            gl.store(y_ptrs, y, mask=(offs_m < end)[:, None] & (offs_n < N)[None, :])


@gluon.jit
def _consume(
    output, staging, stages, ring, N, K, HALF: gl.constexpr,
    R_STEPS: gl.constexpr, R_WIDTH: gl.constexpr, K_UNIT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Four warps that multiply and store half of each tile, until there are no more."""
    y_desc, y_ptr, bias_ptr, stride_biase, stride_biasn = output
    full, empty = stages[2], stages[3]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    k_steps = gl.cdiv(K, BLOCK_K)
    s, phase = 0, 0
    slot, slot_phase = 0, 0
    e, first_row, end, n = _hear(ring, slot, slot_phase)
    while e >= 0:
        first_row += HALF * HALF_M
        if first_row < end:
            if bias_ptr is not None:
                # ahead of the K loop, which hides its latency, two columns a thread
                cols = n * BLOCK_N + gl.arange(0, BLOCK_N, gl.BlockedLayout([2], [32], [4], [0]))
                # int64: an expert index times a stride passes 2**31
                bias_ptrs = bias_ptr + e.to(gl.int64) * stride_biase + cols * stride_biasn
                bias = gl.load(bias_ptrs, mask=cols < N, other=0.0)
            acc = gl.zeros([HALF_M, BLOCK_N], gl.float32, layout)
            for i in range(k_steps):
                acc, s, phase = _multiply_step(acc, stages, s, phase, i > 0, HALF, BLOCK_K, K_UNIT, STAGES)
            for _ in gl.static_range(R_STEPS):
                acc, s, phase = _multiply_step(acc, stages, s, phase, True, HALF, R_WIDTH, K_UNIT, STAGES)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(_before(s, STAGES)))
            if bias_ptr is not None:
                acc += gl.convert_layout(bias, gl.SliceLayout(0, layout)).to(gl.float32)[None, :]
            _store_half(acc, y_desc, y_ptr, staging, first_row, end, n * BLOCK_N, N)
        else:
            # nothing was loaded for this half: it keeps step with the other
            for _ in range(k_steps + R_STEPS):
                mbarrier.wait(full.index(s), phase)
                mbarrier.arrive(empty.index(s))
                s, phase = _after(s, phase, STAGES)
        slot, slot_phase = _after(slot, slot_phase, 2)
        e, first_row, end, n = _hear(ring, slot, slot_phase)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["lines"])
def _linear_roles_kernel(
    x_desc, weight_desc, xa_desc, lora_B_desc, y_desc, y_ptr, bias_ptr, tiles_ptr, lines, N, K,
    stride_biase, stride_biasn,
    R_STEPS: gl.constexpr, R_WIDTH: gl.constexpr, GROUP: gl.constexpr, BLOCK_M: gl.constexpr, K_UNIT: gl.constexpr,
    STAGES: gl.constexpr, PRODUCER: gl.constexpr, CONSUMER: gl.constexpr,
):  # fmt: skip
    """Persistent grid. PRODUCER, CONSUMER: registers a thread of each has."""
    gl.static_assert(BLOCK_M == 2 * HALF_M)
    dtype: gl.constexpr = y_ptr.dtype.element_ty
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    rows = gl.allocate_shared_memory(dtype, [STAGES * 2, HALF_M, BLOCK_K], swizzled)
    columns = gl.allocate_shared_memory(
        dtype, [STAGES, BLOCK_N, BLOCK_K] if K_UNIT else [STAGES, BLOCK_K, BLOCK_N], swizzled
    )
    staging0 = gl.allocate_shared_memory(dtype, [2, HALF_M, 64], swizzled)
    staging1 = gl.allocate_shared_memory(dtype, [2, HALF_M, 64], swizzled)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    messages = gl.allocate_shared_memory(gl.int32, [2 * 4, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    heard = gl.allocate_shared_memory(gl.int64, [2, 1], barrier)
    for i in gl.static_range(2):
        mbarrier.init(told.index(i), count=1)
        mbarrier.init(heard.index(i), count=2)
    stages, ring = (rows, columns, full, empty), (messages, told, heard)
    operands = (x_desc, weight_desc, xa_desc, lora_B_desc)
    output = (y_desc, y_ptr, bias_ptr, stride_biase, stride_biasn)
    gl.warp_specialize(
        [
            (_consume, (output, staging0, stages, ring, N, K, 0, R_STEPS, R_WIDTH, K_UNIT, STAGES)),
            (_consume, (output, staging1, stages, ring, N, K, 1, R_STEPS, R_WIDTH, K_UNIT, STAGES)),
            (_produce, (operands, tiles_ptr, lines, stages, ring, N, K, R_STEPS, GROUP, K_UNIT, STAGES)),
        ],
        [4, 1],
        [CONSUMER, PRODUCER],
    )


def _descriptor(t: torch.Tensor, shape, strides, box) -> TensorDescriptor:
    """A descriptor whose boxes lie in shared memory as products and the copy engine take them."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(box))
    return TensorDescriptor(t, shape, strides, box, layout)


def linear_roles(
    x: torch.Tensor,
    weight: torch.Tensor,
    routing: Routing,
    bias: torch.Tensor | None,
    xa: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    y: torch.Tensor,
) -> bool:
    """What `linear_ordered` does, and its answer."""
    found = linear_blocks("linear_roles", x, weight, routing.block_m)
    if found is None:
        return False
    programs, _, blocks = found
    (_, N, K), k_unit, r = weight.shape, blocks["K_UNIT"], 0 if xa is None else xa.shape[1]
    box = HALF_M.value, BLOCK_N.value, BLOCK_K.value
    y_desc = row_descriptor(y, box[0], 64, _descriptor)
    descriptors = y_desc and operand_descriptors(x, weight, xa, lora_B, k_unit, *box, _descriptor)
    if descriptors is None:
        return False
    steps = ceil_div(r, box[2]), min(box[2], padded_rank(r))
    constants = {"R_STEPS": steps[0], "R_WIDTH": steps[1], **blocks}
    key = "linear_roles", facts(bias), N, K, x.dtype, *steps, k_unit, blocks["GROUP"]
    launch(
        key, _linear_roles_kernel, (programs, 1, 1), (y, bias, routing.tiles),
        lambda: ((N, K, *strides_or_zeros(bias, 2)), constants), (routing.tiles.shape[0],), (*descriptors, y_desc),
    )  # fmt: skip
    return True
