"""Merges an adapter into a checkpoint, shard by shard.

    W[e] + scaling * B[e] A[e], rounded once to the checkpoint's dtype

The model is never loaded. Tensors are read, merged and written one after the other, and a stack of
experts one expert after the other.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from ..files.folders import new_folder, own_files
from ..files.tensor_file import (
    AdapterError,
    Block,
    FilePath,
    Progress,
    RefusedError,
    TensorFile,
    write_tensors,
)
from .base import read_base
from .checkpoint import INDEX_NAME, SINGLE_NAME, Target, find_targets, shard_paths
from .model import Adapter, LinearPair, Pair
from .reading import open_adapter, read_paths
from .replacements import Replacement, check_tied, complete_changes, find_replacements

# endings of files that hold weights; the base's other files are copied
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


@dataclass
class Rounding:
    """How much of the updates was lost by rounding to the checkpoint's dtype.

    Attributes:
        dtypes: names of the merged tensors' dtypes.
        error: sum of the squared rounding errors.
        update: sum of the squared updates.
    """

    dtypes: set[str] = field(default_factory=set)
    error: float = 0.0
    update: float = 0.0

    def add(
        self,
        merged: torch.Tensor,
        exact: torch.Tensor,
        scaling: float,
        A: torch.Tensor,
        B: torch.Tensor,
    ) -> None:
        """Add one merged weight.

        Args:
            merged: the weight in the checkpoint's dtype.
            exact: the same weight before rounding.
            scaling, A, B: the factors of the update; A is [r, K] and B is [N, r].
        """
        self.dtypes.add(str(merged.dtype).removeprefix("torch."))
        if merged.dtype != exact.dtype:
            self.error += torch.linalg.vector_norm(exact - merged).item() ** 2
        # |B A|^2 = sum of (B^T B) * (A A^T): r x r instead of N x K
        self.update += scaling**2 * ((B.mT @ B) * (A @ A.mT)).sum().item()

    @property
    def share(self) -> float:
        """Norm of the rounding errors, divided by the norm of the updates."""
        if not self.update:
            return 0.0
        return (self.error / self.update) ** 0.5


@dataclass(frozen=True)
class Merge:
    """What a merge did.

    Attributes:
        path: the folder that was written.
        merged: number of the checkpoint's tensors that were changed.
        tensors: number of all tensors of the checkpoint.
        rounding: the error of rounding to the checkpoint's dtype.
    """

    path: Path
    merged: int
    tensors: int
    rounding: Rounding

    def __str__(self) -> str:
        dtypes = ", ".join(sorted(self.rounding.dtypes))
        return (
            f"{self.merged} of {self.tensors} tensors merged in {dtypes}; the rounding error is "
            f"{self.rounding.share:.2%} of the update's norm"
        )


def merge_adapter(
    adapter: FilePath,
    base: FilePath,
    dst: FilePath,
    *,
    b_layout: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> Merge:
    """Write a full checkpoint: the base model with the adapter merged into it.

    Args:
        adapter: folder of an adapter in any format.
        base: folder of the base model: config.json and safetensors, in one file or sharded with an
            index.
        dst: folder to write. It also gets the base's other files, and appears only after everything
            is written.
        b_layout: as in `convert_adapter`.
        force: replace `dst` if it is an earlier output, and holds nothing that is read.
        progress: called with (tensors written, total tensors).
    Returns: what was merged, and the error of rounding to the checkpoint's dtype.
    Raises:
        AdapterError: if a file is damaged, or if adapter and base do not belong together.
        RefusedError: if the checkpoint has no tensor to merge a part of the adapter into.
        ExistsError: if `dst` exists and may not be replaced.
    """
    facts = read_base(base)
    read = open_adapter(adapter, facts, b_layout)
    shards = [TensorFile(path) for path in shard_paths(Path(base))]
    tensors = {name: info for shard in shards for name, info in shard.tensors.items()}
    check_tied(read, facts)
    replacements = find_replacements(read, facts, tensors)
    targets = find_targets(read, facts, tensors)
    complete_changes(facts, tensors, targets, replacements)
    merger = _Merger(read, targets, replacements)
    copied = own_files(base, lambda name: _is_copied(name, shards))
    with new_folder(dst, force, [base, *read_paths(adapter, read)], copied) as folder:
        written = 0
        for shard in shards:
            counted = _counted(progress, written, len(tensors))
            write_tensors(folder / shard.path.name, merger.blocks(shard), shard.metadata, counted)
            written += len(shard.tensors)
        for file in copied:
            shutil.copyfile(file, folder / file.name)
    changed = targets.keys() | replacements.keys()
    return Merge(Path(dst), len(changed), len(tensors), merger.rounding)


def _is_copied(name: str, shards: Sequence[TensorFile]) -> bool:
    """Whether a file of the base goes with the merged weights as it is."""
    if name == INDEX_NAME and [shard.path.name for shard in shards] == [SINGLE_NAME]:
        # it may be left over from a checkpoint in shards
        return False
    return Path(name).suffix not in _WEIGHTS


def _rounded(weight: torch.Tensor, dtype: torch.dtype, check: bool = True) -> torch.Tensor:
    """A weight in the checkpoint's dtype.

    Raises:
        AdapterError: if `check` is set and a value is not finite in this dtype.
    """
    rounded = weight.to(dtype)
    if check and not torch.isfinite(rounded).all():
        raise AdapterError(
            f"a merged weight is not finite in {dtype}; the adapter or the base is damaged."
        )
    return rounded


def _counted(progress: Progress | None, written: int, total: int) -> Progress | None:
    """The progress of one shard as progress of the whole checkpoint."""
    if progress is None:
        return None
    return lambda done, _: progress(written + done, total)


@dataclass
class _Merger:
    """Makes the tensors of the merged checkpoint.

    Attributes:
        adapter: the adapter to merge.
        targets: name of a tensor in the checkpoint -> its update.
        replacements: name of a tensor in the checkpoint -> what replaces it, whole or by rows.
        rounding: the rounding errors of all tensors merged so far.
    """

    adapter: Adapter
    targets: Mapping[str, Target]
    replacements: Mapping[str, Replacement]
    rounding: Rounding = field(default_factory=Rounding)
    # the pair that was loaded last, and its A and B
    _loaded: tuple[Pair | LinearPair, tuple[torch.Tensor, torch.Tensor]] | None = None

    def blocks(self, shard: TensorFile) -> Iterator[Block]:
        # tensors with the same A and B are written one after the other, so that A and B are read
        # once
        order = {id(target.pair): i for i, target in enumerate(self.targets.values())}

        def position(name: str) -> int:
            if name not in self.targets:
                return -1
            return order[id(self.targets[name].pair)]

        for name in sorted(shard.tensors, key=position):
            info = shard.tensors[name]
            changed = name in self.targets or name in self.replacements
            if changed and not info.dtype.is_floating_point:
                raise RefusedError(
                    f"{shard.path}: {name} is {info.dtype}; merge into an unquantized checkpoint."
                )
            yield Block({name: info.shape}, info.dtype, partial(self._make, shard, name))

    def _make(self, shard: TensorFile, name: str) -> Iterator[torch.Tensor]:
        """Yield a tensor of the merged checkpoint; a stack is yielded one expert at a time."""
        target = self.targets.get(name)
        dtype = shard.tensors[name].dtype
        if target is not None and target.stack is not None:
            for e in range(target.stack[0]):
                weight = shard.load(name, row=e, check=False, view=target.stack)
                yield self._merged(weight, replace(target, expert=e), dtype)
            return
        weight = self._replaced(shard, name)
        if target is not None:
            weight = self._merged(weight, target, dtype)
        yield _rounded(weight, dtype, name in self.replacements)

    def _replaced(self, shard: TensorFile, name: str) -> torch.Tensor:
        """A tensor of the base, or what the adapter has in its place, before any update."""
        replacement = self.replacements.get(name)
        if replacement is None:
            return shard.load(name, check=False)
        if replacement.key is None:
            weight = shard.load(name, check=False)
        else:
            weight = self._load(replacement.key)
        if replacement.tokens is not None:
            rows = self._load(replacement.tokens.key)
            # the wider dtype: the rows are rounded once, to the checkpoint's
            weight = weight.to(torch.promote_types(weight.dtype, rows.dtype))
            weight[list(replacement.tokens.indices)] = rows.to(weight.dtype)
        return weight

    def _load(self, key: str) -> torch.Tensor:
        return self.adapter.file.load(self.adapter.names[key])

    def _merged(self, weight: torch.Tensor, target: Target, stored: torch.dtype) -> torch.Tensor:
        """The weight of one expert or ordinary layer plus its update, in the dtype `stored`."""
        A, B = self._factors(target.pair)
        if target.expert is not None:
            A = A[target.expert]
            B = B[target.expert]
        if target.rows is not None:
            B = B[target.rows]
        # fp32 at least: the product of bf16 factors must not be rounded before it is added
        dtype = torch.promote_types(torch.promote_types(A.dtype, weight.dtype), torch.float32)
        A = A.to(dtype)
        B = B.to(dtype)
        scaling = target.pair.scaling
        if target.transposed:
            exact = torch.addmm(weight.to(dtype), A.mT, B.mT, alpha=scaling)
        else:
            exact = torch.addmm(weight.to(dtype), B, A, alpha=scaling)
        merged = _rounded(exact, stored)
        self.rounding.add(merged, exact, scaling, A, B)
        return merged

    def _factors(self, pair: Pair | LinearPair) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of a pair; A and B of the last pair stay in memory."""
        if self._loaded is not None and self._loaded[0] is pair:
            return self._loaded[1]
        self._loaded = None  # frees A and B before the next ones are loaded
        if isinstance(pair, Pair):
            factors = pair.load()
        else:
            factors = self.adapter.load_linear(pair)
        self._loaded = (pair, factors)
        return factors
