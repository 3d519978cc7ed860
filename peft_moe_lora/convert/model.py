"""An adapter whatever its format: A[e] [r, K], B[e] [N, r] and a scaling for every projection of every experts module.

    W[e] + scaling * B[e] A[e]

Nothing is loaded before a projection's turn comes; padding a rank and folding a scaling wait until then too.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from peft.utils.other import get_pattern_key

from ..experts.layout import EVERY_PROJECTION
from ..files.adapter_file import read_description
from ..files.tensor_file import AdapterError, RefusedError, TensorFile, TensorInfo
from .base import BaseModel


@dataclass(frozen=True)
class Pair:
    """One projection of one experts module.

    Attributes:
        num_experts, r, in_features, out_features: E, r, K, N.
        scaling: what B[e] A[e] is multiplied by.
        dtype: of the tensors.
        load: gives A [E, r, K] and B [E, N, r].
        chosen: ascending ids of the experts that have an update, zeros being loaded for the others; None for all.
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
        return range(self.num_experts) if self.chosen is None else self.chosen

    def padded(self, r: int) -> "Pair":
        """The same update at a higher rank: the further rows of A and columns of B are zero."""
        if r == self.r:
            return self

        def load() -> tuple[torch.Tensor, torch.Tensor]:
            A, B = self.load()
            return pad(A, 1, r), pad(B, 2, r)

        return replace(self, r=r, load=load)

    def scaled_to(self, scaling: float) -> "Pair":
        """The same update with another scaling: B takes up the difference."""
        if math.isclose(scaling, self.scaling):
            return self

        def load() -> tuple[torch.Tensor, torch.Tensor]:
            A, B = self.load()
            return A, rescale(B, self.scaling / scaling)

        return replace(self, scaling=scaling, load=load)

    def zeros_like(self, in_features: int, out_features: int) -> "Pair":
        """An update of the same experts, in another projection, that changes nothing."""
        shapes = (self.num_experts, self.r, in_features), (self.num_experts, out_features, self.r)
        return replace(self, in_features=in_features, out_features=out_features,
                       load=lambda: tuple(torch.zeros(shape, dtype=self.dtype) for shape in shapes))  # fmt: skip


@dataclass(frozen=True)
class LinearPair:
    """The LoRA of an ordinary layer, carried along: its keys, rank and scaling.

    Attributes:
        A, B: key -> where the tensor is; A [r, .] and B [., r].
        factor: what B is multiplied by on writing.
        bare: whether it is on a router, which to PEFT is no linear layer.
    """

    path: str
    A: str
    B: str
    r: int
    scaling: float
    factor: float = 1.0
    bare: bool = False


@dataclass(frozen=True)
class Adapter:
    """An adapter as its files say, nothing loaded yet.

    Attributes:
        format: name of the format it was read in.
        config: its adapter_config.json.
        file: its tensors.
        names: key without prefix, in the base model's own paths -> name in the file.
        experts: experts path -> projection -> Pair.
        linears: path -> LinearPair.
        carried: keys of tensors that are no LoRA: modules saved whole, embeddings, biases.
        base: facts of the base model, where they are known.
        notes: what a user should know.
    """

    format: str
    config: dict
    file: TensorFile
    names: dict[str, str]
    experts: dict[str, dict[str, Pair]]
    linears: dict[str, LinearPair]
    carried: tuple[str, ...]
    base: BaseModel | None
    notes: tuple[str, ...] = ()

    def pairs(self) -> Iterator[Pair]:
        return (pair for projections in self.experts.values() for pair in projections.values())

    def layers(self) -> list[Pair | LinearPair]:
        return [*self.pairs(), *self.linears.values()]

    def noted(self, *notes: str) -> "Adapter":
        return replace(self, notes=(*self.notes, *notes))

    def each_pair(self, change: Callable[[Pair], Pair]) -> "Adapter":
        return replace(
            self,
            experts={
                path: {n: change(p) for n, p in pairs.items()}
                for path, pairs in self.experts.items()
            },
        )


