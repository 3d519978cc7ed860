"""dpre, dw, yb, dB and dA of an activation, by one kernel that reads draw and pre once:

    act = activation(pre), which is never stored
    dpre = activation.backward(pre, w * draw)
    dw = <act, draw>
    yb[m] = scaling * B[e]^T dpre[m]
    dB[e] = sum over the rows m of e of dpre[m] xa[m]^T
    dA[e] = sum over the rows m of e of w[m] * right[m] drop(act[m])^T

A program computes a panel of 128 columns of act. It loops over the rows of a chunk, 64 rows a step,
and holds its part of dB and dA in registers. It stores partial sums of yb and dw over its columns;
`sum_panels` adds the partial sums of all panels. A step has four quarters of 32 rows and 64
columns. Each thread copies, with cp.async, exactly the elements that it will compute on. So the
copies of the next two quarters run while one quarter is computed, and no barrier is needed. The
computed values are written to shared memory, and wgmma reads them after the fourth quarter. Two
programs share a multiprocessor, so that one computes while the other multiplies. The kernel takes
0.59 to 0.77 of the time of the operations that it replaces (NVIDIA H200, 2026-11-24;
docs/performance.md).

Legend: chunks as in `tiles.chunks`
    quarter 2 * c + h of a step: 64 columns from column 64 * c of the panel on, and 32 rows from row
        32 * h of the step on
    sides: the blocks of 64 columns of pre from which a quarter's 64 columns of act are computed:
        the gate and the up columns. If these are interleaved, they are the (gate, up) pairs of the
        first 32 columns and of the last 32 columns. Without a gate there is one side.
    SIDES: 2, or 1 without a gate
    staged, computed: buffers of quarters, as in `act_backward_outer_quarter`
    width: columns of xa, right and yb in memory, of which those past rank r are zeros
    partial_yb_ptr [panels, M, width], partial_dw_ptr [2 * panels, M] fp32
    partial_A_ptr [max_chunks, I, r], partial_B_ptr [max_chunks, N, r] fp32: the sums of each chunk;
        used only for experts with several chunks
"""

from typing import Any, NamedTuple

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ...activation import Activation
from ...dropout import Dropout
from ...operations import RankRows
from ...routing import Routing
from ..launching.launch import facts, launch
from ..launching.table import ceil_div, options_of, power_of_2
from ..operands import Act, Operand, Weight
from ..tiles.chunks import chunk_rows, sum_chunks
from ..tiles.dropout import probability_and_seed, row_hash
from .act_backward_outer_quarter import (
    BY_ELEMENTS,
    BY_PAIRS,
    COLS,
    HALF,
    PAIRS,
    Quarter,
    activate_quarter,
    load_quarter,
)
from .pieces import MAX_RANKS, WIDE, barrier, chunk_of, narrow, ranks_for
from .sum_panels import sum_panels

# triton 3.6: _reinterpret; drop when the floor is 3.9
REINTERPRETS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
# rows of a step
ROWS = gl.constexpr(64)
# layouts of rank-r rows: eight ranks a thread, also as four int32 that hold two ranks each
BY_EIGHT = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [8, 1], [1, 0]))
BY_EIGHT_PAIRS = gl.constexpr(gl.BlockedLayout([1, 4], [16, 2], [8, 1], [1, 0]))
# layout of B: four ranks a thread
BY_FOUR = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [8, 1], [1, 0]))
BY_ROW = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))
# pipeline stages: two quarters whose copies are in flight, and one that is computed
STAGES = gl.constexpr(3)
STAGED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _opaque_zero(n):
    """0, but the compiler does not know that.

    If it knew, it would compute the addresses for all products before the loop, and hold them in
    registers.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, 0;", "=r,r", [n], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _split_pairs(pairs, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """Split int32 elements that hold two 16-bit elements each."""
    low = (pairs & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.join(low, high).reshape(shape), layout, assert_trivial=True)


@gluon.jit
def _load_ranks(ptr, first, left, width, RANKS: gl.constexpr):
    """Load the rank-r rows of a step that begins at row `first`, as int32 of two elements each."""
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, BY_EIGHT_PAIRS))
    pairs = gl.arange(0, RANKS // 2, gl.SliceLayout(0, BY_EIGHT_PAIRS))
    ptrs = ptr + (first + rows).to(gl.int64)[:, None] * (width // 2) + pairs[None, :]
    return gl.load(ptrs, mask=(rows < left)[:, None] & (pairs < width // 2)[None, :], other=0)


@gluon.jit
def _load_B(ptrs, first, inside, r, lora_B, RANKS: gl.constexpr):
    """Load rows `first` up to first + 64 of an expert's B [N, r]; zeros unless `inside`."""
    offs_n = first + gl.arange(0, COLS, gl.SliceLayout(1, BY_FOUR))
    offs_r = gl.arange(0, RANKS, gl.SliceLayout(0, BY_FOUR))
    ptrs = (
        ptrs
        + offs_n.to(gl.int64)[:, None] * lora_B.stride_n
        + offs_r.to(gl.int64)[None, :] * lora_B.stride_k
    )
    return gl.load(ptrs, mask=(offs_r < r)[None, :] & (offs_n >= 0)[:, None] & inside, other=0.0)


