"""An adapter into a checkpoint, shard by shard: W[e] + scaling * B[e] A[e], rounded once to the checkpoint's dtype.

The model is never loaded. A shard is read tensor by tensor, an experts' stack expert by expert, and written at once.
"""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from ..experts.layout import ExpertsLayout
from ..files.tensor_file import (
    AdapterError,
    Block,
    Progress,
    RefusedError,
    TensorFile,
    TensorInfo,
    new_folder,
    read_json,
    write_tensors,
)
from .base import BaseModel, read_base
from .convert import open_adapter
from .model import Adapter, LinearPair, Pair

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass
class Rounding:
    """How much of the updates the checkpoint's dtype kept.

    Attributes:
        dtypes: of the merged tensors.
        error, update: sums of squares of what rounding changed, and of the updates.
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
        self.dtypes.add(str(merged.dtype).removeprefix("torch."))
        if merged.dtype != exact.dtype:
            self.error += torch.linalg.vector_norm(exact - merged).item() ** 2
        # |B A|^2 = sum of (B^T B) * (A A^T): r x r instead of N x K
        self.update += scaling**2 * ((B.mT @ B) * (A @ A.mT)).sum().item()

    @property
    def share(self) -> float:
        """Norm of the rounding over the norm of the updates."""
        return (self.error / self.update) ** 0.5 if self.update else 0.0


@dataclass(frozen=True)
class Merge:
    """What a merge did.

    Attributes:
        path: the folder written.
        merged: tensors of the checkpoint that were changed; tensors: all of them.
        rounding: what writing in the checkpoint's dtype cost.
    """

    path: Path
    merged: int
    tensors: int
    rounding: Rounding

    def __str__(self) -> str:
        return (
            f"{self.merged} of {self.tensors} tensors merged in {', '.join(sorted(self.rounding.dtypes))}; rounding "
            f"to it is {self.rounding.share:.2%} of the update's norm"
        )


@dataclass(frozen=True)
class Target:
    """Where a tensor of the checkpoint gets its update from.

    Attributes:
        pair: the experts' projection, or an ordinary layer's.
        expert: the one it holds, None for all of them stacked.
        rows: the rows of the projection it holds: all, gate's or up's.
        transposed: whether it is stored [.., K, N].
        stack: its shape with the experts as a dimension of their own, where it is a stack.
    """

    pair: Pair | LinearPair
    expert: int | None = None
    rows: slice | None = None
    transposed: bool = False
    stack: tuple[int, ...] | None = None


def merge_adapter(
    adapter,
    base,
    dst,
    *,
    b_layout: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> Merge:
    """Write a full checkpoint: the base's, with the adapter merged in.

    Args:
        adapter: folder of an adapter in any format.
        base: folder of the base model: config.json and safetensors, in one file or sharded with an index.
        dst: folder to write, with the base's other files; put in place when it is whole.
        b_layout: as in `convert_adapter`.
        force: replace what lies at `dst`.
        progress: called with (tensors written, tensors in all).
    Returns: what was merged and what rounding to the checkpoint's dtype cost.
    Raises:
        AdapterError: if a file is damaged or the two do not belong together.
        RefusedError: if part of the adapter has no tensor in the checkpoint to be merged into.
        ExistsError: if `dst` exists.
    """
    facts = read_base(base)
    read = open_adapter(adapter, facts, b_layout)
    shards = [TensorFile(path) for path in _shards(Path(base))]
    tensors = {name: info for shard in shards for name, info in shard.tensors.items()}
    targets = _targets(read, facts, tensors)
    saved = {key: name for name in tensors if (key := _resolved(facts, name)) in read.carried}
    lost = set(read.carried) - set(saved)
    if lost:
        raise RefusedError(
            f"{base} has no tensor {sorted(lost)[0]} for what the adapter saved whole."
        )
    replaced = {name: key for key, name in saved.items()}
    merger = _Merger(read, targets, replaced, Rounding())
    with new_folder(dst, force) as folder:
        written = 0
        for shard in shards:
            count = None
            if progress is not None:
                count = partial(
                    lambda before, done, _: progress(before + done, len(tensors)), written
                )
            write_tensors(folder / shard.path.name, merger.blocks(shard), shard.metadata, count)
            written += len(shard.tensors)
        for file in Path(base).iterdir():
            if file.is_file() and file.suffix not in (
                ".safetensors",
                ".bin",
                ".pt",
                ".pth",
                ".gguf",
            ):
                shutil.copy(file, folder)
    return Merge(Path(dst), len(targets) + len(replaced), len(tensors), merger.rounding)


def _shards(base: Path) -> list[Path]:
    """The checkpoint's files.

    Raises:
        AdapterError: if the index names files outside the folder, or ones that are not there.
    """
    if not (base / INDEX_NAME).is_file():
        if not (base / SINGLE_NAME).is_file():
            raise AdapterError(
                f"{base} holds neither {SINGLE_NAME} nor {INDEX_NAME}; merging needs its weights."
            )
        return [base / SINGLE_NAME]
    named = read_json(base / INDEX_NAME).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise AdapterError(f"{base / INDEX_NAME} has no weight_map of names and files.")
    for file in set(named.values()):
        # a name and no path: an index may not reach outside its folder
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise AdapterError(
                f"{base / INDEX_NAME} names {file!r}, which is no safetensors file beside it."
            )
        if not (base / file).is_file():
            raise AdapterError(
                f"{base / INDEX_NAME} names {file}, which is missing; download the checkpoint again."
            )
    files = [base / file for file in sorted(set(named.values()))]
    held = {name for file in files for name in TensorFile(file).tensors}
    if held != set(named):
        raise AdapterError(
            f"{base / INDEX_NAME} and the files beside it differ on {sorted(held ^ set(named))[0]}."
        )
    return files


def _resolved(base: BaseModel, name: str) -> str:
    """The name of a checkpoint's tensor in the model's own paths."""
    path, _, last = name.rpartition(".")
    return f"{base.resolve(path)}.{last}"


def _targets(
    adapter: Adapter, base: BaseModel, tensors: dict[str, TensorInfo]
) -> dict[str, Target]:
    """Tensor of the checkpoint -> its update.

    Raises:
        RefusedError: if a part of the adapter finds no tensor.
    """
    hub = base.hub_names
    found: dict[str, Target] = {}
    by_path: dict[str, list[tuple[str, int | None, str]]] = {}
    for name in tensors:
        path, expert, leaf = _expert_name(base, name)
        by_path.setdefault(path, []).append((name, expert, leaf))
    for path, pairs in adapter.experts.items():
        layout, here = base.experts[path], by_path.get(path, ())
        stacks = {leaf: name for name, expert, leaf in here if expert is None}
        for projection, pair in pairs.items():
            weights = layout.projection(projection).weights
            if set(weights) <= set(stacks):
                shapes = {leaf: tensors[name].shape for leaf, name in stacks.items()}
                found |= _stacked(pair, layout, path, projection, stacks, shapes)
                continue
            parts = {hub.down: None} if projection == "down" else {hub.up: None}
            if projection == "gate_up" and layout.gated and any(e is not None for _, e, _ in here):
                gate, up = base.gate_and_up(path)
                parts = {hub.gate: gate, hub.up: up}
            held = set()
            for name, expert, leaf in here:
                # beyond E lie the identity experts of some families
                if expert is not None and expert < pair.num_experts and leaf in parts:
                    found[name] = Target(pair, expert, parts[leaf])
                    held.add((expert, leaf))
                    _check(
                        name,
                        tensors[name].shape,
                        (pair.out_features // len(parts), pair.in_features),
                    )
            if len(held) != pair.num_experts * len(parts):
                raise RefusedError(
                    f"{base.name} holds {len(held)} of the {pair.num_experts * len(parts)} tensors of {path}, "
                    f"{projection}: its experts are stored in a way that is not known (quantized, perhaps). "
                    "Save the model once with transformers' save_pretrained, dequantized, and merge into that."
                )
    known = {_resolved(base, name): name for name in tensors}
    for path, linear in adapter.linears.items():
        name = known.get(f"{path}.weight")
        if name is None:
            raise RefusedError(
                f"{base.name} has no tensor {path}.weight for the adapter's LoRA on it."
            )
        embedding = ".lora_embedding_" in linear.A
        B, A = (adapter.file.tensors[adapter.names[key]].shape for key in (linear.B, linear.A))
        _check(name, tensors[name].shape, (A[1], B[0]) if embedding else (B[0], A[1]))
        found[name] = Target(linear, transposed=embedding)
    return found


def _expert_name(base: BaseModel, name: str) -> tuple[str, int | None, str]:
    """(path, expert or None, name of the stack or of the expert's projection), as far as a tensor is of experts."""
    renamed = base.renamed(name)
    path = renamed.rpartition(".")[0]
    # a stack may lie in a module of its own within the experts
    while path and path not in base.experts:
        path = path.rpartition(".")[0]
    leaf = renamed.removeprefix(f"{path}.")
    if path and any(
        leaf in p.weights or leaf == p.bias for p in base.experts[path].projections.values()
    ):
        return path, None, leaf
    parts = name.removesuffix(".weight").split(".")
    expert = int(parts[-2]) if len(parts) > 2 and parts[-2].isdigit() else None
    path = ".".join(parts[: -1 if expert is None else -2])
    return base.resolve(path), expert, parts[-1]


def _stacked(
    pair: Pair,
    layout: ExpertsLayout,
    path: str,
    projection: str,
    stacks: dict[str, str],
    shapes: dict,
) -> dict[str, Target]:
    """Tensor -> update, of a projection whose experts lie in stacks: one of all its rows, or gate's and up's.

    Args:
        pair, layout, path, projection: of the update.
        stacks: parameter name -> tensor of the checkpoint.
        shapes: parameter name -> its shape there.
    """
    size, found = layout.projection(projection), {}
    n = size.out_features // len(size.weights)
    for i, weight in enumerate(size.weights):
        flat = len(shapes[weight]) == 2
        transposed = size.transposed if flat else _is_transposed(layout, path, shapes)
        stack = (
            layout.num_experts,
            *((size.in_features, n) if transposed else (n, size.in_features)),
        )
        _check(stacks[weight], shapes[weight], (stack[0] * stack[1], stack[2]) if flat else stack)
        rows = slice(i * n, (i + 1) * n) if len(size.weights) > 1 else None
        found[stacks[weight]] = Target(pair, rows=rows, transposed=transposed, stack=stack)
    return found


def _is_transposed(layout: ExpertsLayout, path: str, tensors: dict[str, tuple[int, ...]]) -> bool:
    """Whether the stacks of a module are stored [E, K, N]; some families' published files differ from their modules.

    Args:
        layout: of the module.
        path: of the module.
        tensors: parameter name -> shape of the stacks in the checkpoint. Where K = N the other stack decides.
    """
    seen = set()
    for projection in layout.projections.values():
        E, K, N = layout.num_experts, projection.in_features, projection.out_features
        shape = tensors.get(projection.weight)
        if shape is not None and shape == (E, K, N) != (E, N, K):
            seen.add(True)
        elif shape is not None:
            _check(f"{path}.{projection.weight}", shape, (E, N, K))
            seen |= {False} if K != N else set()
    if len(seen) == 2:
        raise AdapterError(
            f"the checkpoint stores one stack of {path} transposed and the other not; is it whole?"
        )
    return seen.pop() if seen else layout.transposed


def _check(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise AdapterError(
            f"the checkpoint's {name} is {list(shape)}, not {list(expected)}; is it the config's model, unquantized?"
        )


@dataclass
class _Merger:
    adapter: Adapter
    targets: dict[str, Target]
    replaced: dict[str, str]
    rounding: Rounding
    loaded: tuple | None = None

    def blocks(self, shard: TensorFile) -> Iterator[Block]:
        # tensors of one projection one after the other, so that its A and B are read once
        order = {id(target.pair): i for i, target in enumerate(self.targets.values())}
        for name in sorted(
            shard.tensors,
            key=lambda n: order[id(self.targets[n].pair)] if n in self.targets else -1,
        ):
            info = shard.tensors[name]
            if name in self.targets and not info.dtype.is_floating_point:
                raise RefusedError(
                    f"{shard.path}: {name} is {info.dtype}; merge into an unquantized checkpoint."
                )
            yield Block({name: info.shape}, info.dtype, partial(self._make, shard, name))

    def _make(self, shard: TensorFile, name: str) -> Iterable[torch.Tensor]:
        if name in self.replaced:
            source = self.adapter.names[self.replaced[name]]
            _check(name, shard.tensors[name].shape, self.adapter.file.tensors[source].shape)
            yield self.adapter.file.load(source).to(shard.tensors[name].dtype)
        elif name not in self.targets:
            yield shard.load(name, check=False)
        elif (target := self.targets[name]).stack is not None:
            for e in range(target.pair.num_experts):
                weight = shard.load(name, row=e, check=False, view=target.stack)
                yield self._merged(weight, replace(target, expert=e))
        else:
            yield self._merged(shard.load(name, check=False), target)

    def _merged(self, weight: torch.Tensor, target: Target) -> torch.Tensor:
        A, B = self._factors(target.pair)
        if target.expert is not None:
            A, B = (
                A[target.expert],
                B[target.expert] if target.rows is None else B[target.expert, target.rows],
            )
        # at least fp32: the product of bf16 factors is not rounded before it is added
        dtype = torch.promote_types(torch.promote_types(A.dtype, weight.dtype), torch.float32)
        A, B, scaling = A.to(dtype), B.to(dtype), target.pair.scaling
        left, right = (A.mT, B.mT) if target.transposed else (B, A)
        exact = torch.addmm(weight.to(dtype), left, right, alpha=scaling)
        merged = exact.to(weight.dtype)
        if not torch.isfinite(merged).all():
            raise AdapterError(
                f"a merged weight is not finite in {weight.dtype}; the adapter or the base is damaged."
            )
        self.rounding.add(merged, exact, scaling, A, B)
        return merged

    def _factors(self, pair: Pair | LinearPair) -> tuple[torch.Tensor, torch.Tensor]:
        if self.loaded is None or self.loaded[0] is not pair:
            self.loaded = None
            if isinstance(pair, Pair):
                factors = pair.load()
            else:
                factors = tuple(
                    self.adapter.file.load(self.adapter.names[key]) for key in (pair.A, pair.B)
                )
            self.loaded = (pair, factors)
        return self.loaded[1]
