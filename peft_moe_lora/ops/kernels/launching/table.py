"""The block sizes of each kernel: rows of a table, chosen by rule; there is no autotuning.

A row applies to one operation and one element size, on its architecture and on newer ones, for
tiles of at least its `block_m` rows. If several rows apply, the row of the newest architecture is
used, and of these the row with the largest `block_m`. The kernels in `EXACT` use instructions that
only one architecture has, so their rows apply to that architecture alone.

Compute capability 12.x has only 99 KiB of shared memory a block, like 8.6 and 8.9, and has neither
the matrix instructions of 9.0 nor those of 10.0. So it uses its own rows and those of 8.x.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        op: the operation's name without "expert_". A name that ends in "_gathered" is for gathered
            rows, and one that ends in "_short" for a short K. If there is no such row, the row of
            the plain name is used. "outer_many" is for many ranks, and has no other row.
        arch: compute capability times ten, 0 for the interpreter.
        itemsize: bytes of one element of x.
        block_m: the row applies to tiles of at least this many rows (`block_m_for`).
        blocks: the kernel's constexprs, and num_warps and num_stages.
        source: machine and date of the measurement.
    """

    op: str
    arch: int
    itemsize: int
    block_m: int
    blocks: dict[str, Any]
    source: str


def _row(
    op: str,
    arch: int,
    itemsize: int,
    block_m: int,
    source: str,
    num_warps: int,
    num_stages: int,
    **blocks: Any,
) -> Row:
    blocks |= {"num_warps": num_warps, "num_stages": num_stages}
    return Row(op, arch, itemsize, block_m, blocks, source)


