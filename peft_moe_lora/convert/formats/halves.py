"""Gate and up that a file holds apart, joined into one projection of N = 2I rows.

If gate and up share A, the rows of B_gate and B_up become the rows of one B. If they do not, A is
[A_gate; A_up] with twice the rank. In B the rows of gate are then zero in the columns of A_up, and
the rows of up are zero in the columns of A_gate. Nothing is rounded.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..model import Pair

TWICE_THE_RANK = "gate and up have different A: combined exactly, at twice the rank"


class Half(NamedTuple):
    """Gate, up or down of all experts.

    Attributes:
        rank, in_features, out_features: r, K and the rows that this part has.
        scaling: of every expert.
        dtype: of A and B.
        load: returns A [E, r, K] and B [E, n, r].
    """

    rank: int
    in_features: int
    out_features: int
    scaling: float
    dtype: torch.dtype
    load: Callable[[], tuple[torch.Tensor, torch.Tensor]]


def joined(halves: Sequence[Half], rows: Sequence[slice], num_experts: int, same_A: bool) -> Pair:
    """The pair of a projection.

    Args:
        halves: gate and up, with the same sizes and scaling; or the one part that there is.
        rows: the rows of each half in the projection.
        num_experts: E.
        same_A: whether the halves have the same A.
    """
    first = halves[0]
    r = first.rank
    rank = r
    ranks = [slice(0, r)] * len(halves)
    if not same_A:
        rank = 2 * r
        ranks = [slice(0, r), slice(r, 2 * r)]
    N = first.out_features * len(halves)

    def load() -> tuple[torch.Tensor, torch.Tensor]:
        A = torch.empty(num_experts, rank, first.in_features, dtype=first.dtype)
        B = torch.zeros(num_experts, N, rank, dtype=first.dtype)
        for half, half_rows, half_ranks in zip(halves, rows, ranks, strict=True):
            half_A, half_B = half.load()
            A[:, half_ranks] = half_A
            B[:, half_rows, half_ranks] = half_B
        return A, B

    return Pair(
        num_experts=num_experts,
        r=rank,
        in_features=first.in_features,
        out_features=N,
        scaling=first.scaling,
        dtype=first.dtype,
        load=load,
    )
