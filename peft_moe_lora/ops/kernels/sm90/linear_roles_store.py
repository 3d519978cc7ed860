"""The epilogue of `linear_roles`: store a consumer's sums to y, and their activation to act.

The activation is computed from the values of y after rounding to its dtype. Each thread stores
eight adjacent columns of a row. For that, the threads of a warp exchange their values.

Legend: line, SIZES as in `linear_roles_tile`; half, HALF as in `linear_roles`.
    output: pointers (y, act); y is None if only the activation is stored
    width: number of columns of a half of y, or of y if it has no halves; a multiple of 8
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..tiles.activation import activate, activate_plain
from ..tiles.tile import halves
from .linear_roles_tile import BLOCK_N, BOX_M, BY_ROWS, HALF_M, STORED


@gluon.jit
def _store(t, ptr, first_row, end, half, col, width, stride_m):
    """Store the rows of t [rows, columns] before `end`; later rows belong to another expert.

    The columns begin at a multiple of 8, and so do rows and halves in memory. It is written in a
    form in which the compiler sees that, and stores eight columns at once.
    """
    offs_m = first_row + gl.arange(0, t.shape[0], gl.SliceLayout(1, t.type.layout))
    offs_n = col + gl.arange(0, t.shape[1], gl.SliceLayout(0, t.type.layout))
    rows = offs_m.to(gl.int64) * (stride_m // 8) * 8
    ptrs = ptr + half * (width // 8) * 8 + rows[:, None] + offs_n[None, :]
    mask = (offs_m < end)[:, None] & (offs_n // 8 < width // 8)[None, :]
    gl.store(ptrs, t, mask=mask)


@gluon.jit
def _store_chunk(chunk, ptr, first_row, end, half, col, width, stride_m):
    """Store the rows before `end` of a chunk [64, 64] of a tile."""
    if col < width:
        values = gl.convert_layout(chunk.to(ptr.dtype.element_ty), STORED)
        _store(values, ptr, first_row, end, half, col, width, stride_m)


@gluon.jit
def _tail_chunk(chunk, output, bias, line, half, col, N, SIZES):
    """Add the bias to a chunk [64 columns, BOX_M rows] of a tail, and store the rows of the tail.

    Returns: the values as they are stored, [BOX_M, 64] in fp32.
    """
    y, act = output
    dtype: gl.constexpr = y.dtype.element_ty if act is None else act.dtype.element_ty
    width = N // SIZES.HALVES
    if bias.ptr is not None:
        offs_n = col + gl.arange(0, 64, gl.SliceLayout(1, chunk.type.layout))
        # int64: an expert index times a stride passes 2**31
        ptrs = bias.ptr + line.e.to(gl.int64) * bias.stride_e
        ptrs += (half * width + offs_n) * bias.stride_n
        chunk += gl.load(ptrs, mask=offs_n < width, other=0.0).to(gl.float32)[:, None]
    rows = gl.convert_layout(chunk.to(dtype).permute([1, 0]), BY_ROWS)
    if y is not None:
        _store(rows, y, line.end, line.tail_end, half, col, width, N)
    return rows.to(gl.float32)


@gluon.jit
def store_tail(left, right, output, bias, line, N, HALF: gl.constexpr, SIZES, ACT):
    """Store the two column chunks of a tail that this consumer has, and their activation."""
    _, act = output
    if SIZES.HALVES == 2:
        # the left half of the tile is gate, the right half is up
        col = line.n * 128 + 64 * HALF
        gate = _tail_chunk(left, output, bias, line, 0, col, N, SIZES)
        up = _tail_chunk(right, output, bias, line, 1, col, N, SIZES)
        result = activate(gate, up, ACT).to(act.dtype.element_ty)
        _store(result, act, line.end, line.tail_end, 0, col, N // 2, N // 2)
    else:
        chunks = left, right
        for i in gl.static_range(2):
            col = line.n * BLOCK_N + 128 * i + 64 * HALF
            rows = _tail_chunk(chunks[i], output, bias, line, 0, col, N, SIZES)
            if ACT.GATED:
                gate, up = rows.reshape([BOX_M, 32, 2]).split()
                result = activate(gate, up, ACT).to(act.dtype.element_ty)
                _store(result, act, line.end, line.tail_end, 0, col // 2, N // 2, N // 2)
            elif ACT.KIND is not None:
                result = activate_plain(rows, ACT).to(act.dtype.element_ty)
                _store(result, act, line.end, line.tail_end, 0, col, N, N)


@gluon.jit
def _store_columns(sums, output, line, col, N, ACT):
    """Store the rows before `end` of sums [64, 128] of a tile without halves, and their activation,
    from column `col` on.
    """
    y, act = output
    dtype: gl.constexpr = y.dtype.element_ty if act is None else act.dtype.element_ty
    _, first_row, end, _, _ = line
    chunks = halves(sums, HALF_M, 64)
    for j in gl.static_range(2):
        chunk = chunks[j].to(dtype)
        if y is not None:
            _store_chunk(chunk, y, first_row, end, 0, col + 64 * j, N, N)
        if ACT.KIND is not None and not ACT.GATED:
            result = activate_plain(chunk.to(gl.float32), ACT)
            _store_chunk(result, act, first_row, end, 0, col + 64 * j, N, N)
    if ACT.KIND is not None and ACT.GATED:
        gate, up = sums.to(dtype).to(gl.float32).reshape([HALF_M, 64, 2]).split()
        result = activate(gate, up, ACT)
        _store_chunk(result, act, first_row, end, 0, col // 2, N // 2, N // 2)


@gluon.jit
def store_half(acc, output, line, N, SIZES, ACT):
    """Store the rows before `end` of a half, and their activation."""
    y, act = output
    dtype: gl.constexpr = y.dtype.element_ty if act is None else act.dtype.element_ty
    _, first_row, end, _, n = line
    if SIZES.HALVES == 2:
        # the left half of the tile is gate, the right half is up: two chunks of each
        left, right = halves(acc, HALF_M, 128)
        gates = halves(left, HALF_M, 64)
        ups = halves(right, HALF_M, 64)
        I = N // 2  # noqa: E741
        for i in gl.static_range(2):
            col = n * 128 + i * 64
            gate = gates[i].to(dtype)
            up = ups[i].to(dtype)
            if y is not None:
                _store_chunk(gate, y, first_row, end, 0, col, I, N)
                _store_chunk(up, y, first_row, end, 1, col, I, N)
            result = activate(gate.to(gl.float32), up.to(gl.float32), ACT)
            _store_chunk(result, act, first_row, end, 0, col, I, I)
    elif acc.shape[1] == BLOCK_N:
        left, right = halves(acc, HALF_M, 128)
        # right first: else the compiler merges this code with that of a narrow tile, and waits for
        # each product of a narrow tile before the next one
        _store_columns(right, output, line, n * BLOCK_N + 128, N, ACT)
        _store_columns(left, output, line, n * BLOCK_N, N, ACT)
    else:
        _store_columns(acc, output, line, n * BLOCK_N, N, ACT)