_SAFE = "chosen to compile without spills, not timed"
_TINY = "small, so that tiny shapes have edges"
_H200 = "NVIDIA H200, 2026-11-21"
_H200_22 = "NVIDIA H200, 2026-11-22"
_H200_24 = "NVIDIA H200, 2026-11-24"
_H200_30 = "NVIDIA H200, 2026-11-30"
# GROUP: number of row tiles that use a weight tile before the next weight tile is read; one number
# each for experts with small, middle-sized and large weights (`tiles.tile.EXPERT_BYTES`). None: the
# row does not apply to such experts
_BY_2_16 = (2, 2, 16)
_BY_2_8 = (2, 2, 8)
# DESCRIPTOR: load the weight by tensor descriptor; PER_SM: programs on each multiprocessor;
# TAIL: compute an expert's last tile with half the rows, if its rows fit into half a tile; for
# shrink_outer, how many more rows than ROWS a chunk may have. RANKS: the most columns of xa that a
# program of shrink computes
_POINTERS = {"DESCRIPTOR": False, "PER_SM": 1, "TAIL": False, "GROUP": _BY_2_16}
_SMALL_PROGRAMS = _POINTERS | {"PER_SM": 4}
_TMA = {"DESCRIPTOR": True, "PER_SM": 1}
_TMA_TWICE = _TMA | {"PER_SM": 2}
_ROLES = _TMA | {"STAGES": 4, "maxnreg": 168}
# blocks of a row that are no constexprs of its kernel
OPTIONS = ("num_warps", "num_stages", "maxnreg")
# these kernels use wgmma, which only compute capability 9.0 has
EXACT = frozenset({"linear_roles", "linear_roles_gathered", "shrink_outer", "act_backward_outer"})
# fmt: off
TABLE = (
    # op, arch, itemsize, block_m, source, num_warps, num_stages, constexprs
    # Triton's interpreter
    _row("linear", 0, 2, 16, _TINY, 1, 1, BLOCK_N=16, BLOCK_K=32, **_TMA, TAIL=False, GROUP=_BY_2_16),
    _row("linear_act", 0, 2, 16, _TINY, 1, 1, BLOCK_N=32, BLOCK_K=32, **_TMA, TAIL=False, GROUP=_BY_2_16),
    _row("linear", 0, 2, 32, _TINY, 1, 1, BLOCK_N=32, BLOCK_K=16, DESCRIPTOR=False, PER_SM=1, TAIL=True, GROUP=_BY_2_16),
    _row("linear_act", 0, 2, 32, _TINY, 1, 1, BLOCK_N=32, BLOCK_K=16, DESCRIPTOR=False, PER_SM=1, TAIL=True, GROUP=_BY_2_16),
    _row("linear_4bit", 0, 2, 16, _TINY, 1, 1, BLOCK_N=16, BLOCK_K=64, **_POINTERS),
    _row("linear_4bit", 0, 2, 32, _TINY, 1, 1, BLOCK_N=64, BLOCK_K=32, **_POINTERS),
    _row("linear_act_4bit", 0, 2, 16, _TINY, 1, 1, BLOCK_N=32, BLOCK_K=128, **_POINTERS),
    _row("linear_ordered", 0, 2, 16, _TINY, 1, 1, BLOCK_N=16, BLOCK_K=32, **_TMA, GROUP=_BY_2_16),
    _row("shrink", 0, 2, 16, _TINY, 1, 1, BLOCK_M=16, BLOCK_K=32, RANKS=16),
    _row("shrink", 0, 2, 32, _TINY, 1, 1, BLOCK_M=16, BLOCK_K=32, RANKS=256),
    _row("outer", 0, 2, 16, _TINY, 1, 1, BLOCK_M=16, BLOCK_WIDE=32),
    _row("add_low_rank", 0, 2, 16, _TINY, 1, 1, BLOCK_M=16, BLOCK_K=32, BLOCK_N=32),
    _row("act_backward", 0, 2, 16, _TINY, 1, 1, BLOCK_M=16, BLOCK_I=16),
    _row("combine", 0, 2, 16, _TINY, 1, 1, BLOCK_N=16),
    _row("dequantize", 0, 2, 16, _TINY, 1, 1, BLOCK=512),
    # 2-byte elements, from 8.0 on: loads by pointers. Without the maxnreg that some rows give, the
    # compiler of Triton 3.6 would use fewer registers, for higher occupancy, and spill
    _row("act_backward", 80, 2, 16, _SAFE, 4, 1, BLOCK_M=8, BLOCK_I=256),
    _row("add_low_rank", 80, 2, 16, _SAFE, 4, 3, BLOCK_M=16, BLOCK_K=128, BLOCK_N=128, maxnreg=128),
    _row("add_low_rank", 80, 2, 32, _SAFE, 4, 3, BLOCK_M=32, BLOCK_K=128, BLOCK_N=128),
    _row("add_low_rank", 80, 2, 64, _SAFE, 8, 3, BLOCK_M=64, BLOCK_K=64, BLOCK_N=64),
    _row("combine", 80, 2, 16, _SAFE, 4, 1, BLOCK_N=1024),
    _row("dequantize", 80, 2, 16, _SAFE, 4, 1, BLOCK=4096),
    _row("dequantize", 80, 4, 16, _SAFE, 4, 1, BLOCK=2048),
    _row("linear", 80, 2, 16, _SAFE, 4, 3, BLOCK_N=128, BLOCK_K=64, **_POINTERS),
    _row("linear_act", 80, 2, 16, _SAFE, 4, 3, BLOCK_N=128, BLOCK_K=64, **_POINTERS),
    _row("linear", 80, 2, 64, _SAFE, 8, 3, BLOCK_N=128, BLOCK_K=64, **_POINTERS),
    _row("linear_act", 80, 2, 64, _SAFE, 8, 3, BLOCK_N=128, BLOCK_K=64, **_POINTERS),
    # many small programs; each loads only one tile ahead
    _row("linear_4bit", 80, 2, 16, _SAFE, 4, 1, BLOCK_N=64, BLOCK_K=64, **_SMALL_PROGRAMS),
    _row("linear_act_4bit", 80, 2, 16, _SAFE, 4, 1, BLOCK_N=64, BLOCK_K=64, **_SMALL_PROGRAMS),
    _row("linear_4bit", 80, 2, 32, _SAFE, 4, 1, BLOCK_N=64, BLOCK_K=32, **_SMALL_PROGRAMS, maxnreg=128),
    _row("linear_act_4bit", 80, 2, 32, _SAFE, 4, 1, BLOCK_N=64, BLOCK_K=32, **_SMALL_PROGRAMS),
    _row("shrink", 80, 2, 16, _SAFE, 4, 3, BLOCK_M=64, BLOCK_K=64, RANKS=256),
    _row("outer", 80, 2, 16, _SAFE, 8, 3, BLOCK_M=32, BLOCK_WIDE=128, maxnreg=128),
    _row("act_backward", 80, 4, 16, _SAFE, 4, 1, BLOCK_M=4, BLOCK_I=256),
    _row("add_low_rank", 80, 4, 16, _SAFE, 4, 2, BLOCK_M=16, BLOCK_K=32, BLOCK_N=32),
    _row("combine", 80, 4, 16, _SAFE, 4, 1, BLOCK_N=512),
    # 4-byte elements: IEEE fp32 products run on the FMA units, so tiles are small
    _row("linear", 80, 4, 16, _SAFE, 4, 2, BLOCK_N=64, BLOCK_K=32, **_POINTERS),
    _row("linear_act", 80, 4, 16, _SAFE, 4, 2, BLOCK_N=64, BLOCK_K=32, **_POINTERS),
    _row("linear", 80, 4, 64, _SAFE, 8, 2, BLOCK_N=64, BLOCK_K=32, **_POINTERS | {"TAIL": True}),
    _row("linear_act", 80, 4, 64, _SAFE, 8, 2, BLOCK_N=64, BLOCK_K=32, **_POINTERS | {"TAIL": True}),
    _row("shrink", 80, 4, 16, _SAFE, 4, 2, BLOCK_M=32, BLOCK_K=32, RANKS=256),
    _row("outer", 80, 4, 16, _SAFE, 4, 2, BLOCK_M=32, BLOCK_WIDE=64),
    # 2-byte elements, from 9.0 on: the weight is loaded by tensor descriptor
    _row("linear", 90, 2, 16, _H200_30, 4, 3, BLOCK_N=128, BLOCK_K=128, **_TMA_TWICE, TAIL=False, GROUP=_BY_2_16),
    _row("linear_act", 90, 2, 16, _H200_30, 4, 3, BLOCK_N=128, BLOCK_K=128, **_TMA_TWICE, TAIL=False, GROUP=_BY_2_16),
    _row("linear", 90, 2, 64, _H200, 4, 4, BLOCK_N=128, BLOCK_K=64, **_TMA_TWICE, TAIL=False, GROUP=(8, 8, 16)),
    _row("linear_act", 90, 2, 64, _H200, 4, 4, BLOCK_N=128, BLOCK_K=64, **_TMA_TWICE, TAIL=True, GROUP=(4, 4, 16)),
    _row("linear", 90, 2, 128, _H200, 8, 4, BLOCK_N=256, BLOCK_K=64, **_TMA, TAIL=False, GROUP=_BY_2_8),
    _row("linear_gathered", 90, 2, 64, _H200, 4, 4, BLOCK_N=256, BLOCK_K=64, **_TMA, TAIL=False, GROUP=_BY_2_16),
    _row("linear_gathered", 90, 2, 128, _H200, 8, 4, BLOCK_N=256, BLOCK_K=64, **_TMA, TAIL=True, GROUP=_BY_2_8),
    _row("linear_act", 90, 2, 128, _H200, 8, 4, BLOCK_N=256, BLOCK_K=64, **_TMA, TAIL=True, GROUP=_BY_2_8),
    _row("linear_ordered", 90, 2, 128, _H200, 8, 4, BLOCK_N=256, BLOCK_K=64, **_TMA, GROUP=_BY_2_16),
    # all 12 warps start with maxnreg registers a thread. Then the warps that load reduce this
    # number to PRODUCER, and the eight warps that multiply raise it to CONSUMER
    _row("linear_roles", 90, 2, 128, _H200, 4, 1, MAX_K=8192, **_ROLES, PRODUCER=40, CONSUMER=232, GROUP=(1, 12, 16)),
    _row("linear_roles_gathered", 90, 2, 128, _H200, 4, 1, MAX_K=8192, **_ROLES, PRODUCER=56, CONSUMER=224, GROUP=(1, 8, None)),
    # with few rows a program waits for A alone, so it loads several large tiles of A ahead
    _row("shrink", 90, 2, 16, _H200_30, 4, 4, BLOCK_M=16, BLOCK_K=256, RANKS=16),
    _row("shrink", 90, 2, 64, _H200, 4, 3, BLOCK_M=64, BLOCK_K=128, RANKS=256),
    _row("shrink_short", 90, 2, 64, _H200, 4, 2, BLOCK_M=64, BLOCK_K=64, RANKS=256),
    _row("outer", 90, 2, 16, _H200, 4, 3, BLOCK_M=64, BLOCK_WIDE=128),
    _row("outer_gathered", 90, 2, 16, _H200_22, 4, 3, BLOCK_M=32, BLOCK_WIDE=256),
    _row("outer_many", 90, 2, 16, _H200_30, 8, 4, BLOCK_M=32, BLOCK_WIDE=128),
    _row("act_backward_outer", 90, 2, 64, _H200_24, 8, 1, maxnreg=128),
    _row("shrink_outer", 90, 2, 64, _H200_24, 4, 1, ROWS=128, TAIL=64, STAGES=2),
    _row("shrink_outer", 90, 2, 128, _H200_24, 4, 1, ROWS=256, TAIL=64, STAGES=2),
    _row("add_low_rank", 90, 2, 16, _H200_30, 4, 3, BLOCK_M=16, BLOCK_K=128, BLOCK_N=128, maxnreg=128),
    _row("add_low_rank", 90, 2, 32, _H200_30, 4, 3, BLOCK_M=32, BLOCK_K=128, BLOCK_N=128),
    _row("add_low_rank", 90, 2, 64, _H200_30, 4, 3, BLOCK_M=64, BLOCK_K=64, BLOCK_N=64),
    _row("act_backward", 90, 2, 16, _H200, 4, 1, BLOCK_M=4, BLOCK_I=256),
    _row("combine", 90, 2, 16, _H200, 2, 1, BLOCK_N=1024),
    # 2-byte elements, from 10.0 on: the tensor cores keep their sums outside of the registers until
    # the end
    _row("linear", 100, 2, 128, _SAFE, 8, 3, BLOCK_N=128, BLOCK_K=64, **_TMA, TAIL=False, GROUP=_BY_2_16),
    _row("linear_gathered", 100, 2, 128, _SAFE, 8, 3, BLOCK_N=128, BLOCK_K=64, **_TMA, TAIL=False, GROUP=_BY_2_16),
    _row("linear_act", 100, 2, 128, _SAFE, 8, 3, BLOCK_N=128, BLOCK_K=64, **_TMA, TAIL=False, GROUP=_BY_2_16),
    _row("linear_ordered", 100, 2, 128, _SAFE, 8, 3, BLOCK_N=128, BLOCK_K=64, **_TMA, GROUP=_BY_2_16),
    # for these operations the rows of 8.0 would spill
    _row("dequantize", 100, 2, 16, _SAFE, 4, 1, BLOCK=2048),
    _row("linear", 120, 2, 64, _SAFE, 8, 4, BLOCK_N=128, BLOCK_K=32, **_POINTERS),
    _row("linear_act", 120, 2, 64, _SAFE, 8, 4, BLOCK_N=128, BLOCK_K=32, **_POINTERS),
)
# fmt: on


