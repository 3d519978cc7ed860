"""How rows of rank r are stored: x A^T, and B^T dy.

Kernels copy 16 bytes at a time, so the rows begin at multiples of 16 bytes. For that they get
columns of zeros after their r columns. A and B themselves have no such zeros.
"""

import torch
import torch.nn.functional as F


def stored_rank(r: int) -> int:
    """Columns R of a tensor with rows of rank r: 8, or a multiple of 16; 0 for rank 0."""
    if r <= 8:
        return 8 * min(r, 1)
    return -(-r // 16) * 16


def as_stored_rank(rows: torch.Tensor) -> torch.Tensor:
    """Rows [M, r] with zeros after their r columns: [M, R]."""
    r = rows.shape[1]
    return F.pad(rows, (0, stored_rank(r) - r))


def of_rank(rows: torch.Tensor, r: int) -> torch.Tensor:
    """The r columns [M, r] of stored rows [M, R].

    Raises:
        AssertionError: if the rows are not those of rank r.
    """
    assert rows.shape[1] == stored_rank(r), f"rows of rank {r} have {rows.shape[1]} columns"
    return rows[:, :r]


def check_columns(rows: torch.Tensor, n: int) -> None:
    """Check that rows [M, K] have n columns, or are stored rows of rank n.

    Raises:
        AssertionError: if they are neither.
    """
    K = rows.shape[1]
    assert K in (n, stored_rank(n)), f"{n} columns are needed, or {stored_rank(n)}; got {K}"
