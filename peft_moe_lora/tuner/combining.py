"""One low-rank update B A out of several: sum of weight_i * scaling_i * B_i A_i, or close to it.

`cat` and `svd` give the sum, `svd` up to its rank. The other kinds prune and sum with the functions
of `peft.utils.merge_utils`, as PEFT does: those that end with `_svd` on the matrices
scaling_i * B_i A_i, the rest on all A_i and on all B_i, which only comes close to the sum.

Legend: r rank of one update, R the sum of ranks, K in- and N out-features.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from torch.nn import functional as F

from ..files.text import quoted

# A [r, K] and B [N, r] of one matrix
Factors = tuple[torch.Tensor, torch.Tensor]

# kinds that prune before they sum -> the function that does both
_PRUNING: dict[str, Callable[..., torch.Tensor]] = {
    "ties": ties,
    "dare_ties": dare_ties,
    "dare_linear": dare_linear,
    "magnitude_prune": magnitude_prune,
}
# of these, the kinds that keep only entries of the majority's sign
_ELECTING = ("ties", "dare_ties")
# kinds that sum all A and all B, and therefore need equal ranks
OF_FACTORS = ("linear", *_PRUNING)
_KINDS = ("svd", "cat", *OF_FACTORS, *(f"{kind}_svd" for kind in _PRUNING))
# rounding error of a decomposition in fp64, divided by the norms of its factors
_NOISE = 1e-14


class Term(NamedTuple):
    """One low-rank update and its share.

    Attributes:
        A: [r, K].
        B: [N, r].
        weight: the share that the caller asked for; may be negative.
        scaling: the adapter's own factor of B A.
    """

    A: torch.Tensor
    B: torch.Tensor
    weight: float
    scaling: float


@dataclass(frozen=True)
class Combination:
    """How updates become one; the fields have PEFT's names and meaning.

    Attributes:
        kind: PEFT's `combination_type`.
        rank: rank of the result.
        density: share of the entries that pruning keeps, in [0, 1].
        majority_sign_method: "total" or "frequency", for ties.
        svd_clamp: quantile at which the entries of a decomposition are clamped.
        svd_full_matrices, svd_driver: as in `torch.linalg.svd`.
    Raises:
        ValueError: if the kind is unknown, or if a value that the kind reads is out of range.
    """

    kind: str
    rank: int
    density: float | None = None
    majority_sign_method: str = "total"
    svd_clamp: float | None = None
    svd_full_matrices: bool = True
    svd_driver: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise ValueError(
                f"Invalid combination_type: {quoted(self.kind)}; it must be one of {_KINDS}."
            )
        pruning = self.kind.removesuffix("_svd")
        density_is_right = isinstance(self.density, int | float) and self.density >= 0
        if pruning in _PRUNING and not density_is_right:
            raise ValueError(
                f"combination_type={self.kind!r} needs density, the share of entries to keep, "
                f"between 0 and 1; got {quoted(self.density)}."
            )
        signs = ("total", "frequency")
        if pruning in _ELECTING and self.majority_sign_method not in signs:
            raise ValueError(
                f"majority_sign_method must be one of {signs}, got "
                f"{quoted(self.majority_sign_method)}."
            )
        clamp = self.svd_clamp
        if self.kind.endswith("svd") and clamp is not None and not 0 <= clamp <= 1:
            raise ValueError(f"svd_clamp is a quantile, from 0 to 1; got {quoted(clamp)}.")

    @torch.no_grad()
    def of(self, terms: Sequence[Term]) -> Factors:
        """The combined update, in at least fp32.

        Args:
            terms: one or more updates of one matrix; for a kind in `OF_FACTORS` of equal ranks.
        Returns: A [rank, K] and B [N, rank]; rows and columns beyond what the terms need are zero.
        Raises:
            ValueError: if the terms need a higher rank.
        """
        terms = [_widened(term) for term in terms]
        if self.kind == "cat":
            A, B = _concatenated(terms)
        elif self.kind.endswith("svd"):
            A, B = self._decomposed(terms)
        else:
            A, B = self._of_factors(terms)
        missing = self.rank - A.shape[0]
        if missing < 0:
            raise ValueError(
                f"combination_type {self.kind} of the adapters needs rank {A.shape[0]}, but their "
                f"configurations say {self.rank}; give peft_config the ranks back with which the "
                "adapters were added."
            )
        return F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing))

    def _of_factors(self, terms: Sequence[Term]) -> Factors:
        shares = [term.weight * term.scaling for term in terms]
        roots = [math.sqrt(abs(share)) for share in shares]
        # A has the sign of the share; in B too, it would cancel
        signed = [math.copysign(root, share) for root, share in zip(roots, shares, strict=True)]
        A = self._summed([term.A for term in terms], signed)
        B = self._summed([term.B for term in terms], roots)
        return A, B

    def _summed(self, tensors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
        """The weighted sum of tensors of one shape, pruned as the kind says."""
        factors = torch.tensor(weights, dtype=tensors[0].dtype, device=tensors[0].device)
        pruning = self.kind.removesuffix("_svd")
        if pruning not in _PRUNING:
            return task_arithmetic(tensors, factors)
        if self.density == 0:
            # PEFT's dare kinds divide by the density
            return torch.zeros_like(tensors[0])
        options: list[float | str | None] = [self.density]
        if pruning in _ELECTING:
            options.append(self.majority_sign_method)
        return _PRUNING[pruning](tensors, factors, *options)

    def _decomposed(self, terms: Sequence[Term]) -> Factors:
        if self.kind == "svd" and self.svd_clamp is None:
            U, S, Vh = self._svd_of_sum(terms)
        else:
            deltas = [term.scaling * (term.B @ term.A) for term in terms]
            delta = self._summed(deltas, [term.weight for term in terms])
            U, S, Vh = torch.linalg.svd(
                delta, full_matrices=self.svd_full_matrices, driver=self.svd_driver
            )
        number = min(self.rank, len(S))
        B = U[:, :number] * S[:number]
        A = Vh[:number]
        if self.svd_clamp is not None:
            entries = torch.cat([B.flatten(), A.flatten()])
            highest = torch.quantile(entries, self.svd_clamp)
            B = B.clamp(-highest, highest)
            A = A.clamp(-highest, highest)
        return A, B

    def _svd_of_sum(self, terms: Sequence[Term]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """U, S, Vh of the sum of all terms, without the matrix [N, K].

        With B = Q_B R_B and A^T = Q_A R_A, B A is Q_B (R_B R_A^T) Q_A^T, and only the small matrix
        in the middle is decomposed. It is computed in fp64. Singular values that are rounding
        errors of the terms are set to zero, so that terms which cancel give zero.
        """
        A, B = _concatenated(terms)
        Q_A, R_A = torch.linalg.qr(A.double().T)
        Q_B, R_B = torch.linalg.qr(B.double())
        # [., R] @ [R, .]
        U, S, Vh = torch.linalg.svd(R_B @ R_A.T, full_matrices=False, driver=self.svd_driver)
        noise = max(torch.finfo(A.dtype).eps, _NOISE) * A.double().norm() * B.double().norm()
        S = torch.where(S > noise, S, 0)
        return (Q_B @ U).to(A.dtype), S.to(A.dtype), (Vh @ Q_A.T).to(A.dtype)


def _widened(term: Term) -> Term:
    dtype = torch.promote_types(term.A.dtype, torch.float32)
    return term._replace(A=term.A.to(dtype), B=term.B.to(dtype))


def _concatenated(terms: Sequence[Term]) -> Factors:
    """A [R, K] and B [N, R], whose product is the sum of all terms."""
    A = torch.cat([term.A * (term.weight * term.scaling) for term in terms], dim=0)
    B = torch.cat([term.B for term in terms], dim=1)
    return A, B