def block_m_for(num_rows: int, num_experts: int, arch: int) -> int:
    """Rows of a tile, 16 to 128, by the rows that an expert has when routing is even.

    On compute capability 9.0 large tiles are used early: they read a weight at the same speed, and
    only they have the kernels of `EXACT` (NVIDIA H200, 2026-11-29; docs/performance.md).
    """
    rows = num_rows / num_experts
    if arch == 0:
        return 32 if rows >= 16 else 16
    if arch == 90:
        if rows >= 64:
            return 128
        return 64 if rows >= 12 else 16
    if rows >= 192:
        return 128
    if rows >= 48:
        return 64
    if rows >= 24:
        return 32
    return 16


def chunk_block_m(num_rows: int, num_experts: int) -> int:
    """The block_m of the rows of "shrink_outer" that are used.

    A chunk should hold all rows of most experts, and not many more.
    """
    return 128 if num_rows > 144 * num_experts else 64


def _serves(row: Row, op: str, arch: int, itemsize: int, block_m: int) -> bool:
    """Whether the row applies to this operation, architecture, element size and tile."""
    if row.op != op or row.itemsize != itemsize or row.block_m > block_m:
        return False
    # the interpreter has rows of its own
    if arch == 0 or row.arch == 0 or op in EXACT:
        return row.arch == arch
    if arch >= 120 and 90 <= row.arch < 120:
        return False
    return row.arch <= arch


