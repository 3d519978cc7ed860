"""Checks whether two adapters are the same update.

scaling * B[e] A[e]          for every expert e of every projection, computed from both files

The LoRA of ordinary layers is compared in the same way, and tensors that are not LoRA by value. So
ranks, alphas, patterns, rsLoRA and chosen experts are compared by what they amount to.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..files.tensor_file import AdapterError, FilePath, Progress
from .base import BaseConfig
from .model import Adapter, Pair, Tokens
from .reading import open_adapter
from .replacements import changed_ties

# number of elements of an update that are computed at once
_CHUNK = 2**22


@dataclass(frozen=True)
class Verification:
    """How much the updates of two adapters differ.

    Attributes:
        compared: number of updates that were compared: one per expert of a projection, per ordinary
            layer, per tensor saved whole, and per embedding with rows of its own.
        max_error: the largest relative error of an update: largest |difference| / largest |value|;
            0 without a second adapter.
        where: the module with the largest error.
        tolerance: the largest error that passes.
        what: sentences on what was compared, or only read.
    """

    compared: int
    max_error: float
    where: str
    tolerance: float
    what: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the largest error is within the tolerance."""
        return self.max_error <= self.tolerance


class _Update(NamedTuple):
    """scaling * B A [N, K]."""

    scaling: float
    A: torch.Tensor
    B: torch.Tensor


class _Layer(NamedTuple):
    """What one module gets from both adapters.

    Attributes:
        where: the module's name, for messages.
        errors: yields the relative error of each update.
    """

    where: str
    errors: Iterator[float]


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

    Every tensor of both files is compared. If lora_B is in another order, if experts are swapped or
    if a scaling is lost, the relative error is about one.

    Args:
        path: folder of the adapter.
        base: its base model, as in `convert_adapter`.
        other: folder of the second adapter, in any format.
        b_layout: order of lora_B under PEFT's keys, for both adapters.
        tolerance: largest relative error that passes; by default 1e-5 for fp32 files, 1e-2 if one
            file is bf16 or fp16.
        seed: has no effect; earlier versions compared experts that they drew with it.
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
        read = f"{len(first.file.tensors)} tensors were read: all are finite; none was compared"
        return Verification(0, 0.0, "", 0.0, (read,))
    second = open_adapter(other, base, b_layout)
    if tolerance is None:
        tolerance = _tolerance(first, second)
    _check_same_modules(first, second)
    layers = list(_layers(first, second))
    compared = 0
    max_error = 0.0
    worst = ""
    for done, layer in enumerate(layers, 1):
        for error in layer.errors:
            if error > max_error:
                max_error = error
                worst = layer.where
            compared += 1
        if progress is not None:
            progress(done, len(layers))
    return Verification(compared, max_error, worst, tolerance, _compared(first, second))


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


def _compared(first: Adapter, second: Adapter) -> tuple[str, ...]:
    """Sentences on what is compared."""
    numbers = {
        "experts' projections, every expert": len(_projections(first, second)),
        "ordinary layers": len(first.linears),
        "tensors saved whole": len(first.saved) + len(first.originals),
        "rows of tokens": sum(len(rows.indices) for rows in first.tokens.values()),
    }
    return tuple(f"{what}: {number}" for what, number in numbers.items() if number)


def _check_same_modules(first: Adapter, second: Adapter) -> None:
    """Check that both adapters adapt, replace and tie the same things."""
    different = sorted(set(first.linears) ^ set(second.linears))
    different += sorted(set(first.saved) ^ set(second.saved))
    different += sorted(set(first.originals) ^ set(second.originals))
    different += sorted(_rows(first) ^ _rows(second))
    if not different:
        different = sorted(set(first.experts) ^ set(second.experts))
    if different:
        raise AdapterError(
            f"only one of {first.file.path} and {second.file.path} adapts {different[0]}; they "
            f"differ in {len(different)} modules."
        )
    ties = {bool(adapter.config.get("ensure_weight_tying")) for adapter in (first, second)}
    # both change the same modules, so one of them tells
    is_of_ties = first.base is None or changed_ties(first, first.base)
    if len(ties) > 1 and is_of_ties:
        raise AdapterError(
            f"ensure_weight_tying is true in only one of {first.file.path} and "
            f"{second.file.path}, so they change different embeddings."
        )


def _rows(adapter: Adapter) -> set[str]:
    """A name of every row of an embedding that an adapter replaces."""
    return {
        f"row {index} of {path}" for path, rows in adapter.tokens.items() for index in rows.indices
    }


