"""dpre, dw, yb, dB and dA of a gated activation, in one reading of draw and of pre:

    dpre = activation.backward(pre, w * draw)    dw = <act, draw>                  act = activation(pre), never stored
    yb[m] = scaling * B[e]^T dpre[m]             dB[e] = sum of dpre[m] xa[m]^T    dA[e] = sum of right[m] w act[m]^T

A program has a panel of 128 columns of act and goes over the rows of a chunk, 64 a step, with its part of dB and dA in
registers. Of yb and dw it has what its columns give; a second kernel adds the panels. A step is four quarters of 32
rows and 64 columns: one is computed while the next two are copied, by the very threads that will read them. What it
computed the products find in shared memory. Two programs a multiprocessor: one computes while the other multiplies.

Time over that of the operations it stands for, r = 16 (NVIDIA H200, 2026-11-24; 8192 tokens): qwen3.5-35b 0.77,
qwen3-30b 0.70 (2048 tokens: 0.78), the gpt-oss shape 0.63, the deepseek-v3 slice 0.65, mixtral 0.59; where gate and up
alternate, with the clamp, qwen3-30b 0.75, the gpt-oss shape 0.69. At qwen3.5-35b it takes 137 us for 335 MB; of its
programs, of 256 rows, a sixth is their beginning and end.
Tried there: rows loaded into registers a quarter ahead 1.27 times as long, four stages 1.03; all rows of a chunk at 32
columns a step 1.4 to 1.6, at any depth, because memory gives pieces of 64 bytes at 1.5 TB/s; the same in Triton 1.4.

Legend: chunks as in `outer`; quarter 2 * c + h of a step: columns 64 * c of the panel on, rows 32 * h on.
    sides: the two times 64 columns of pre that a quarter's 64 of act come from: gate and up; where these alternate in
        memory, the pairs of the first 32 and of the last
    partial_yb_ptr [panels, M, r], partial_dw_ptr [2 * panels, M] fp32
    partial_A_ptr [max_chunks, I, r], partial_B_ptr [max_chunks, N, r] fp32: of experts of several chunks
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ...activation import Activation
from ...operations import RankRows
from ...routing import Routing
from ..launching.launch import facts, launch
from ..launching.table import ceil_div, power_of_2
from ..tiles.activation import activate_backward, activation_constants
from ..tiles.bias import bias_times_dout
from ..tiles.chunks import chunk_rows, sum_chunks
from ..tiles.tile import strides_or_zeros
from .pieces import NARROW, RANKS, WIDE, barrier, chunk_of, load_rows

# triton 3.6: _reinterpret; drop when the floor is 3.9
REINTERPRETS = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))
# rows of a step; rows and columns of a quarter
ROWS, HALF, COLS = gl.constexpr(64), gl.constexpr(32), gl.constexpr(64)
BY_ELEMENTS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
# of act, where a side is pairs of gate and up: a thread's pairs belong to four columns
BY_PAIRS = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [8, 1], [1, 0]))
PAIRS = gl.constexpr(32)
# of rank-r rows, eight ranks a thread, and of B
BY_EIGHT = gl.constexpr(gl.BlockedLayout([1, 8], [16, 2], [8, 1], [1, 0]))
BY_EIGHT_PAIRS = gl.constexpr(gl.BlockedLayout([1, 4], [16, 2], [8, 1], [1, 0]))
BY_FOUR = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [8, 1], [1, 0]))
BY_ROW = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))
# rows that a program of the second kernel adds
SUMMED_ROWS = 64
# quarters in flight or computed
STAGES = gl.constexpr(3)
STAGED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
# both groups of four warps take all rows, of 8 of the 16 ranks
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 8, 16]))


@gluon.jit
def _opaque_zero(n):
    """0, which the compiler does not know: else it holds the addresses of all products in registers."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, 0;", "=r,r", [n], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _apart(pairs, dtype: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr):
    """The elements of ints that hold two each."""
    low = (pairs & 0xFFFF).to(gl.int16).to(dtype, bitcast=True)
    high = (pairs >> 16).to(gl.int16).to(dtype, bitcast=True)
    return gl.convert_layout(gl.join(low, high).reshape(shape), layout, assert_trivial=True)


