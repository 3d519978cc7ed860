"""The tile that a program of `linear_roles` computes, and how its K loop is cut into steps.

These numbers cannot be changed: the layouts and the instructions of the kernel depend on them.
"""

from typing import Any, NamedTuple

from triton.experimental.gluon import language as gl

# a tile has two halves of HALF_M rows and BLOCK_N columns; a step of its K loop takes BLOCK_K of K
HALF_M = gl.constexpr(64)
BLOCK_N = gl.constexpr(256)
BLOCK_K = gl.constexpr(64)
# columns of a narrow tile that are multiplied
NARROW_N = gl.constexpr(128)
# rows of x come in TMA boxes of BOX_M rows; BOXES of them hold two halves and a tail
BOX_M = gl.constexpr(32)
BOXES = gl.constexpr(5)
# bytes that a step loads: for the weight's columns, and for each box of rows
COLUMN_BYTES = gl.constexpr(256 * 64 * 2)
BOX_BYTES = gl.constexpr(32 * 64 * 2)
# layout of four warps that copy or store rows of 64 elements, 16 bytes a thread
BY_ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
# layout in which four warps store a chunk [64, 64] of a consumer's sums, 16 bytes a thread. Each
# warp has the same 16 rows as in wgmma's layout, so that only its own threads exchange values
STORED = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [0, 32]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 64],
    )
)


class Stages(NamedTuple):
    """The buffers and mbarriers of the pipeline.

    Attributes:
        halves: rows of x or xa, [2 * STAGES, 64, 64]. tails: [STAGES, 32, 64].
        columns: of the weight or of B, [STAGES, 256, 64] if K_UNIT, else [STAGES, 64, 256].
        full, empty: mbarriers, as in `pipeline`.
    """

    halves: Any
    tails: Any
    columns: Any
    full: Any
    empty: Any


class Line(NamedTuple):
    """An output tile as a consumer sees it.

    Attributes:
        e: the expert.
        first_row, end: rows of this consumer's half; the rows of a full tile end at `end`.
        tail_end: end of the tail; `end` if there is none.
        n: the column tile.
    """

    e: Any
    first_row: Any
    end: Any
    tail_end: Any
    n: Any


class Sizes(NamedTuple):
    """Constants of the kernel.

    Attributes:
        P: probability of dropout. The low-rank steps come first if it is not 0.
        TAILS: whether tails are multiplied together with full tiles.
        GATHER: whether rows of x are gathered. EVEN_K: whether K is a multiple of BLOCK_K.
        HALVES: 2 if a tile holds the same 128 columns of a gate half and of an up half, else 1.
        NARROW: whether the last column tile of a row tile is narrow.
        R_STEPS: steps of the low-rank term. R_WIDTH: columns that each of them multiplies.
        K_UNIT: whether adjacent values of the weight lie along K.
        STAGES: of the pipeline. GROUP: as in `tiles.tile.position`.
        PRODUCER, CONSUMER: registers of a thread that loads, and of one that multiplies.
    """

    P: Any
    TAILS: Any
    GATHER: Any
    EVEN_K: Any
    HALVES: Any
    NARROW: Any
    R_STEPS: Any
    R_WIDTH: Any
    K_UNIT: Any
    STAGES: Any
    GROUP: Any
    PRODUCER: Any
    CONSUMER: Any