@gluon.jit
def _first_column(side, half, col, I, INTERLEAVED: gl.constexpr):  # noqa: E741
    """First column in pre of a side of half 0 or 1 of the panel that begins at column `col`."""
    if INTERLEAVED:
        return 2 * (col + half * COLS) + side * COLS
    else:
        return col + half * COLS + side * I


@gluon.jit
def _stage_B(B, lora_B, e, col, I, r, dtype: gl.constexpr, ACT):  # noqa: E741
    """Put the rows of B[e] that belong to a panel into shared memory: [2, 64, RANKS] of a side."""
    RANKS: gl.constexpr = B[0].shape[2]
    other = col + COLS < I
    ptrs = lora_B.ptr + e * lora_B.stride_e
    # loads before stores to shared memory, so that their latencies overlap; but all parts of B at
    # once would take too many registers
    for side in gl.static_range(1 + ACT.GATED):
        first = _first_column(side, 0, col, I, ACT.INTERLEAVED)
        second = _first_column(side, 1, col, I, ACT.INTERLEAVED)
        b0 = _load_B(ptrs, first, True, r, lora_B, RANKS)
        b1 = _load_B(ptrs, second, other, r, lora_B, RANKS)
        B[side].index(0).store(b0.to(dtype))
        B[side].index(1).store(b1.to(dtype))


@gluon.jit
def _store_sums(out_ptrs, acc, first, inside, r, stride_k, stride_r):
    """Store the sums [64, RANKS] of columns `first` up to first + 64, if `inside`."""
    offs_k = first + gl.arange(0, COLS, gl.SliceLayout(1, acc.type.layout))
    offs_r = gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    ptrs = (
        out_ptrs + offs_k.to(gl.int64)[:, None] * stride_k + offs_r.to(gl.int64)[None, :] * stride_r
    )
    gl.store(ptrs, acc, mask=(offs_r < r)[None, :] & (offs_k >= 0)[:, None] & inside)


@gluon.jit
def _store_all_sums(
    sums, dA, dB, partial, several, chunk, e, col, I, r, ACT,  # noqa: E741
):  # fmt: skip
    """Store a program's sums to dA and dB or, if its expert has several chunks, to `partial`.

    Args:
        dA: `operands.Weight` of [E, I, r]. dB: of [E, N, r].
        partial: `_Partial`.
    """
    SIDES: gl.constexpr = 1 + ACT.GATED
    base_A = dA.ptr + e * dA.stride_e
    base_B = dB.ptr + e * dB.stride_e
    if several:
        base_A = partial.A + chunk.to(gl.int64) * I * r
        base_B = partial.B + chunk.to(gl.int64) * SIDES * I * r
    step_A = gl.where(several, r, dA.stride_n).to(gl.int64)
    step_B = gl.where(several, r, dB.stride_n).to(gl.int64)
    rank_A = gl.where(several, 1, dA.stride_k).to(gl.int64)
    rank_B = gl.where(several, 1, dB.stride_k).to(gl.int64)
    other = col + COLS < I
    for side in gl.static_range(SIDES):
        first = _first_column(side, 0, col, I, ACT.INTERLEAVED)
        second = _first_column(side, 1, col, I, ACT.INTERLEAVED)
        _store_sums(base_B, sums[2 * side], first, True, r, step_B, rank_B)
        _store_sums(base_B, sums[2 * side + 1], second, other, r, step_B, rank_B)
    _store_sums(base_A, sums[2 * SIDES], col, True, r, step_A, rank_A)
    _store_sums(base_A, sums[2 * SIDES + 1], col + COLS, other, r, step_A, rank_A)


