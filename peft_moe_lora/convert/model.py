"""An adapter, independent of its format: A[e] [r, K], B[e] [N, r] and a scaling per projection.

    W[e] + scaling * B[e] A[e]          for every expert e of a projection of an experts module

A tensor is loaded only when it is written. At that moment its rank is padded and its scaling is
folded into B, if needed.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ..files.tensor_file import Tensors
from .base import BaseModel


@dataclass(frozen=True)
class Pair:
    """The update of one projection of one experts module.

    Attributes:
        num_experts, r, in_features, out_features: E, r, K, N.
        scaling: the factor of B[e] A[e].
        dtype: dtype of A and B.
        load: returns A [E, r, K] and B [E, N, r].
        chosen: ascending ids of the experts that have an update, or None for all. For the other
            experts `load` returns zeros.
    """

    num_experts: int
    r: int
    in_features: int
    out_features: int
    scaling: float
    dtype: torch.dtype
    load: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    chosen: tuple[int, ...] | None = None

    @property
    def experts(self) -> Sequence[int]:
        """Ascending ids of the experts that have an update."""
        if self.chosen is None:
            return range(self.num_experts)
        return self.chosen

    def padded(self, r: int) -> "Pair":
        """The same update at a higher rank: A gets rows of zeros, B gets columns of zeros."""
        if r == self.r:
            return self

        def load() -> tuple[torch.Tensor, torch.Tensor]:
            A, B = self.load()
            return pad(A, 1, r), pad(B, 2, r)

        return replace(self, r=r, load=load)

    def scaled_to(self, scaling: float) -> "Pair":
        """The same update with another scaling: B is multiplied by old scaling / new scaling."""
        if math.isclose(scaling, self.scaling):
            return self

        def load() -> tuple[torch.Tensor, torch.Tensor]:
            A, B = self.load()
            return A, rescale(B, self.scaling / scaling)

        return replace(self, scaling=scaling, load=load)

    def zeros_like(self, in_features: int, out_features: int) -> "Pair":
        """A zero update of another projection of the same experts."""

        def load() -> tuple[torch.Tensor, torch.Tensor]:
            A = torch.zeros(self.num_experts, self.r, in_features, dtype=self.dtype)
            B = torch.zeros(self.num_experts, out_features, self.r, dtype=self.dtype)
            return A, B

        return replace(self, in_features=in_features, out_features=out_features, load=load)


# experts path -> projection -> its update
Experts = dict[str, dict[str, Pair]]


@dataclass(frozen=True)
class LinearPair:
    """The LoRA of an ordinary layer, one without experts: its keys, rank and scaling.

    Attributes:
        path: path of the layer.
        A, B: keys of the tensors; A is [r, K] and B is [N, r].
        r: rank.
        scaling: the factor of B A.
        factor: the factor by which B is multiplied when it is written.
        is_router: whether the layer is a router, which PEFT does not count as a linear layer.
        is_embedding: whether the layer is an embedding, whose weight is stored as [K, N].
    """

    path: str
    A: str
    B: str
    r: int
    scaling: float
    factor: float = 1.0
    is_router: bool = False
    is_embedding: bool = False


class Tokens(NamedTuple):
    """Rows of an embedding, or of a head, that the adapter replaces (trainable_token_indices).

    Attributes:
        key: key of the tensor [n, H] in the adapter's file.
        indices: the rows of the base's weight that it replaces, in the tensor's order.
    """

    key: str
    indices: tuple[int, ...]


@dataclass(frozen=True)
class Adapter:
    """An adapter as its files describe it; no tensor is loaded yet.

    Attributes:
        format: name of the format it was read from.
        config: the contents of its adapter_config.json.
        file: the file, or the checkpoint, with its tensors.
        names: key -> name in the file; a key has no PEFT prefix and uses the base model's paths.
        experts: experts path -> projection -> Pair.
        linears: path -> LinearPair.
        saved: name of a tensor of the base model -> key of the tensor that replaces it: of modules
            saved whole, embeddings, biases.
        originals: name of a tensor of the base model -> key of a copy of it as it was before the
            training, which PEFT saves beside a resized embedding.
        tokens: path of an embedding, or of a head -> the rows of it that are replaced.
        base: facts of the base model; None if it is not known.
        notes: what a user should know.
    """

    format: str
    config: dict[str, Any]
    file: Tensors
    names: dict[str, str]
    experts: Experts
    linears: dict[str, LinearPair]
    saved: dict[str, str]
    originals: dict[str, str]
    tokens: dict[str, Tokens]
    base: BaseModel | None
    notes: tuple[str, ...] = ()

    def pairs(self) -> Iterator[Pair]:
        return (pair for projections in self.experts.values() for pair in projections.values())

    def layers(self) -> list[Pair | LinearPair]:
        """The pairs of the experts, then those of the ordinary layers."""
        return [*self.pairs(), *self.linears.values()]

    def without_lora(self) -> list[str]:
        """Keys of the tensors that are not LoRA, which most servers do not load."""
        whole = [*self.saved.values(), *self.originals.values()]
        return [*whole, *(rows.key for rows in self.tokens.values())]

    def adapted_experts(self) -> int:
        """The number of experts with an update, in all modules together."""
        total = 0
        for pairs in self.experts.values():
            first = next(iter(pairs.values()))
            total += len(first.experts)
        return total

    def noted(self, *notes: str) -> "Adapter":
        """The same adapter with further notes."""
        return replace(self, notes=(*self.notes, *notes))

    def load_linear(self, pair: LinearPair) -> tuple[torch.Tensor, torch.Tensor]:
        """A [r, K] and B [N, r] of an ordinary layer, as they are in the file."""
        return self.file.load(self.names[pair.A]), self.file.load(self.names[pair.B])


def pad(tensor: torch.Tensor, dim: int, r: int) -> torch.Tensor:
    """The tensor with zeros appended along a dimension until its size there is r."""
    shape = list(tensor.shape)
    shape[dim] = r - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def rescale(B: torch.Tensor, factor: float) -> torch.Tensor:
    """B times a factor in B's dtype, computed in at least fp32; B itself if the factor is 1."""
    if math.isclose(factor, 1.0):
        return B
    wide = B.to(torch.promote_types(B.dtype, torch.float32))
    return (wide * factor).to(B.dtype)
