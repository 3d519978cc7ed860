"""rows[m] = 0 for every row m from expert_offsets[E] on: the rows of sentinels.

Without sentinels the programs end at once, and no row is written.
"""

import torch
import triton
import triton.language as tl

from ..routing import Routing
from .launching.launch import facts, launch
from .launching.table import device_facts, find

# programs on each multiprocessor
PER_SM = 4


@triton.jit(do_not_specialize=["M"])
def _zero_unrouted_kernel(rows_ptr, expert_offsets_ptr, M, E, N, BLOCK_N: tl.constexpr):
    """Grid [programs]: one row each, then the row that lies as many rows further as programs."""
    # int64: a row times N passes 2**31
    first = tl.load(expert_offsets_ptr + E).to(tl.int64)
    for m in tl.range(first + tl.program_id(0), M, tl.num_programs(0)):
        row_ptr = rows_ptr + m * N
        for n in range(0, N, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            zeros = tl.zeros((BLOCK_N,), dtype=rows_ptr.dtype.element_ty)
            tl.store(row_ptr + offs_n, zeros, mask=offs_n < N)


def zero_unrouted(rows: torch.Tensor, routing: Routing) -> torch.Tensor:
    """rows[m] = 0, in place, for the rows of sentinels.

    Args:
        rows: [M, N] float rows in expert order, contiguous.
    Returns: rows.
    Twin: `reference.zero_unrouted`.
    """
    assert rows.is_contiguous(), "a row is N elements after the row before it"
    if rows.numel() == 0:
        return rows
    M, N = rows.shape
    E = routing.num_experts
    offsets = routing.expert_offsets
    arch, multiprocessors = device_facts(rows.device)

    def arguments() -> tuple[tuple, tuple, dict]:
        return (rows, offsets), (E, N), find("combine", arch, rows.element_size(), 16)

    key = "zero_unrouted", facts(rows), E, N
    grid = min(M, PER_SM * multiprocessors), 1, 1
    launch(key, _zero_unrouted_kernel, grid, (rows, offsets), arguments, (M,))
    return rows