@gluon.jit
def _reinterpreted(smem, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """The same shared memory in another shape."""
    if REINTERPRETS:
        view = smem.reinterpret(dtype, shape, layout)
    else:
        view = smem._reinterpret(dtype, shape, layout)
    return view


@gluon.jit
def _multiply_step(halves, B, xa, right, sums, at, SIDES: gl.constexpr):
    """Compute yb [ROWS, RANKS] of a step, and add the step's products to the sums of dB and dA.

    Args:
        halves: `computed` as halves of a panel, [2, 64, 64] of each side and then of act.
        B: [2, 64, RANKS] of each side. xa, right: [1, 64, RANKS], of which right is weighted.
        sums: [64, RANKS] of dB for both halves of each side, and then of dA for both halves.
        at: the 0 of `_opaque_zero`.
    Returns: yb, sums.
    """
    x = xa.index(at)
    y = right.index(at)
    SUMS: gl.constexpr = sums[0].type.layout
    yb = gl.zeros([ROWS, sums[0].shape[1]], gl.float32, SUMS)
    # [M, K] @ [K, R] -> [M, R]
    for i in gl.static_range(2 * SIDES):
        side = halves[i // 2].index(at + i % 2)
        yb = warpgroup_mma(side, B[i // 2].index(at + i % 2), yb, is_async=True)
    # [K, M] @ [M, R] -> [K, R]
    results = (yb,)
    for i in gl.static_range(2 * SIDES + 2):
        side = halves[i // 2].index(at + i % 2).permute([1, 0])
        rows = x if i < 2 * SIDES else y
        results += (warpgroup_mma(side, rows, sums[i], is_async=True),)
    results = warpgroup_mma_wait(0, deps=results)
    return results[0], results[1:]


class _Partial(NamedTuple):
    """Pointers of partial sums, as in the legend."""

    dw: Any
    yb: Any
    A: Any
    B: Any


class _OfRows(NamedTuple):
    """Pointers of each row's slot, of each slot's routing weight, and of the seed of dropout.

    Without dropout the seed is None.
    """

    slot: Any
    weight: Any
    seed: Any


class _RankRows(NamedTuple):
    """Pointers of right and xa, [M, width] each, contiguous."""

    right: Any
    xa: Any


class _Sizes(NamedTuple):
    """Experts, columns of act, rank, and columns of rank-r rows in memory."""

    E: Any
    I: Any  # noqa: E741
    r: Any
    width: Any


class _Tile(NamedTuple):
    """Constants of the kernel.

    Attributes:
        CHUNK: as in `tiles.chunks`.
        PANELS: panels of act.
        E_PADDED: E, padded to a power of two.
        RANKS: r, padded to the columns of a tile.
        P: probability of dropout.
    """

    CHUNK: Any
    PANELS: Any
    E_PADDED: Any
    RANKS: Any
    P: Any


@gluon.jit(do_not_specialize=["M"])
def _act_backward_outer_kernel(
    draw_ptr, pre, of_rows, rank_rows, lora_B, expert_offsets_ptr, dpre_ptr, partial, dA, dB, M,
    sizes, TILE, ACT,
):  # fmt: skip
    """Grid [max_chunks * PANELS].

    The sums of an expert with one chunk or without rows are written to dA and dB directly.
    """
    _, I, r, width = sizes  # noqa: E741
    CHUNK: gl.constexpr = TILE.CHUNK
    PANELS: gl.constexpr = TILE.PANELS
    RANKS: gl.constexpr = TILE.RANKS
    P: gl.constexpr = TILE.P
    INTERLEAVED: gl.constexpr = ACT.INTERLEAVED
    SIDES: gl.constexpr = 1 + ACT.GATED
    dtype: gl.constexpr = pre.ptr.dtype.element_ty
    NARROW: gl.constexpr = narrow(RANKS)
    # layout of wgmma's sums: each of the two groups of four warps has all rows, and half of the
    # ranks
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, RANKS // 2, 16])
    chunk = gl.program_id(0) // PANELS
    panel = gl.program_id(0) % PANELS
    e, index = chunk_of(chunk, expert_offsets_ptr, sizes.E, CHUNK, TILE.E_PADDED, BY_ROW)
    if e >= sizes.E:
        return
    start = gl.load(expert_offsets_ptr + e)
    end = gl.load(expert_offsets_ptr + e + 1)
    several = end - start > CHUNK
    start += index * CHUNK
    end = gl.minimum(end, start + CHUNK)
    # int64: an expert index times a stride passes 2**31
    e = e.to(gl.int64)
    col = panel * 2 * COLS
    # layout of draw
    COLUMNS: gl.constexpr = BY_PAIRS if INTERLEAVED else BY_ELEMENTS
    draw_m = start + gl.arange(0, HALF, gl.SliceLayout(1, COLUMNS))
    draw_c = col + gl.arange(0, PAIRS if INTERLEAVED else COLS, gl.SliceLayout(0, COLUMNS))
    draw_ptrs = draw_ptr + draw_m.to(gl.int64)[:, None] * I + draw_c[None, :]
    offs_m = start + gl.arange(0, HALF, gl.SliceLayout(1, BY_ELEMENTS))
    offs_n = gl.arange(0, COLS, gl.SliceLayout(0, BY_ELEMENTS))
    offs_n += _first_column(0, 0, col, I, INTERLEAVED)
    pre_ptrs = pre.ptr + offs_m.to(gl.int64)[:, None] * pre.stride_m + offs_n[None, :]
    dpre_ptrs = dpre_ptr + offs_m.to(gl.int64)[:, None] * (SIDES * I) + offs_n[None, :]
    staged = ()
    for _ in gl.static_range(SIDES + 1):
        staged += (gl.allocate_shared_memory(dtype, [STAGES, HALF, COLS], STAGED),)
    left = end - start
    zero = start * 0
    first = Quarter(zero, zero, left, col, I)
    load_quarter(staged, 0, draw_ptrs, pre_ptrs, first, pre.stride_m, ACT)
    second = Quarter(zero, zero + 1, left, col, I)
    load_quarter(staged, 1, draw_ptrs, pre_ptrs, second, pre.stride_m, ACT)

    computed = ()
    halves = ()
    for i in gl.static_range(SIDES + 1):
        computed += (gl.allocate_shared_memory(dtype, [4, HALF, COLS], WIDE),)
        # the same memory, viewed as [64, 64] for each half of the panel
        halves += (_reinterpreted(computed[i], dtype, [2, ROWS, COLS], WIDE),)
    B = ()
    for _ in gl.static_range(SIDES):
        B += (gl.allocate_shared_memory(dtype, [2, COLS, RANKS], NARROW),)
    xa = gl.allocate_shared_memory(dtype, [1, ROWS, RANKS], NARROW)
    right = gl.allocate_shared_memory(dtype, [1, ROWS, RANKS], NARROW)
    ws = gl.allocate_shared_memory(gl.float32, [2, HALF], FLAT)
    ws_flat = _reinterpreted(ws, gl.float32, [ROWS], FLAT)
    # row hashes of a step's rows, used with dropout
    hashes = gl.allocate_shared_memory(gl.int32, [2, HALF], FLAT)
    hashes_flat = _reinterpreted(hashes, gl.int32, [ROWS], FLAT)
    rows = gl.arange(0, ROWS, BY_ROW)
    slots = gl.load(of_rows.slot + start + rows, mask=start + rows < end, other=0)
    next_slots = gl.load(
        of_rows.slot + start + ROWS + rows, mask=start + ROWS + rows < end, other=0
    )
    w = gl.load(of_rows.weight + slots, mask=start + rows < end, other=0.0)
    _stage_B(B, lora_B, e, col, I, r, dtype, ACT)
    ws_flat.store(w.to(gl.float32))
    if P > 0:
        seed = gl.load(of_rows.seed)
        hashes_flat.store(row_hash(seed, slots))

    ints = gl.pointer_type(gl.int32)
    dw_ptr = partial.dw + panel.to(gl.int64) * 2 * M + start
    xa_pairs = rank_rows.xa.to(ints, bitcast=True)
    right_pairs = rank_rows.right.to(ints, bitcast=True)
    yb_m = gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    yb_r = gl.arange(0, RANKS, gl.SliceLayout(0, SUMS))
    yb_ptr = partial.yb + panel.to(gl.int64) * M * width

    zeros = gl.zeros([COLS, RANKS], gl.float32, SUMS)
    sums = ()
    for _ in gl.static_range(2 * SIDES + 2):
        sums += (zeros,)
    s = zero
    for step in range(gl.cdiv(end - start, ROWS)):
        at = _opaque_zero(step)
        next_w = gl.load(of_rows.weight + next_slots, mask=rows < left - ROWS, other=0.0)
        if P > 0:
            next_hashes = row_hash(seed, next_slots)
        next_slots = gl.load(
            of_rows.slot + end - left + 2 * ROWS + rows, mask=rows < left - 2 * ROWS, other=0
        )
        # few ranks are loaded early, which hides their latency; more would take too many registers
        if RANKS == 16:
            step_xa = _load_ranks(xa_pairs, end - left, left, width, RANKS)
            step_right = _load_ranks(right_pairs, end - left, left, width, RANKS)
        # a last step of at most 32 rows computes two quarters. The other two still hold rows of the
        # previous step; they add nothing to the sums, because their rows of xa and right are zeros
        quarters = gl.where((step > 0) & (left <= HALF), 2, 4)
        for j in range(quarters):
            h = j // 2
            c = j % 2
            # two quarters ahead: the same columns of the next 32 rows
            ahead = gl.where(s == 0, 2, s - 1)
            loaded = Quarter(h + 1, c, left, col, I)
            load_quarter(staged, ahead, draw_ptrs, pre_ptrs, loaded, pre.stride_m, ACT)
            # a thread computes only on elements that it copied itself, so no barrier is needed
            async_copy.wait_group(2)
            quarter = Quarter(h, c, left, col, I)
            activate_quarter(
                staged, s, computed, ws.index(h), hashes.index(h), dw_ptr, dpre_ptrs, quarter, M,
                ACT, P,
            )  # fmt: skip
            s = gl.where(s == 2, 0, s + 1)
        if RANKS > 16:
            step_xa = _load_ranks(xa_pairs, end - left, left, width, RANKS)
            step_right = _load_ranks(right_pairs, end - left, left, width, RANKS)
        weighted = _split_pairs(step_right, dtype, [ROWS, RANKS], BY_EIGHT).to(gl.float32)
        weighted *= ws_flat.load(gl.SliceLayout(1, BY_EIGHT))[:, None]
        xa.index(0).store(_split_pairs(step_xa, dtype, [ROWS, RANKS], BY_EIGHT))
        right.index(0).store(weighted.to(dtype))
        # make the values that all threads wrote visible to wgmma
        fence_async_shared()
        barrier()
        ws_flat.store(next_w.to(gl.float32))
        if P > 0:
            hashes_flat.store(next_hashes)
        yb, sums = _multiply_step(halves, B, xa, right, sums, at, SIDES)
        # all products have read their operands, so the next step may overwrite them
        barrier()
        # addresses are computed anew in every step: held in registers, they would be spilled
        yb_rows = (end - left + yb_m).to(gl.int64) * width
        yb_ptrs = yb_ptr + yb_rows[:, None] + yb_r[None, :]
        gl.store(yb_ptrs, yb, mask=(yb_m < left)[:, None] & (yb_r < width)[None, :])
        left -= ROWS
        draw_ptrs += ROWS * I
        pre_ptrs += ROWS * pre.stride_m
        dpre_ptrs += ROWS * SIDES * I
        dw_ptr += ROWS

    _store_all_sums(sums, dA, dB, partial, several, chunk, e, col, I, r, ACT)


def _aligned(draw: torch.Tensor, pre: torch.Tensor, right: torch.Tensor, xa: torch.Tensor) -> bool:
    """Whether rows can be copied 16 bytes at a time."""
    if xa.shape[1] > MAX_RANKS or pre.stride(1) != 1 or pre.stride(0) % 16:
        return False
    return all(t.data_ptr() % 16 == 0 for t in (draw, pre, right, xa))


def act_backward_outer(
    blocks: dict,
    draw: torch.Tensor,
    pre: torch.Tensor,
    routing: Routing,
    activation: Activation,
    top_k_weights: torch.Tensor,
    rows: RankRows,
    dout: torch.Tensor | None,
    bias: torch.Tensor | None,
    dropout: Dropout | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """`expert_act_backward_outer`.

    Args:
        blocks: constexprs of the table's row.
        rows: no field is None.
    Returns: dpre [M, N], yb [M, R], d_top_k_weights [T, top_k] fp32; None if the width of act, the
        rank, strides or alignment do not allow it, and then nothing is written.
    """
    right = rows.down_yb.contiguous()
    xa = rows.xa.contiguous()
    _, dA, _, lora_B, scaling, dB = rows
    weights = top_k_weights.contiguous()
    M, I = draw.shape  # noqa: E741
    E, N, r = lora_B.shape
    width = xa.shape[1]
    if I % COLS.value or not _aligned(draw, pre, right, xa):
        return None
    panels = ceil_div(I, 2 * COLS.value)
    chunk = chunk_rows(M, E, panels, ROWS.value, arch=90)
    # if all rows fit into one chunk, no expert has several
    several = M > chunk
    max_chunks = E + several * (M // chunk)
    dpre = torch.empty(M, N, dtype=pre.dtype, device=pre.device)
    yb = torch.empty(M, width, dtype=pre.dtype, device=pre.device)
    fp32 = {"dtype": torch.float32, "device": pre.device}
    dw = torch.empty(*top_k_weights.shape, **fp32)
    partial_yb = torch.empty(panels, M, width, **fp32)
    partial_dw = torch.empty(2 * panels, M, **fp32)
    partial_A = torch.empty(several * max_chunks, I, r, **fp32)
    partial_B = torch.empty(several * max_chunks, N, r, **fp32)
    partial = _Partial(partial_dw, partial_yb, partial_A, partial_B)
    p, seed = probability_and_seed(dropout)
    of_rows = _OfRows(routing.row_slot, weights, seed)

    def arguments() -> tuple[tuple, tuple, dict]:
        tile = _Tile(chunk, panels, E_PADDED=power_of_2(E), RANKS=ranks_for(r), P=p)
        operands = (
            draw, Operand.of(pre), of_rows, _RankRows(right, xa), Weight.of(lora_B),
            routing.expert_offsets, dpre, partial,
            Weight(dA, dA.stride(0), dA.stride(2), dA.stride(1)), Weight.of(dB),
        )  # fmt: skip
        return (
            operands,
            (_Sizes(E, I, r, width),),
            {"TILE": tile, "ACT": Act.of(activation), **options_of(blocks)},
        )

    key = "act_backward_outer", facts(pre, lora_B, weights, dA, dB), E, I, r, activation, chunk, p
    tensors = (
        draw, pre, *of_rows, right, xa, lora_B, routing.expert_offsets, dpre, *partial, dA, dB,
    )  # fmt: skip
    grid = max_chunks * panels, 1, 1
    launch(key, _act_backward_outer_kernel, grid, tensors, arguments, (M,))
    sum_panels(partial_yb, partial_dw, routing, scaling, dout, bias, I, yb, dw)
    if several:
        sum_chunks(partial_A.transpose(1, 2), routing, dA, dA.stride(), chunk)
        dB_strides = dB.stride(0), dB.stride(2), dB.stride(1)
        sum_chunks(partial_B.transpose(1, 2), routing, dB, dB_strides, chunk)
    return dpre, yb, dw