def _projections(first: Adapter, second: Adapter) -> list[tuple[str, str]]:
    """(path, projection) of every projection that one of the adapters adapts."""
    return [
        (path, projection)
        for path, pairs in first.experts.items()
        for projection in {**pairs, **second.experts[path]}
    ]


def _layers(first: Adapter, second: Adapter) -> Iterator[_Layer]:
    """Everything that one of the adapters adapts or replaces.

    If only one of them adapts a projection, the update of the other is zero.
    """
    for path, projection in _projections(first, second):
        a = first.experts[path].get(projection)
        b = second.experts[path].get(projection)
        yield _Layer(f"{path}, {projection}", _experts_errors(a, b))
    for path in first.linears:
        yield _Layer(path, _linear_error(first, second, path))
    for name, key in first.saved.items():
        yield _Layer(name, _saved_error(first, key, second, second.saved[name]))
    for name, key in first.originals.items():
        yield _Layer(name, _saved_error(first, key, second, second.originals[name]))
    for path, rows in first.tokens.items():
        yield _Layer(path, _tokens_error(first, rows, second, second.tokens[path]))


def _experts_errors(a: Pair | None, b: Pair | None) -> Iterator[float]:
    """The error of each expert; `a` or `b` is None if its adapter lacks the projection."""
    present = a or b
    assert present is not None
    one = _factors(a, present)
    other = _factors(b, present)
    for e in range(present.num_experts):
        yield _update_error(
            _Update(one.scaling, one.A[e], one.B[e]),
            _Update(other.scaling, other.A[e], other.B[e]),
        )


def _factors(pair: Pair | None, sizes: Pair) -> _Update:
    """A [E, r, K] and B [E, N, r] of a projection; zeros with these sizes if `pair` is None."""
    if pair is None:
        pair = sizes.zeros_like(sizes.in_features, sizes.out_features)
    A, B = pair.load()
    return _Update(pair.scaling, A, B)


def _linear_error(first: Adapter, second: Adapter, path: str) -> Iterator[float]:
    updates = []
    for adapter in (first, second):
        pair = adapter.linears[path]
        updates.append(_Update(pair.scaling, *adapter.load_linear(pair)))
    yield _update_error(*updates)


def _update_error(one: _Update, other: _Update) -> float:
    """The relative error of two updates."""
    same_factors = _are_equal(one.A, other.A) and _are_equal(one.B, other.B)
    if same_factors and one.scaling == other.scaling:
        return 0.0
    step = max(1, _CHUNK // one.A.shape[1])
    differences = []
    sizes = []
    for start in range(0, one.B.shape[0], step):
        a = _rows_of(one, slice(start, start + step))
        b = _rows_of(other, slice(start, start + step))
        differences.append(_largest(a - b))
        sizes += [_largest(a), _largest(b)]
    return _ratio(max(differences), max(sizes))


def _rows_of(update: _Update, rows: slice) -> torch.Tensor:
    return update.scaling * (update.B[rows].double() @ update.A.double())


def _saved_error(first: Adapter, key: str, second: Adapter, other_key: str) -> Iterator[float]:
    """The error of a tensor saved whole."""
    a = first.file.load(first.names[key])
    b = second.file.load(second.names[other_key])
    yield _value_error(a, b)


def _tokens_error(
    first: Adapter, rows: Tokens, second: Adapter, other_rows: Tokens
) -> Iterator[float]:
    """The error of the rows of an embedding, which the files may hold in different orders."""
    a = first.file.load(first.names[rows.key])
    b = second.file.load(second.names[other_rows.key])
    order = [other_rows.indices.index(index) for index in rows.indices]
    yield _value_error(a, b[order])


def _value_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """The relative error of two tensors; infinite if they have different shapes."""
    if a.shape != b.shape:
        return math.inf
    if _are_equal(a, b):
        return 0.0
    a = a.double()
    b = b.double()
    return _ratio(_largest(a - b), max(_largest(a), _largest(b)))


def _are_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _largest(values: torch.Tensor) -> float:
    """The largest |value|; infinite if one is not a number."""
    largest = values.abs().max().item()
    if math.isnan(largest):
        return math.inf
    return largest


def _ratio(difference: float, size: float) -> float:
    """Largest |difference| divided by the largest |value|; 0 if both are zero."""
    if not difference or math.isinf(difference):
        return difference
    return difference / size