@gluon.jit
def _load_quarter(
    staged, s, draw_ptrs, pre_ptrs, left, h, c, col, I, stride_prem, INTERLEAVED: gl.constexpr,  # noqa: E741
):  # fmt: skip
    """Start the copies of both sides and draw of a quarter, of a step that has so many rows left."""
    exists = col + c * COLS < I
    mask = (h * HALF + gl.arange(0, HALF, gl.SliceLayout(1, BY_ELEMENTS)) < left)[:, None] & exists
    pre_ptrs += h * HALF * stride_prem + c * COLS * (1 + INTERLEAVED)
    draw_ptrs += h * HALF * I + c * COLS
    load_rows(staged[0].index(s), pre_ptrs, mask)
    load_rows(staged[1].index(s), pre_ptrs + (COLS if INTERLEAVED else I), mask)
    if INTERLEAVED:
        mask = (h * HALF + gl.arange(0, HALF, gl.SliceLayout(1, BY_PAIRS)) < left)[:, None] & exists
        load_rows(staged[2].index(s).slice(0, PAIRS, 1), draw_ptrs, mask)
        load_rows(staged[2].index(s).slice(PAIRS, PAIRS, 1), draw_ptrs + PAIRS, mask)
    else:
        load_rows(staged[2].index(s), draw_ptrs, mask)
    async_copy.commit_group()


@gluon.jit
def _activate_side(
    staged_pre, staged_draw, w, side_smem, act_smem, dpre_ptrs, mask_m,
    KIND: gl.constexpr, LIMIT: gl.constexpr, ALPHA: gl.constexpr, UP_SHIFT: gl.constexpr,
):  # fmt: skip
    """Activation and gradient of a side of pairs: to memory, and where the products find them. Returns act * draw."""
    dtype: gl.constexpr = staged_pre.dtype
    gate, up = staged_pre.load(BY_ELEMENTS).reshape([HALF, PAIRS, 2]).split()
    draw = gl.convert_layout(staged_draw.load(BY_PAIRS), gate.type.layout, assert_trivial=True).to(
        gl.float32
    )
    w = gl.convert_layout(w, gl.SliceLayout(1, gate.type.layout), assert_trivial=True)
    act, dgate, dup = activate_backward(
        gate.to(gl.float32), up.to(gl.float32), w[:, None] * draw, KIND, LIMIT, ALPHA, UP_SHIFT
    )
    act_smem.store(gl.convert_layout(act.to(dtype), BY_PAIRS, assert_trivial=True))
    dpre = gl.join(dgate.to(dtype), dup.to(dtype)).reshape([HALF, COLS])
    dpre = gl.convert_layout(dpre, BY_ELEMENTS, assert_trivial=True)
    gl.store(dpre_ptrs, dpre, mask=mask_m[:, None])
    side_smem.store(dpre)
    return act * draw


@gluon.jit
def _activate_quarter(
    staged, s, w_smem, dw_ptrs, dpre_ptrs, left, h, c, col, I, M, side0_smem, side1_smem, act_smem,  # noqa: E741
    INTERLEAVED: gl.constexpr,
    KIND: gl.constexpr, LIMIT: gl.constexpr, ALPHA: gl.constexpr, UP_SHIFT: gl.constexpr,
):  # fmt: skip
    """Activation and gradient of a quarter: to memory, and where the products find them."""
    dtype: gl.constexpr = act_smem.dtype
    w = w_smem.load(gl.SliceLayout(1, BY_ELEMENTS))
    side0, side1, draw = staged[0].index(s), staged[1].index(s), staged[2].index(s)
    rows = h * HALF + gl.arange(0, HALF, gl.SliceLayout(1, BY_ELEMENTS))
    mask_m = (rows < left) & (col + c * COLS < I)
    dpre_ptrs += h * HALF * 2 * I + c * COLS * (1 + INTERLEAVED)
    if INTERLEAVED:
        product = _activate_side(
            side0, draw.slice(0, PAIRS, 1), w, side0_smem, act_smem.slice(0, PAIRS, 1), dpre_ptrs, mask_m, KIND, LIMIT,
            ALPHA, UP_SHIFT,
        )  # fmt: skip
        product += _activate_side(
            side1, draw.slice(PAIRS, PAIRS, 1), w, side1_smem, act_smem.slice(PAIRS, PAIRS, 1), dpre_ptrs + COLS,
            mask_m, KIND, LIMIT, ALPHA, UP_SHIFT,
        )  # fmt: skip
        dw = gl.convert_layout(
            gl.sum(product, axis=1), gl.SliceLayout(1, BY_ELEMENTS), assert_trivial=True
        )
    else:
        gate, up = side0.load(BY_ELEMENTS).to(gl.float32), side1.load(BY_ELEMENTS).to(gl.float32)
        draw = draw.load(BY_ELEMENTS).to(gl.float32)
        act, dgate, dup = activate_backward(
            gate, up, w[:, None] * draw, KIND, LIMIT, ALPHA, UP_SHIFT
        )
        dw = gl.sum(act * draw, axis=1)
        dgate, dup = dgate.to(dtype), dup.to(dtype)
        gl.store(dpre_ptrs, dgate, mask=mask_m[:, None])
        gl.store(dpre_ptrs + I, dup, mask=mask_m[:, None])
        side0_smem.store(dgate)
        side1_smem.store(dup)
        act_smem.store(act.to(dtype))
    gl.store(dw_ptrs + (c * M + h * HALF), dw, mask=mask_m)


