"""Checks whether two adapters are the same update.

scaling * B[e] A[e]          for some experts e of every projection, computed from both files
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..files.tensor_file import AdapterError, FilePath, Progress
from .base import BaseConfig
from .model import Adapter, LinearPair, Pair
from .reading import open_adapter

# number of experts that are compared for each projection
_SAMPLED_EXPERTS = 2


@dataclass(frozen=True)
class Verification:
    """How much the updates of two adapters differ.

    Attributes:
        compared: number of updates that were compared: one per drawn expert of a projection, one
            per ordinary layer.
        max_error: the largest relative error of an update: largest |difference| / largest |value|;
            0 without a second adapter.
        where: the module with the largest error.
        tolerance: the largest error that passes.
    """

    compared: int
    max_error: float
    where: str
    tolerance: float

    @property
    def ok(self) -> bool:
        return self.max_error <= self.tolerance


@dataclass(frozen=True)
class _Layer:
    """The updates of one projection or one ordinary layer, from both adapters.

    Attributes:
        where: the layer's name, for messages.
        updates: yields the two adapters' updates, each [N, K].
    """

    where: str
    updates: Iterator[tuple[torch.Tensor, torch.Tensor]]


def verify_adapter(
    path: FilePath,
    base: BaseConfig,
    other: FilePath | None = None,
    *,
    b_layout: str = "auto",
    tolerance: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Verification:
    """Check that an adapter fits its base model, and compare it with a second adapter.

    Some experts are drawn for every projection of every module, and scaling * B[e] A[e] is computed
    from both files. If lora_B is in another order, if experts are swapped or if a scaling is lost,
    the relative error is about one.

    Args:
        path: folder of the adapter.
        base: its base model, as in `convert_adapter`.
        other: folder of the second adapter, in any format.
        b_layout: order of lora_B under PEFT's keys, for both adapters.
        tolerance: largest relative error that passes; by default 1e-5 for fp32 files, 1e-2 if one
            file is bf16 or fp16.
        seed: seed of the random choice of experts.
        progress: called with (modules done, total modules).
    Returns: what was compared and the largest error. Without `other`, nothing is compared, but
        every tensor is read and checked to be finite.
    Raises:
        AdapterError, RefusedError: as in `convert_adapter`.
        AdapterError: also if the two adapters do not adapt the same modules.
    """
    first = open_adapter(path, base, b_layout)
    if other is None:
        _read_all(first, progress)
        return Verification(0, 0.0, "", 0.0)
    second = open_adapter(other, base, b_layout)
    if tolerance is None:
        tolerance = _tolerance(first, second)
    _check_same_modules(first, second)
    total = len(_projections(first, second)) + len(first.linears)
    compared = 0
    max_error = 0.0
    worst = ""
    for done, layer in enumerate(_layers(first, second, seed), 1):
        for a, b in layer.updates:
            error = _relative_error(a, b)
            if error > max_error:
                max_error = error
                worst = layer.where
            compared += 1
        if progress is not None:
            progress(done, total)
    return Verification(compared, max_error, worst, tolerance)


def _read_all(adapter: Adapter, progress: Progress | None) -> None:
    """Read every tensor; reading raises if a value is not finite."""
    for done, name in enumerate(adapter.file.tensors, 1):
        adapter.file.load(name)
        if progress is not None:
            progress(done, len(adapter.file.tensors))


def _tolerance(first: Adapter, second: Adapter) -> float:
    tensors = [*first.file.tensors.values(), *second.file.tensors.values()]
    if any(info.dtype.itemsize < 4 for info in tensors):
        return 1e-2
    return 1e-5


def _relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest |a - b| divided by the largest |value|; 0 if both are zero."""
    size = max(a.abs().max().item(), b.abs().max().item())
    if not size:
        return 0.0
    return (a - b).abs().max().item() / size


def _check_same_modules(first: Adapter, second: Adapter) -> None:
    different = sorted(set(first.linears) ^ set(second.linears))
    different += sorted(set(first.carried) ^ set(second.carried))
    if not different:
        different = sorted(set(first.experts) ^ set(second.experts))
    if different:
        raise AdapterError(
            f"only one of {first.file.path} and {second.file.path} adapts {different[0]}; they "
            f"differ in {len(different)} modules."
        )


def _projections(first: Adapter, second: Adapter) -> list[tuple[str, str]]:
    """(path, projection) of every projection that one of the adapters adapts."""
    return [
        (path, projection)
        for path, pairs in first.experts.items()
        for projection in {**pairs, **second.experts[path]}
    ]


def _layers(first: Adapter, second: Adapter, seed: int) -> Iterator[_Layer]:
    """Every projection and layer that one of the adapters adapts.

    If only one of them adapts a projection, the update of the other is zero.
    """
    generator = torch.Generator().manual_seed(seed)
    for path, projection in _projections(first, second):
        a = first.experts[path].get(projection)
        b = second.experts[path].get(projection)
        yield _Layer(f"{path}, {projection}", _expert_updates(a, b, generator))
    for path, linear in first.linears.items():
        updates = (_linear_update(first, linear), _linear_update(second, second.linears[path]))
        yield _Layer(path, iter([updates]))


def _expert_updates(
    a: Pair | None, b: Pair | None, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The updates of some experts; `a` or `b` is None if its adapter lacks the projection."""
    present = [pair for pair in (a, b) if pair is not None]
    drawn = _drawn(present, generator)
    return zip(_updates(a, present[0], drawn), _updates(b, present[0], drawn), strict=True)


def _updates(pair: Pair | None, sizes: Pair, experts: list[int]) -> list[torch.Tensor]:
    """scaling * B[e] A[e] of some experts, [N, K]; zeros with these sizes if `pair` is None."""
    if pair is None:
        zeros = torch.zeros(sizes.out_features, sizes.in_features, dtype=torch.float64)
        return [zeros] * len(experts)
    A, B = pair.load()
    return [pair.scaling * (B[e].double() @ A[e].double()) for e in experts]


def _drawn(pairs: list[Pair], generator: torch.Generator) -> list[int]:
    """The experts to compare.

    If the pairs update only some experts, a few of these are compared, and one expert that neither
    pair updates.
    """
    chosen: list[int] = sorted(set().union(*(pair.chosen or () for pair in pairs)))
    E = pairs[0].num_experts
    if not chosen:
        return torch.randperm(E, generator=generator)[:_SAMPLED_EXPERTS].tolist()
    others = sorted(set(range(E)) - set(chosen))
    few = torch.randperm(len(chosen), generator=generator)[:_SAMPLED_EXPERTS].tolist()
    return [chosen[i] for i in few] + others[:1]


def _linear_update(adapter: Adapter, pair: LinearPair) -> torch.Tensor:
    """scaling * B A of an ordinary layer, [N, K]."""
    A, B = adapter.load_linear(pair)
    return pair.scaling * (B.double() @ A.double())
