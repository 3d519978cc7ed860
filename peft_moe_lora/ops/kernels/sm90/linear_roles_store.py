"""The epilogue of `linear_roles`: store a consumer's sums to y, and their activation to act.

The activation is computed from the values of y after rounding to its dtype. Chunks of 64 columns
are first written to a box in shared memory. From there TMA stores 64 rows at once; if fewer rows
exist, each thread stores 16 bytes.

Legend: e, n, end, half, HALF, HALVES as in `linear_roles`.
    y, act: (tensor descriptor, pointer)      bias: (pointer, its two strides)
    box [64, 64]: shared memory; each consumer has its own
    width: number of columns of a half of y, or of y if it has no halves
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from ..tiles.activation import activate, activate_plain
from ..tiles.tile import halves
from .linear_roles_tile import BLOCK_N, BOX_M, BY_ROWS, HALF_M
from .pieces import store_box


@gluon.jit
def _store_rows(t, ptr, first_row, end, half, col, width, stride_m):
    """Store the rows of t [rows, columns] before `end`; later rows belong to another expert."""
    offs_m = first_row + gl.arange(0, t.shape[0], gl.SliceLayout(1, t.type.layout))
    offs_n = col + gl.arange(0, t.shape[1], gl.SliceLayout(0, t.type.layout))
    ptrs = ptr + offs_m.to(gl.int64)[:, None] * stride_m + (half * width + offs_n)[None, :]
    mask = (offs_m < end)[:, None] & (offs_n < width)[None, :]
    gl.store(ptrs, t.to(ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _store_chunk(chunk, output, box, first_row, end, half, col, width, stride_m):
    """Store the rows before `end` of a chunk [64, 64] of a tile, through the box."""
    desc, ptr = output
    # TMA may still be reading the previous chunk from the box
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
    """Add the bias to a chunk [64 columns, BOX_M rows] of a tail, and store the rows before `end`.

    Returns: the values as they were stored, [BOX_M, 64] in fp32.
    """
    bias_ptr, stride_biase, stride_biasn = bias
    width = N // HALVES
    if bias_ptr is not None:
        offs_n = col + gl.arange(0, 64, gl.SliceLayout(1, chunk.type.layout))
        # int64: an expert index times a stride passes 2**31
        ptrs = bias_ptr + e.to(gl.int64) * stride_biase + (half * width + offs_n) * stride_biasn
        chunk += gl.load(ptrs, mask=offs_n < width, other=0.0).to(gl.float32)[:, None]
    box = box.slice(0, BOX_M, 0)
    # TMA may still be reading a chunk of the previous tile from the box
    tma.store_wait(0)
    box.store(chunk.to(y[1].dtype.element_ty).permute([1, 0]))
    rows = box.load(BY_ROWS)
    _store_rows(rows, y[1], first_row, end, half, col, width, N)
    return rows.to(gl.float32)


@gluon.jit
def store_tail(
    left, right, y, act, bias, box, e, first_row, end, n, N, HALF: gl.constexpr,
    HALVES: gl.constexpr, KIND: gl.constexpr, GATED: gl.constexpr, LIMIT: gl.constexpr,
    ALPHA: gl.constexpr, UP_SHIFT: gl.constexpr,
):  # fmt: skip
    """Store the two column chunks of a tail that this consumer has, and their activation."""
    if HALVES == 2:
        # the left half of the tile is gate, the right half is up
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
def store_half(
    acc, y, act, box, first_row, end, n, N, HALVES: gl.constexpr, KIND: gl.constexpr,
    GATED: gl.constexpr, LIMIT: gl.constexpr, ALPHA: gl.constexpr, UP_SHIFT: gl.constexpr,
):  # fmt: skip
    """Store the rows before `end` of a half, and their activation, in chunks of 64 columns."""
    dtype: gl.constexpr = y[1].dtype.element_ty
    left, right = halves(acc, HALF_M, 128)
    if HALVES == 2:
        # the left half of the tile is gate, the right half is up: two chunks of each
        gates = halves(left, HALF_M, 64)
        ups = halves(right, HALF_M, 64)
        I = N // 2  # noqa: E741
        for i in gl.static_range(2):
            col = n * 128 + i * 64
            gate = gates[i].to(dtype)
            up = ups[i].to(dtype)
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