@gluon.jit
def _load_ranks(ptrs, left, r):
    """Rank-r rows of a step, two elements to an int."""
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, BY_EIGHT_PAIRS))
    pairs = gl.arange(0, RANKS // 2, gl.SliceLayout(0, BY_EIGHT_PAIRS))
    return gl.load(ptrs, mask=(rows < left)[:, None] & (pairs < r // 2)[None, :], other=0)


@gluon.jit
def _load_B(lora_B_ptrs, first, inside, r, stride_br, stride_bk):
    """64 rows of an expert's B, from `first` on."""
    offs_n = first + gl.arange(0, COLS, gl.SliceLayout(1, BY_FOUR))
    offs_r = gl.arange(0, RANKS, gl.SliceLayout(0, BY_FOUR))
    ptrs = (
        lora_B_ptrs
        + offs_n.to(gl.int64)[:, None] * stride_bk
        + offs_r.to(gl.int64)[None, :] * stride_br
    )
    return gl.load(ptrs, mask=(offs_r < r)[None, :] & (offs_n >= 0)[:, None] & inside, other=0.0)


@gluon.jit
def _store_sums(out_ptrs, acc, first, inside, r, stride_k, stride_r):
    """[64, RANKS] sums, of columns from `first` on."""
    offs_k = first + gl.arange(0, COLS, gl.SliceLayout(1, SUMS))
    offs_r = gl.arange(0, RANKS, gl.SliceLayout(0, SUMS))
    ptrs = (
        out_ptrs + offs_k.to(gl.int64)[:, None] * stride_k + offs_r.to(gl.int64)[None, :] * stride_r
    )
    gl.store(ptrs, acc, mask=(offs_r < r)[None, :] & (offs_k >= 0)[:, None] & inside)


@gluon.jit(do_not_specialize=["M"])
def _act_backward_outer_kernel(
    draw_ptr, pre_ptr, top_k_weights_ptr, right_ptr, xa_ptr, lora_B_ptr, row_slot_ptr, expert_offsets_ptr,
    dpre_ptr, partial_dw_ptr, partial_yb_ptr, partial_A_ptr, dA_ptr, partial_B_ptr, dB_ptr, M, E, I, r,  # noqa: E741
    stride_prem, stride_be, stride_bk, stride_br, stride_ae, stride_ar, stride_ak, stride_de, stride_dk, stride_dr,
    CHUNK: gl.constexpr, PANELS: gl.constexpr, E_PADDED: gl.constexpr, INTERLEAVED: gl.constexpr,
    KIND: gl.constexpr, LIMIT: gl.constexpr, ALPHA: gl.constexpr, UP_SHIFT: gl.constexpr,
):  # fmt: skip
    """Grid [max_chunks * PANELS]: an expert of one chunk or no row goes straight to dA and dB."""
    dtype: gl.constexpr = pre_ptr.dtype.element_ty
    chunk, panel = gl.program_id(0) // PANELS, gl.program_id(0) % PANELS
    e, index = chunk_of(chunk, expert_offsets_ptr, E, CHUNK, E_PADDED, BY_ROW)
    if e >= E:
        return
    start, end = gl.load(expert_offsets_ptr + e), gl.load(expert_offsets_ptr + e + 1)
    several = end - start > CHUNK
    start += index * CHUNK
    end = gl.minimum(end, start + CHUNK)
    # int64: an expert index times a stride passes 2**31
    e = e.to(gl.int64)
    # first columns: of the panel in act; n with s and c: of side s of its half c in pre
    col, other = panel * 2 * COLS, panel * 2 * COLS + COLS < I
    n00 = col * (1 + INTERLEAVED)
    n01 = n00 + COLS * (1 + INTERLEAVED)
    n10, n11 = n00 + (COLS if INTERLEAVED else I), n01 + (COLS if INTERLEAVED else I)

    # of draw
    COLUMNS: gl.constexpr = BY_PAIRS if INTERLEAVED else BY_ELEMENTS
    draw_m = start + gl.arange(0, HALF, gl.SliceLayout(1, COLUMNS))
    draw_c = col + gl.arange(0, PAIRS if INTERLEAVED else COLS, gl.SliceLayout(0, COLUMNS))
    draw_ptrs = draw_ptr + draw_m.to(gl.int64)[:, None] * I + draw_c[None, :]
    offs_m = start + gl.arange(0, HALF, gl.SliceLayout(1, BY_ELEMENTS))
    offs_n = n00 + gl.arange(0, COLS, gl.SliceLayout(0, BY_ELEMENTS))
    pre_ptrs = pre_ptr + offs_m.to(gl.int64)[:, None] * stride_prem + offs_n[None, :]
    dpre_ptrs = dpre_ptr + offs_m.to(gl.int64)[:, None] * (2 * I) + offs_n[None, :]
    staged0 = gl.allocate_shared_memory(dtype, [STAGES, HALF, COLS], STAGED)
    staged1 = gl.allocate_shared_memory(dtype, [STAGES, HALF, COLS], STAGED)
    staged_draws = gl.allocate_shared_memory(dtype, [STAGES, HALF, COLS], STAGED)
    staged = staged0, staged1, staged_draws
    left, zero = end - start, start * 0
    _load_quarter(
        staged, 0, draw_ptrs, pre_ptrs, left, zero, zero, col, I, stride_prem, INTERLEAVED
    )
    _load_quarter(
        staged, 1, draw_ptrs, pre_ptrs, left, zero, zero + 1, col, I, stride_prem, INTERLEAVED
    )

    sides0 = gl.allocate_shared_memory(dtype, [4, HALF, COLS], WIDE)
    sides1 = gl.allocate_shared_memory(dtype, [4, HALF, COLS], WIDE)
    acts = gl.allocate_shared_memory(dtype, [4, HALF, COLS], WIDE)
    # the same in halves of the panel
    shape: gl.constexpr = [2, ROWS, COLS]
    if REINTERPRETS:
        halves0 = sides0.reinterpret(dtype, shape, WIDE)
        halves1 = sides1.reinterpret(dtype, shape, WIDE)
        act_halves = acts.reinterpret(dtype, shape, WIDE)
    else:
        halves0 = sides0._reinterpret(dtype, shape, WIDE)
        halves1 = sides1._reinterpret(dtype, shape, WIDE)
        act_halves = acts._reinterpret(dtype, shape, WIDE)
    B0 = gl.allocate_shared_memory(dtype, [2, COLS, RANKS], NARROW)
    B1 = gl.allocate_shared_memory(dtype, [2, COLS, RANKS], NARROW)
    xa = gl.allocate_shared_memory(dtype, [1, ROWS, RANKS], NARROW)
    right = gl.allocate_shared_memory(dtype, [1, ROWS, RANKS], NARROW)
    ws = gl.allocate_shared_memory(gl.float32, [2, HALF], FLAT)
    ws_flat = (
        ws.reinterpret(gl.float32, [ROWS], FLAT)
        if REINTERPRETS
        else ws._reinterpret(gl.float32, [ROWS], FLAT)
    )
    # all loads ahead of all stores: each waits for memory once
    rows = gl.arange(0, ROWS, BY_ROW)
    slots = gl.load(row_slot_ptr + start + rows, mask=start + rows < end, other=0)
    next_slots = gl.load(
        row_slot_ptr + start + ROWS + rows, mask=start + ROWS + rows < end, other=0
    )
    lora_B_ptrs = lora_B_ptr + e * stride_be
    b00 = _load_B(lora_B_ptrs, n00, True, r, stride_br, stride_bk)
    b01 = _load_B(lora_B_ptrs, n01, other, r, stride_br, stride_bk)
    b10 = _load_B(lora_B_ptrs, n10, True, r, stride_br, stride_bk)
    b11 = _load_B(lora_B_ptrs, n11, other, r, stride_br, stride_bk)
    w = gl.load(top_k_weights_ptr + slots, mask=start + rows < end, other=0.0)
    B0.index(0).store(b00.to(dtype))
    B0.index(1).store(b01.to(dtype))
    B1.index(0).store(b10.to(dtype))
    B1.index(1).store(b11.to(dtype))
    ws_flat.store(w.to(gl.float32))

    ints = gl.pointer_type(gl.int32)
    dw_ptrs = partial_dw_ptr + (panel.to(gl.int64) * 2 * M + offs_m)
    ranks_m = start + gl.arange(0, ROWS, gl.SliceLayout(1, BY_EIGHT_PAIRS))
    ranks_r = gl.arange(0, RANKS // 2, gl.SliceLayout(0, BY_EIGHT_PAIRS))
    ranks = ranks_m.to(gl.int64)[:, None] * (r // 2) + ranks_r[None, :]
    xa_pairs, right_pairs = xa_ptr.to(ints, bitcast=True), right_ptr.to(ints, bitcast=True)
    yb_m = gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    yb_r = gl.arange(0, RANKS, gl.SliceLayout(0, SUMS))
    yb_ptrs = (
        partial_yb_ptr
        + (panel.to(gl.int64) * M + start + yb_m.to(gl.int64))[:, None] * r
        + yb_r[None, :]
    )

    none = gl.zeros([COLS, RANKS], gl.float32, SUMS)
    s0, s1, s2, s3, s4, s5 = none, none, none, none, none, none
    s = zero
    for step in range(gl.cdiv(end - start, ROWS)):
        at = _opaque_zero(step)
        next_w = gl.load(top_k_weights_ptr + next_slots, mask=rows < left - ROWS, other=0.0)
        next_slots = gl.load(
            row_slot_ptr + end - left + 2 * ROWS + rows, mask=rows < left - 2 * ROWS, other=0
        )
        step_xa, step_right = (
            _load_ranks(xa_pairs + ranks, left, r),
            _load_ranks(right_pairs + ranks, left, r),
        )
        # a last step of few rows has old ones behind them, of the same expert, which xa and right, 0, leave out
        quarters = gl.where((step > 0) & (left <= HALF), 2, 4)
        for j in range(quarters):
            h, c = j // 2, j % 2
            # two quarters ahead: the same columns of the next rows
            ahead = gl.where(s == 0, 2, s - 1)
            _load_quarter(
                staged, ahead, draw_ptrs, pre_ptrs, left, h + 1, c, col, I, stride_prem, INTERLEAVED
            )
            # a thread computes what it copied, so it waits for itself alone
            async_copy.wait_group(2)
            q = 2 * c + h
            _activate_quarter(
                staged, s, ws.index(h), dw_ptrs, dpre_ptrs, left, h, c, col, I, M, sides0.index(q), sides1.index(q),
                acts.index(q), INTERLEAVED, KIND, LIMIT, ALPHA, UP_SHIFT,
            )  # fmt: skip
            s = gl.where(s == 2, 0, s + 1)
        weighted = _apart(step_right, dtype, [ROWS, RANKS], BY_EIGHT).to(gl.float32)
        weighted *= ws_flat.load(gl.SliceLayout(1, BY_EIGHT))[:, None]
        xa.index(0).store(_apart(step_xa, dtype, [ROWS, RANKS], BY_EIGHT))
        right.index(0).store(weighted.to(dtype))
        # the products are to see what threads wrote
        fence_async_shared()
        barrier()
        ws_flat.store(next_w.to(gl.float32))
        side00, side01 = halves0.index(at), halves0.index(at + 1)
        side10, side11 = halves1.index(at), halves1.index(at + 1)
        x, y = xa.index(at), right.index(at)
        yb = gl.zeros([ROWS, RANKS], gl.float32, SUMS)
        # [M, K] @ [K, R] -> [M, R]
        yb = warpgroup_mma(side00, B0.index(at), yb, is_async=True)
        yb = warpgroup_mma(side01, B0.index(at + 1), yb, is_async=True)
        yb = warpgroup_mma(side10, B1.index(at), yb, is_async=True)
        yb = warpgroup_mma(side11, B1.index(at + 1), yb, is_async=True)
        # [K, M] @ [M, R] -> [K, R]
        s0 = warpgroup_mma(side00.permute([1, 0]), x, s0, is_async=True)
        s1 = warpgroup_mma(side01.permute([1, 0]), x, s1, is_async=True)
        s2 = warpgroup_mma(side10.permute([1, 0]), x, s2, is_async=True)
        s3 = warpgroup_mma(side11.permute([1, 0]), x, s3, is_async=True)
        s4 = warpgroup_mma(act_halves.index(at).permute([1, 0]), y, s4, is_async=True)
        s5 = warpgroup_mma(act_halves.index(at + 1).permute([1, 0]), y, s5, is_async=True)
        yb, s0, s1, s2, s3, s4, s5 = warpgroup_mma_wait(0, deps=[yb, s0, s1, s2, s3, s4, s5])
        # and have read what the next step replaces
        barrier()
        gl.store(yb_ptrs, yb, mask=(yb_m < left)[:, None] & (yb_r < r)[None, :])
        left -= ROWS
        draw_ptrs += ROWS * I
        pre_ptrs += ROWS * stride_prem
        dpre_ptrs += ROWS * 2 * I
        dw_ptrs += ROWS
        ranks += ROWS * (r // 2)
        yb_ptrs += ROWS * r

    base_A, base_B = dA_ptr + e * stride_ae, dB_ptr + e * stride_de
    if several:
        base_A = partial_A_ptr + chunk.to(gl.int64) * I * r
        base_B = partial_B_ptr + chunk.to(gl.int64) * 2 * I * r
    step_A, step_B = (
        gl.where(several, r, stride_ak).to(gl.int64),
        gl.where(several, r, stride_dk).to(gl.int64),
    )
    rank_A, rank_B = (
        gl.where(several, 1, stride_ar).to(gl.int64),
        gl.where(several, 1, stride_dr).to(gl.int64),
    )
    _store_sums(base_B, s0, n00, True, r, step_B, rank_B)
    _store_sums(base_B, s1, n01, other, r, step_B, rank_B)
    _store_sums(base_B, s2, n10, True, r, step_B, rank_B)
    _store_sums(base_B, s3, n11, other, r, step_B, rank_B)
    _store_sums(base_A, s4, col, True, r, step_A, rank_A)
    _store_sums(base_A, s5, col + COLS, other, r, step_A, rank_A)


@triton.jit(do_not_specialize=["M"])
def _sum_panels_kernel(
    partial_yb_ptr, partial_dw_ptr, bias_ptr, dout_ptr, row_token_ptr, row_slot_ptr, expert_offsets_ptr,
    yb_ptr, dw_ptr, M, E, H, r, halves, scaling, stride_biase, stride_biasn, stride_dm, stride_dh,
    E_PADDED: tl.constexpr, R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Grid [M / BLOCK_M]: yb and dw of all columns; a sentinel's row leaves dw 0."""
    rows, offs_r, c = (
        tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M),
        tl.arange(0, R),
        tl.arange(0, 2),
    )
    routed = rows < tl.load(expert_offsets_ptr + E)
    slots = tl.load(row_slot_ptr + rows, mask=rows < M, other=0)
    mask = routed[:, None] & (offs_r < r)[None, :]
    yb_offsets = rows.to(tl.int64)[:, None] * r + offs_r[None, :]
    dw_offsets = c.to(tl.int64)[:, None] * M + rows[None, :]
    yb, dw = tl.zeros((BLOCK_M, R), dtype=tl.float32), tl.zeros((2, BLOCK_M), dtype=tl.float32)
    for half in tl.range(0, halves, 2, loop_unroll_factor=4):
        first = tl.cast(half, tl.int64) * M
        yb += tl.load(partial_yb_ptr + first // 2 * r + yb_offsets, mask=mask, other=0.0)
        mask_dw = (half + c < halves)[:, None] & routed[None, :]
        dw += tl.load(partial_dw_ptr + first + dw_offsets, mask=mask_dw, other=0.0)
    tl.store(yb_ptr + yb_offsets, (yb * scaling).to(yb_ptr.dtype.element_ty), mask=mask)
    dw = tl.sum(dw, axis=0)
    if bias_ptr is not None:
        dw += bias_times_dout(
            bias_ptr, dout_ptr, row_token_ptr, expert_offsets_ptr, rows, routed, E, H, stride_biase, stride_biasn,
            stride_dm, stride_dh, E_PADDED, BLOCK_H,
        )  # fmt: skip
    tl.store(dw_ptr + slots, dw, mask=rows < M)


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """`expert_act_backward_outer` without dropout, or None where activation, ranks, strides or alignment forbid.

    Args:
        blocks: constexprs of the table's row.
    """
    right, dA, xa, lora_B, scaling, dB = rows
    (M, I), (E, N, r) = draw.shape, lora_B.shape  # noqa: E741
    right, xa, weights = right.contiguous(), xa.contiguous(), top_k_weights.contiguous()
    # quarters are copied 16 bytes at a time, rank-r rows read in pairs
    aligned = not (pre.data_ptr() | draw.data_ptr() | right.data_ptr() | xa.data_ptr()) % 16
    aligned = aligned and pre.stride(1) == 1 and pre.stride(0) % 16 == 0
    if not activation.gated or r > RANKS.value or r % 2 or I % COLS.value or not aligned:
        return None
    panels = ceil_div(I, 2 * COLS.value)
    chunk = chunk_rows(M, E, panels, ROWS.value, arch=90)
    several = M > chunk
    max_chunks = E + several * (M // chunk)

    def empty(*size, dtype=torch.float32):
        return torch.empty(*size, dtype=dtype, device=pre.device)

    dpre, yb, dw = (
        empty(M, N, dtype=pre.dtype),
        empty(M, r, dtype=pre.dtype),
        empty(*top_k_weights.shape),
    )
    partial_yb, partial_dw = empty(panels, M, r), empty(2 * panels, M)
    partial_A, partial_B = empty(several * max_chunks, I, r), empty(several * max_chunks, N, r)

    def rest():
        constants = activation_constants(activation) | {
            "E_PADDED": power_of_2(E),
            "CHUNK": chunk,
            "PANELS": panels,
        }
        del constants["GATED"]
        return (
            E,
            I,
            r,
            pre.stride(0),
            *lora_B.stride(),
            *dA.stride(),
            *dB.stride(),
        ), constants | blocks

    key = "act_backward_outer", facts(pre, lora_B, weights, dA, dB), E, I, r, activation, chunk
    tensors = (
        draw, pre, weights, right, xa, lora_B, routing.row_slot, routing.expert_offsets, dpre, partial_dw, partial_yb,
        partial_A, dA, partial_B, dB,
    )  # fmt: skip
    launch(key, _act_backward_outer_kernel, (max_chunks * panels, 1, 1), tensors, rest, (M,))
    _sum_panels(
        partial_yb,
        partial_dw,
        routing,
        scaling,
        dout if bias is not None else None,
        bias,
        I,
        yb,
        dw,
    )
    if several:
        sum_chunks(partial_A.transpose(1, 2), routing, dA, dA.stride(), chunk)
        sum_chunks(
            partial_B.transpose(1, 2),
            routing,
            dB,
            (dB.stride(0), dB.stride(2), dB.stride(1)),
            chunk,
        )
    return dpre, yb, dw


def _sum_panels(partial_yb, partial_dw, routing, scaling, dout, bias, I, yb, dw):  # noqa: E741
    (M, r), E, H = yb.shape, routing.num_experts, 0 if bias is None else bias.shape[1]

    def rest():
        fixed = (
            E,
            H,
            r,
            I // COLS.value,
            scaling,
            *strides_or_zeros(bias, 2),
            *strides_or_zeros(dout, 2),
        )
        return fixed, {
            "E_PADDED": power_of_2(E),
            "R": RANKS.value,
            "BLOCK_M": SUMMED_ROWS,
            "BLOCK_H": 64,
        }

    key = "sum_panels", facts(yb, bias, dout), E, H, I, r, scaling
    tensors = (
        partial_yb, partial_dw, bias, dout, routing.row_token, routing.row_slot, routing.expert_offsets, yb, dw,
    )  # fmt: skip
    launch(key, _sum_panels_kernel, (ceil_div(M, SUMMED_ROWS), 1, 1), tensors, rest, (M,))
