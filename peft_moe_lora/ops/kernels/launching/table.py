"""Which block sizes a kernel runs with: rows of a table, chosen by rule, never searched at run time.

A row holds for its operation, architecture and newer ones, element size, and tiles of at least `block_m` rows; a
kernel in one architecture's own instructions, named in `EXACT`, for that architecture alone. Compute capability 12.x
has the shared memory of 8.6 and 8.9, 99 KiB a block, and neither 9.0's nor 10.0's products: of older rows it takes
those of 8.x.
"""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        op: the operation's name without "expert_"; one that ends in "_gathered" goes before the plain one for
            gathered rows, one that ends in "_short" for a short K.
        arch: compute capability times ten, 0 for the interpreter.
        itemsize: bytes of one element of x.
        block_m: rows of a tile, as `block_m_for` chose them.
        blocks: the kernel's constexprs and num_warps, num_stages.
        source: machine and date of the measurement.
    """

    op: str
    arch: int
    itemsize: int
    block_m: int
    blocks: dict
    source: str


def _row(op, arch, itemsize, block_m, source, num_warps, num_stages, **blocks):
    return Row(
        op,
        arch,
        itemsize,
        block_m,
        {**blocks, "num_warps": num_warps, "num_stages": num_stages},
        source,
    )


_SAFE = "chosen to compile without spills, not timed"
_H200, _H200_22, _H200_24 = (f"NVIDIA H200, 2026-11-{day}" for day in (21, 22, 24))
_TINY = "small, so that tiny shapes have edges"
# GROUP: row tiles that share a weight tile, of small, middling and large experts; None: no row for these
_BY_2_16, _BY_2_8 = (2, 2, 16), (2, 2, 8)
_POINTERS = {"DESCRIPTOR": False, "PER_SM": 1, "TAIL": False, "GROUP": _BY_2_16}
_TMA = {"DESCRIPTOR": True, "PER_SM": 1}
_ROLES = {**_TMA, "STAGES": 4, "maxnreg": 168}
# wgmma is sm_90's alone
EXACT = frozenset({"linear_roles", "linear_roles_gathered", "shrink_outer", "act_backward_outer"})
TABLE = (
    # the interpreter
    _row(
        "linear", 0, 2, 16, _TINY, 1, 1, BLOCK_N=16, BLOCK_K=32, **_TMA, TAIL=False, GROUP=_BY_2_16
    ),
    _row(
        "linear_act",
        0,
        2,
        16,
        _TINY,
        1,
        1,
        BLOCK_N=32,
        BLOCK_K=32,
        **_TMA,
        TAIL=False,
        GROUP=_BY_2_16,
    ),
    _row(
        "linear",
        0,
        2,
        32,
        _TINY,
        1,
        1,
        BLOCK_N=32,
        BLOCK_K=16,
        DESCRIPTOR=False,
        PER_SM=1,
        TAIL=True,
        GROUP=_BY_2_16,
    ),
    _row(
        "linear_act",
        0,
        2,
        32,
        _TINY,
        1,
        1,
        BLOCK_N=32,
        BLOCK_K=16,
        DESCRIPTOR=False,
        PER_SM=1,
        TAIL=True,
        GROUP=_BY_2_16,
    ),
    _row("linear_4bit", 0, 2, 16, _TINY, 1, 1, BLOCK_N=16, BLOCK_K=64, **_POINTERS),
    _row("linear_4bit", 0, 2, 32, _TINY, 1, 1, BLOCK_N=64, BLOCK_K=32, **_POINTERS),
    _row("linear_act_4bit", 0, 2, 16, _TINY, 1, 1, BLOCK_N=32, BLOCK_K=128, **_POINTERS),
    _row("linear_ordered", 0, 2, 16, _TINY, 1, 1, BLOCK_N=16, BLOCK_K=32, **_TMA, GROUP=_BY_2_16),
    _row("shrink", 0, 2, 16, _TINY, 1, 1, BLOCK_M=16, BLOCK_K=32),
    _row("outer", 0, 2, 16, _TINY, 1, 1, BLOCK_M=16, BLOCK_WIDE=32),
    _row("act_backward", 0, 2, 16, _TINY, 1, 1, BLOCK_M=16, BLOCK_I=16),
    _row("combine", 0, 2, 16, _TINY, 1, 1, BLOCK_N=16),
    _row("dequantize", 0, 2, 16, _TINY, 1, 1, BLOCK=512),
    # 2-byte elements, from sm_80 on: pointer loads. maxnreg: unasked, the compiler of triton 3.6 takes fewer registers
    # and spills, so that one more program fits
    _row("act_backward", 80, 2, 16, _SAFE, 4, 1, BLOCK_M=8, BLOCK_I=256),
    _row("combine", 80, 2, 16, _SAFE, 4, 1, BLOCK_N=1024),
    _row("dequantize", 80, 2, 16, _SAFE, 4, 1, BLOCK=4096),
    _row("dequantize", 80, 4, 16, _SAFE, 4, 1, BLOCK=2048),
    _row("linear", 80, 2, 16, _SAFE, 4, 3, BLOCK_N=128, BLOCK_K=64, **_POINTERS),
    _row("linear_act", 80, 2, 16, _SAFE, 4, 3, BLOCK_N=128, BLOCK_K=64, **_POINTERS),
    _row("linear", 80, 2, 64, _SAFE, 8, 3, BLOCK_N=128, BLOCK_K=64, **_POINTERS),
    _row("linear_act", 80, 2, 64, _SAFE, 8, 3, BLOCK_N=128, BLOCK_K=64, **_POINTERS),
    # many small programs: each loads but one tile ahead
    _row(
        "linear_4bit", 80, 2, 16, _SAFE, 4, 1, BLOCK_N=64, BLOCK_K=64, **_POINTERS | {"PER_SM": 4}
    ),
    _row(
        "linear_act_4bit",
        80,
        2,
        16,
        _SAFE,
        4,
        1,
        BLOCK_N=64,
        BLOCK_K=64,
        **_POINTERS | {"PER_SM": 4},
    ),
    _row(
        "linear_4bit",
        80,
        2,
        32,
        _SAFE,
        4,
        1,
        BLOCK_N=64,
        BLOCK_K=32,
        **_POINTERS | {"PER_SM": 4},
        maxnreg=128,
    ),
    _row(
        "linear_act_4bit",
        80,
        2,
        32,
        _SAFE,
        4,
        1,
        BLOCK_N=64,
        BLOCK_K=32,
        **_POINTERS | {"PER_SM": 4},
    ),
    _row("shrink", 80, 2, 16, _SAFE, 4, 3, BLOCK_M=64, BLOCK_K=64),
    _row("outer", 80, 2, 16, _SAFE, 8, 3, BLOCK_M=32, BLOCK_WIDE=128, maxnreg=128),
    _row("act_backward", 80, 4, 16, _SAFE, 4, 1, BLOCK_M=4, BLOCK_I=256),
    _row("combine", 80, 4, 16, _SAFE, 4, 1, BLOCK_N=512),
    # 4-byte elements: IEEE products run on the FMA units, so small tiles
    _row("linear", 80, 4, 16, _SAFE, 4, 2, BLOCK_N=64, BLOCK_K=32, **_POINTERS),
    _row("linear_act", 80, 4, 16, _SAFE, 4, 2, BLOCK_N=64, BLOCK_K=32, **_POINTERS),
    _row("linear", 80, 4, 64, _SAFE, 8, 2, BLOCK_N=64, BLOCK_K=32, **_POINTERS),
    _row("linear_act", 80, 4, 64, _SAFE, 8, 2, BLOCK_N=64, BLOCK_K=32, **_POINTERS),
    _row("shrink", 80, 4, 16, _SAFE, 4, 2, BLOCK_M=32, BLOCK_K=32),
    _row("outer", 80, 4, 16, _SAFE, 4, 2, BLOCK_M=32, BLOCK_WIDE=64),
    # 2-byte elements, from sm_90 on: the weight comes by tensor descriptor
    _row(
        "linear",
        90,
        2,
        16,
        _SAFE,
        4,
        4,
        BLOCK_N=128,
        BLOCK_K=64,
        **_TMA,
        TAIL=False,
        GROUP=_BY_2_16,
    ),
    _row(
        "linear_act",
        90,
        2,
        16,
        _SAFE,
        4,
        4,
        BLOCK_N=128,
        BLOCK_K=64,
        **_TMA,
        TAIL=False,
        GROUP=_BY_2_16,
    ),
    _row(
        "linear",
        90,
        2,
        64,
        _H200,
        4,
        4,
        BLOCK_N=128,
        BLOCK_K=64,
        **_TMA | {"PER_SM": 2},
        TAIL=False,
        GROUP=(8, 8, 16),
    ),
    _row(
        "linear_act",
        90,
        2,
        64,
        _H200,
        4,
        4,
        BLOCK_N=128,
        BLOCK_K=64,
        **_TMA | {"PER_SM": 2},
        TAIL=True,
        GROUP=(4, 4, 16),
    ),
    _row(
        "linear",
        90,
        2,
        128,
        _H200,
        8,
        4,
        BLOCK_N=256,
        BLOCK_K=64,
        **_TMA,
        TAIL=False,
        GROUP=_BY_2_8,
    ),
    _row(
        "linear_gathered",
        90,
        2,
        64,
        _H200,
        4,
        4,
        BLOCK_N=256,
        BLOCK_K=64,
        **_TMA,
        TAIL=False,
        GROUP=_BY_2_16,
    ),
    _row(
        "linear_gathered",
        90,
        2,
        128,
        _H200,
        8,
        4,
        BLOCK_N=256,
        BLOCK_K=64,
        **_TMA,
        TAIL=True,
        GROUP=_BY_2_8,
    ),
    _row(
        "linear_act",
        90,
        2,
        128,
        _H200,
        8,
        4,
        BLOCK_N=256,
        BLOCK_K=64,
        **_TMA,
        TAIL=True,
        GROUP=_BY_2_8,
    ),
    _row(
        "linear_ordered", 90, 2, 128, _H200, 8, 4, BLOCK_N=256, BLOCK_K=64, **_TMA, GROUP=_BY_2_16
    ),
    # maxnreg: of three groups of four warps; the warps that load leave all but so many to the eight that multiply
    _row(
        "linear_roles",
        90,
        2,
        128,
        _H200,
        4,
        1,
        MAX_K=8192,
        **_ROLES,
        PRODUCER=40,
        CONSUMER=232,
        GROUP=(1, 12, 16),
    ),
    _row(
        "linear_roles_gathered",
        90,
        2,
        128,
        _H200,
        4,
        1,
        MAX_K=8192,
        **_ROLES,
        PRODUCER=56,
        CONSUMER=224,
        GROUP=(1, 8, None),
    ),
    _row("shrink", 90, 2, 16, _H200, 4, 3, BLOCK_M=64, BLOCK_K=128),
    _row("shrink_short", 90, 2, 16, _H200, 4, 2, BLOCK_M=64, BLOCK_K=64),
    _row("outer", 90, 2, 16, _H200, 4, 3, BLOCK_M=64, BLOCK_WIDE=128),
    _row("outer_gathered", 90, 2, 16, _H200_22, 4, 3, BLOCK_M=32, BLOCK_WIDE=256),
    _row("act_backward_outer", 90, 2, 64, _H200_24, 8, 1, maxnreg=128),
    _row("shrink_outer", 90, 2, 64, _H200_24, 4, 1, ROWS=128, TAIL=64, STAGES=2),
    _row("shrink_outer", 90, 2, 128, _H200_24, 4, 1, ROWS=256, TAIL=64, STAGES=2),
    _row("act_backward", 90, 2, 16, _H200, 4, 1, BLOCK_M=4, BLOCK_I=256),
    _row("combine", 90, 2, 16, _H200, 2, 1, BLOCK_N=1024),
    # 2-byte elements, from sm_100 on: its tensor cores' sums pass through registers once they are done
    _row(
        "linear",
        100,
        2,
        128,
        _SAFE,
        8,
        3,
        BLOCK_N=128,
        BLOCK_K=64,
        **_TMA,
        TAIL=False,
        GROUP=_BY_2_16,
    ),
    _row(
        "linear_gathered",
        100,
        2,
        128,
        _SAFE,
        8,
        3,
        BLOCK_N=128,
        BLOCK_K=64,
        **_TMA,
        TAIL=False,
        GROUP=_BY_2_16,
    ),
    _row(
        "linear_act",
        100,
        2,
        128,
        _SAFE,
        8,
        3,
        BLOCK_N=128,
        BLOCK_K=64,
        **_TMA,
        TAIL=False,
        GROUP=_BY_2_16,
    ),
    _row(
        "linear_ordered", 100, 2, 128, _SAFE, 8, 3, BLOCK_N=128, BLOCK_K=64, **_TMA, GROUP=_BY_2_16
    ),
    # where rows of sm_80 would spill
    _row("dequantize", 100, 2, 16, _SAFE, 4, 1, BLOCK=2048),
    _row("linear", 120, 2, 64, _SAFE, 8, 4, BLOCK_N=128, BLOCK_K=32, **_POINTERS),
    _row("linear_act", 120, 2, 64, _SAFE, 8, 4, BLOCK_N=128, BLOCK_K=32, **_POINTERS),
)


def block_m_for(num_rows: int, num_experts: int, arch: int) -> int:
    """Rows of a tile: about half of what one expert gets when the routing is even, from 16 to 128."""
    rows = num_rows / num_experts
    if arch == 0:
        return 16 if rows < 16 else 32
    return 128 if rows >= 192 else 64 if rows >= 48 else 32 if rows >= 24 else 16


@cache
def lookup(op: str, arch: int, itemsize: int, block_m: int) -> dict | None:
    """The constexprs of `op`: the row of the newest architecture, then of the largest block_m, that fit; or None."""
    if arch == 0:
        itemsize = 2
    rows = [row for row in TABLE if row.op == op and row.itemsize == itemsize and row.arch <= arch]
    rows = [row for row in rows if arch < 120 or not 90 <= row.arch < 120]
    # the interpreter's rows are its own
    rows = [row for row in rows if (row.arch == 0) == (arch == 0) and row.block_m <= block_m]
    rows = [row for row in rows if row.arch == arch or op not in EXACT]
    if not rows and op.endswith(("_gathered", "_short")):
        return lookup(op.rpartition("_")[0], arch, itemsize, block_m)
    return max(rows, key=lambda row: (row.arch, row.block_m)).blocks if rows else None


def find(op: str, arch: int, itemsize: int, block_m: int) -> dict:
    """`lookup`, where there has to be a row."""
    blocks = lookup(op, arch, itemsize, block_m)
    if blocks is None:
        raise ValueError(
            f"no configuration of {op} for compute capability {arch / 10} and {itemsize}-byte elements."
        )
    return blocks


@cache
def _cuda_facts(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def device_facts(device: torch.device) -> tuple[int, int]:
    """(compute capability times ten, multiprocessors); (0, 3) in the interpreter."""
    if device.type != "cuda":
        return 0, 3
    return _cuda_facts(torch.cuda.current_device() if device.index is None else device.index)


def dot_precision(dtype: torch.dtype) -> str:
    """The `input_precision` of products: IEEE for fp32 unless torch allows TF32."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def padded_rank(r: int) -> int:
    """r as a tile's width: a power of two, at least the 16 that a product of tiles takes."""
    return max(16, power_of_2(r))


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n and 1."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)
