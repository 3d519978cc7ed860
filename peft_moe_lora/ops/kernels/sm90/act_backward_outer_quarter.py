"""A quarter of a step of `act_backward_outer`: its copies into shared memory, and its computation.

Legend, beside that of `act_backward_outer`:
    staged: buffers [STAGES, 32, 64], one of each side and then one of draw, which copies fill
    computed: buffers [4, 32, 64], one of each side and then one of act. They receive the operands
        of wgmma of each quarter: dpre and drop(act)
    hashes_smem: row hashes of 32 rows, used with dropout
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from ..tiles.activation import activate_backward, activate_plain_backward
from ..tiles.dropout import dropped
from .pieces import load_rows
from .sum_panels import HALF_PANEL

# rows and columns of a quarter
HALF = gl.constexpr(32)
COLS = gl.constexpr(HALF_PANEL)
# layout of a quarter over eight warps: each thread has eight adjacent elements of a row
BY_ELEMENTS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
# columns of act in a side of (gate, up) pairs: eight elements of pre give four of act
PAIRS = gl.constexpr(32)
BY_PAIRS = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [8, 1], [1, 0]))


class Quarter(NamedTuple):
    """A quarter of a step.

    Attributes:
        h, c: as in the legend.
        left: number of rows of the chunk from the first row of the step on.
        col: first column of the panel in act. I: columns of act.
    """

    h: Any
    c: Any
    left: Any
    col: Any
    I: Any  # noqa: E741


@gluon.jit
def load_quarter(staged, s, draw_ptrs, pre_ptrs, quarter, stride_prem, ACT):
    """Start the copies of all sides and of draw of a quarter into stage s."""
    SIDES: gl.constexpr = 1 + ACT.GATED
    h, c, left, col, I = quarter  # noqa: E741
    exists = col + c * COLS < I
    mask = (h * HALF + gl.arange(0, HALF, gl.SliceLayout(1, BY_ELEMENTS)) < left)[:, None] & exists
    pre_ptrs += h * HALF * stride_prem + c * COLS * (1 + ACT.INTERLEAVED)
    draw_ptrs += h * HALF * I + c * COLS
    load_rows(staged[0].index(s), pre_ptrs, mask)
    if ACT.GATED:
        load_rows(staged[1].index(s), pre_ptrs + (COLS if ACT.INTERLEAVED else I), mask)
    draw = staged[SIDES].index(s)
    if ACT.INTERLEAVED:
        mask = (h * HALF + gl.arange(0, HALF, gl.SliceLayout(1, BY_PAIRS)) < left)[:, None] & exists
        load_rows(draw.slice(0, PAIRS, 1), draw_ptrs, mask)
        load_rows(draw.slice(PAIRS, PAIRS, 1), draw_ptrs + PAIRS, mask)
    else:
        load_rows(draw, draw_ptrs, mask)
    async_copy.commit_group()


@gluon.jit
def _dropped(act, hashes_smem, col, dtype: gl.constexpr, P: gl.constexpr):
    """act in dtype, multiplied by the mask of dropout.

    hashes_smem: row hashes of its rows. col: its first column.
    """
    act = act.to(dtype)
    if P > 0:
        hashes = hashes_smem.load(gl.SliceLayout(1, act.type.layout))
        cols = col + gl.arange(0, act.shape[1], gl.SliceLayout(0, act.type.layout))
        act = dropped(act.to(gl.float32), hashes[:, None], cols[None, :], P).to(dtype)
    return act


@gluon.jit
def _activate_pairs(
    staged_pre, staged_draw, w, hashes_smem, side_smem, act_smem, dpre_ptrs, mask_m, col, ACT,
    P: gl.constexpr,
):  # fmt: skip
    """Compute act and dpre of a side of interleaved gate and up, whose act begins at column col.

    Stores dpre, and puts dpre and drop(act) into shared memory for wgmma.
    Returns: act * draw [HALF, PAIRS], whose sums over the columns are a part of dw.
    """
    dtype: gl.constexpr = staged_pre.dtype
    gate, up = staged_pre.load(BY_ELEMENTS).reshape([HALF, PAIRS, 2]).split()
    draw = gl.convert_layout(staged_draw.load(BY_PAIRS), gate.type.layout, assert_trivial=True).to(
        gl.float32
    )
    w = gl.convert_layout(w, gl.SliceLayout(1, gate.type.layout), assert_trivial=True)
    act, dgate, dup = activate_backward(
        gate.to(gl.float32), up.to(gl.float32), w[:, None] * draw, ACT
    )
    masked = _dropped(act, hashes_smem, col, dtype, P)
    act_smem.store(gl.convert_layout(masked, BY_PAIRS, assert_trivial=True))
    dpre = gl.join(dgate.to(dtype), dup.to(dtype)).reshape([HALF, COLS])
    dpre = gl.convert_layout(dpre, BY_ELEMENTS, assert_trivial=True)
    gl.store(dpre_ptrs, dpre, mask=mask_m[:, None])
    side_smem.store(dpre)
    return act * draw


@gluon.jit
def activate_quarter(
    staged, s, computed, w_smem, hashes_smem, dw_ptr, dpre_ptrs, quarter, M, ACT, P: gl.constexpr,
):  # fmt: skip
    """Compute act and dpre of the quarter in stage s.

    Stores dpre and the quarter's part of dw, and puts dpre and drop(act) into `computed`.
    """
    SIDES: gl.constexpr = 1 + ACT.GATED
    h, c, left, col, I = quarter  # noqa: E741
    q = 2 * c + h
    act_smem = computed[SIDES].index(q)
    dtype: gl.constexpr = act_smem.dtype
    w = w_smem.load(gl.SliceLayout(1, BY_ELEMENTS))
    draw = staged[SIDES].index(s)
    rows = h * HALF + gl.arange(0, HALF, gl.SliceLayout(1, BY_ELEMENTS))
    col += c * COLS
    mask_m = (rows < left) & (col < I)
    dpre_ptrs += h * HALF * SIDES * I + c * COLS * (1 + ACT.INTERLEAVED)
    if ACT.INTERLEAVED:
        product = _activate_pairs(
            staged[0].index(s), draw.slice(0, PAIRS, 1), w, hashes_smem, computed[0].index(q),
            act_smem.slice(0, PAIRS, 1), dpre_ptrs, mask_m, col, ACT, P,
        )  # fmt: skip
        product += _activate_pairs(
            staged[1].index(s), draw.slice(PAIRS, PAIRS, 1), w, hashes_smem, computed[1].index(q),
            act_smem.slice(PAIRS, PAIRS, 1), dpre_ptrs + COLS, mask_m, col + PAIRS, ACT, P,
        )  # fmt: skip
        dw = gl.convert_layout(
            gl.sum(product, axis=1), gl.SliceLayout(1, BY_ELEMENTS), assert_trivial=True
        )
    elif ACT.GATED:
        gate = staged[0].index(s).load(BY_ELEMENTS).to(gl.float32)
        up = staged[1].index(s).load(BY_ELEMENTS).to(gl.float32)
        draw = draw.load(BY_ELEMENTS).to(gl.float32)
        act, dgate, dup = activate_backward(gate, up, w[:, None] * draw, ACT)
        dw = gl.sum(act * draw, axis=1)
        dgate = dgate.to(dtype)
        dup = dup.to(dtype)
        gl.store(dpre_ptrs, dgate, mask=mask_m[:, None])
        gl.store(dpre_ptrs + I, dup, mask=mask_m[:, None])
        computed[0].index(q).store(dgate)
        computed[1].index(q).store(dup)
        act_smem.store(_dropped(act, hashes_smem, col, dtype, P))
    else:
        pre = staged[0].index(s).load(BY_ELEMENTS).to(gl.float32)
        draw = draw.load(BY_ELEMENTS).to(gl.float32)
        act, dpre = activate_plain_backward(pre, w[:, None] * draw, ACT)
        dw = gl.sum(act * draw, axis=1)
        dpre = dpre.to(dtype)
        gl.store(dpre_ptrs, dpre, mask=mask_m[:, None])
        computed[0].index(q).store(dpre)
        act_smem.store(_dropped(act, hashes_smem, col, dtype, P))
    gl.store(dw_ptr + c * M + rows, dw, mask=mask_m)