@dataclass(frozen=True)
class Source:
    """An adapter's files and what is known of its base, before its format is understood."""

    file: TensorFile
    config: dict
    names: dict[str, str]
    base: BaseModel | None
    b_layout: str = "auto"

    def info(self, key: str) -> TensorInfo:
        return self.file.tensors[self.names[key]]

    def load(self, key: str) -> torch.Tensor:
        return self.file.load(self.names[key])

    def rank(self, path: str) -> int:
        patterns = self.config["rank_pattern"]
        return patterns.get(get_pattern_key(patterns.keys(), path), self.config["r"])

    def scaling(self, path: str) -> float:
        patterns, r = self.config["alpha_pattern"], self.rank(path)
        alpha = patterns.get(get_pattern_key(patterns.keys(), path), self.config["lora_alpha"])
        return alpha / (math.sqrt(r) if self.config["use_rslora"] else r)

    def chosen(self, path: str) -> tuple[int, ...] | None:
        """Ascending ids of the experts of a module that have a pair; None for all."""
        indices = self.config.get("expert_indices")
        return (
            None
            if indices is None
            else tuple(indices.get(get_pattern_key(indices.keys(), path), ()))
        )

    def num_experts(self, path: str) -> int:
        """E of a module whose tensors do not tell."""
        said = (
            read_description(str(self.file.path), self.file.metadata)
            .get("experts", {})
            .get(path, {})
        )
        if self.base is None and "num_experts" in said:
            return said["num_experts"]
        known = need_base(
            self.base,
            f"{self.file.path} holds some experts of {path} and does not say out of how many",
        )
        return known.experts[path].num_experts if path in known.experts else len(self.chosen(path))

    def pair(
        self,
        path: str,
        projection: str,
        sizes: tuple[int, int, int, int],
        scaling: float,
        key: str,
        load,
        chosen=None,
    ) -> Pair:
        """A Pair of sizes (E, r, K, N), held against the base model where it is known."""
        if self.base is not None:
            E, _, K, N = sizes
            layout = self.base.experts.get(path)
            if layout is None:
                raise AdapterError(
                    f"{self.file.path} adapts {path}, which is no experts module of {self.base.name}; its experts are "
                    f"{next(iter(self.base.experts))} and the like. Name the base model the adapter was trained on."
                )
            known = layout.projection(projection)
            if (E, K, N) != (layout.num_experts, known.in_features, known.out_features):
                raise AdapterError(
                    f"{self.file.path}: {path}, {projection} is for {E} experts of {K} -> {N}, {self.base.name} has "
                    f"{layout.num_experts} of {known.in_features} -> {known.out_features}. Name the base model the "
                    "adapter was trained on."
                )
        return Pair(*sizes, scaling, self.info(key).dtype, load, chosen)

    def stacked_sizes(self, path: str, slot: dict, r: int) -> tuple[int, int, int, int]:
        """(E, r, in, out) of A [E*r, in] and B [out, E*r].

        Raises:
            AdapterError: if the shapes are not of this kind.
        """
        A, B = self.info(slot["A"]).shape, self.info(slot["B"]).shape
        if len(A) != 2 or len(B) != 2 or A[0] % r or A[0] == 0 or A[0] != B[1]:
            raise AdapterError(
                f"{self.file.path}: {slot['A']} {list(A)} and {slot['B']} {list(B)} are no A [E*r, K] and B [N, E*r] "
                f"for r={r} of adapter_config.json; the two files do not belong together."
            )
        return A[0] // r, r, A[1], B[0]


def pad(tensor: torch.Tensor, dim: int, r: int) -> torch.Tensor:
    shape = list(tensor.shape)
    shape[dim] = r - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def rescale(B: torch.Tensor, factor: float) -> torch.Tensor:
    return (
        B
        if math.isclose(factor, 1.0)
        else (B.to(torch.promote_types(B.dtype, torch.float32)) * factor).to(B.dtype)
    )


def need_base(base: BaseModel | None, why: str) -> BaseModel:
    """The base model's facts.

    Raises:
        RefusedError: if they are not known, saying what they are needed for.
    """
    if base is None:
        raise RefusedError(f"{why}; name the base model (base_config, --base-config).")
    return base


def fill_in(adapter: Adapter, projections: set[str], reader: str) -> Adapter:
    """The adapter with zero pairs for the projections that some of its modules do not adapt."""
    missing = [
        (path, n) for path, pairs in adapter.experts.items() for n in projections - set(pairs)
    ]
    if not missing:
        return adapter
    base = need_base(
        adapter.base,
        f"{reader} wants {sorted(projections)} of every module, so their sizes must be known",
    )
    experts = {path: dict(pairs) for path, pairs in adapter.experts.items()}
    for path, n in missing:
        like, size = next(iter(experts[path].values())), base.experts[path].projection(n)
        experts[path][n] = like.zeros_like(size.in_features, size.out_features)
    experts = {
        path: {n: pairs[n] for n in EVERY_PROJECTION if n in pairs}
        for path, pairs in experts.items()
    }
    what = sorted({n for _, n in missing})
    return replace(adapter, experts=experts).noted(
        f"{', '.join(what)} not adapted: written as zeros for {reader}"
    )


def make_uniform(adapter: Adapter, reader: str) -> Adapter:
    """The adapter at one rank and one scaling: lower ranks padded with zeros, other scalings folded into B."""
    layers, config = adapter.layers(), adapter.config
    r = max(layer.r for layer in layers)
    scalings = [layer.scaling for layer in layers]
    scaling = max(dict.fromkeys(scalings), key=scalings.count)
    notes = []
    if any(layer.r != r for layer in layers):
        notes.append(
            f"ranks {sorted({layer.r for layer in layers})} padded with zeros to {r}: {reader} knows one rank"
        )
    if not all(math.isclose(s, scaling) for s in scalings):
        narrow = sorted(
            {
                str(pair.dtype).removeprefix("torch.")
                for pair in adapter.pairs()
                if pair.dtype.itemsize < 4
            }
        )
        notes.append(
            f"other scalings than {scaling:g} folded into B: {reader} knows lora_alpha / r only"
            + (f" (B is rounded to {narrow[0]} once more)" if narrow else "")
        )
    linears = {
        path: replace(layer, r=r, scaling=scaling, factor=layer.scaling / scaling)
        for path, layer in adapter.linears.items()
    }
    changed = adapter.each_pair(lambda pair: pair.padded(r).scaled_to(scaling))
    config = {**config, "r": r, "lora_alpha": tidy(scaling * r), "use_rslora": False}
    return replace(changed, linears=linears, config=config).noted(*notes)


def tidy(alpha: float) -> float | int:
    """A number as a person would write it: 32, not 32.000000000000004."""
    alpha = float(f"{alpha:.12g}")
    return int(alpha) if alpha.is_integer() else alpha