@cache
def lookup(op: str, arch: int, itemsize: int, block_m: int) -> dict[str, Any] | None:
    """The blocks of the row that is used for `op`, or None if no row applies.

    Args: as the attributes of `Row`. The interpreter uses the same rows for every itemsize.
    """
    if arch == 0:
        itemsize = 2
    rows = [row for row in TABLE if _serves(row, op, arch, itemsize, block_m)]
    if rows:
        return max(rows, key=lambda row: (row.arch, row.block_m)).blocks
    if op.endswith(("_gathered", "_short")):
        plain = op.rpartition("_")[0]
        return lookup(plain, arch, itemsize, block_m)
    return None


def find(op: str, arch: int, itemsize: int, block_m: int) -> dict[str, Any]:
    """`lookup` for an operation that needs a row, because no other kernel can compute it.

    Raises:
        ValueError: if the table has no row for it.
    """
    blocks = lookup(op, arch, itemsize, block_m)
    if blocks is None:
        capability = f"{arch // 10}.{arch % 10}"
        raise ValueError(
            f"{op} needs a row of the table for compute capability {capability} and "
            f"{itemsize}-byte elements, and there is none: use bf16, fp16 or fp32 on a GPU of "
            'compute capability 8.0 or newer, or backend="torch".'
        )
    return blocks


def options_of(blocks: dict[str, Any]) -> dict[str, Any]:
    """The options of a launch among the blocks of a row."""
    return {name: blocks[name] for name in OPTIONS if name in blocks}


@cache
def _cuda_facts(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def device_facts(device: torch.device) -> tuple[int, int]:
    """(compute capability times ten, multiprocessors); (0, 3) in the interpreter."""
    if device.type != "cuda":
        return 0, 3
    if device.index is None:
        return _cuda_facts(torch.cuda.current_device())
    return _cuda_facts(device.index)


def dot_precision(dtype: torch.dtype) -> str:
    """The `input_precision` of products: IEEE for fp32 unless torch allows TF32."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
        return "tf32"
    return "ieee"


def padded_rank(r: int) -> int:
    """r rounded up to a tile's width: a power of two, and at least 16, as `tl.dot` requires."""
    return max(16, power_of_2(r))


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least max(n, 1)."""
    return 1 << max(n - 1, 0).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)
