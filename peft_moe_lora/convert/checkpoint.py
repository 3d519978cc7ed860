"""A base model's checkpoint on disk, and which of its tensors get which update of an adapter.

The experts of a module are stored stacked, as in transformers 5, or with a tensor for each of them,
under the names of published checkpoints.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..experts.layout import ExpertsLayout
from ..files.tensor_file import AdapterError, RefusedError, TensorFile, TensorInfo, read_json
from .base import BaseModel
from .model import Adapter, LinearPair, Pair

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class Target:
    """Where a tensor of the checkpoint gets its update from.

    Attributes:
        pair: of the experts' projection, or of an ordinary layer.
        expert: the one expert the tensor holds; None where it holds all of them, stacked.
        rows: the rows of the projection the tensor holds: gate's, up's, or None for all.
        transposed: whether the tensor is stored [.., K, N].
        stack: the tensor's shape with the experts as a dimension of their own, where it is a stack.
    """

    pair: Pair | LinearPair
    expert: int | None = None
    rows: slice | None = None
    transposed: bool = False
    stack: tuple[int, ...] | None = None


class _ExpertTensor(NamedTuple):
    """A tensor of the checkpoint that lies within an experts module.

    Attributes:
        name: in the checkpoint.
        expert: the one expert it holds; None for a stack.
        leaf: name of the stack, or of the expert's projection.
    """

    name: str
    expert: int | None
    leaf: str


def shard_paths(base: Path) -> list[Path]:
    """The checkpoint's safetensors files.

    Raises:
        AdapterError: if the index names files that are not there or are outside the folder, or
            other tensors than the files hold.
    """
    index = base / INDEX_NAME
    if not index.is_file():
        if not (base / SINGLE_NAME).is_file():
            raise AdapterError(
                f"{base} holds neither {SINGLE_NAME} nor {INDEX_NAME}; merging needs its weights."
            )
        return [base / SINGLE_NAME]
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise AdapterError(
            f"{index} has no weight_map of tensor names and files; download it again."
        )
    for file in set(named.values()):
        # a bare name: an index must not lead outside its folder
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise AdapterError(
                f"{index} names {file!r}, which is not the name of a safetensors file beside it."
            )
        if not (base / file).is_file():
            raise AdapterError(
                f"{index} names {file}, which is missing; download the checkpoint again."
            )
    files = [base / file for file in sorted(set(named.values()))]
    held = {name for file in files for name in TensorFile(file).tensors}
    different = sorted(held ^ set(named))
    if different:
        raise AdapterError(
            f"{index} and the files beside it differ on {different[0]}; download the checkpoint "
            "again."
        )
    return files


def resolved_name(base: BaseModel, name: str) -> str:
    """The name of a checkpoint's tensor in the model's own paths."""
    path, _, last = name.rpartition(".")
    return f"{base.resolve(path)}.{last}"


def find_targets(
    adapter: Adapter, base: BaseModel, tensors: Mapping[str, TensorInfo]
) -> dict[str, Target]:
    """Tensor of the checkpoint -> its update.

    Raises:
        AdapterError: if a tensor's shape is not that of the base model.
        RefusedError: if the checkpoint has no tensor for a part of the adapter.
    """
    return {
        **_expert_targets(adapter, base, tensors),
        **_linear_targets(adapter, base, tensors),
    }


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Compare the shape of a checkpoint's tensor with what the base model says.

    Raises:
        AdapterError: if they differ.
    """
    if shape != expected:
        raise AdapterError(
            f"the checkpoint's {name} is {list(shape)} and must be {list(expected)}; take the "
            "checkpoint that the config belongs to, unquantized."
        )


def _expert_targets(
    adapter: Adapter, base: BaseModel, tensors: Mapping[str, TensorInfo]
) -> dict[str, Target]:
    of_path: dict[str, list[_ExpertTensor]] = {}
    for name in tensors:
        path, tensor = _expert_tensor(base, name)
        of_path.setdefault(path, []).append(tensor)
    found: dict[str, Target] = {}
    for path, pairs in adapter.experts.items():
        here = of_path.get(path, [])
        stacks = {tensor.leaf: tensor.name for tensor in here if tensor.expert is None}
        for projection, pair in pairs.items():
            if set(base.experts[path].projection(projection).weights) <= set(stacks):
                found |= _stacked(pair, base.experts[path], path, projection, stacks, tensors)
            else:
                found |= _one_by_one(pair, base, path, projection, here, tensors)
    return found


def _linear_targets(
    adapter: Adapter, base: BaseModel, tensors: Mapping[str, TensorInfo]
) -> dict[str, Target]:
    known = {resolved_name(base, name): name for name in tensors}
    found = {}
    for path, linear in adapter.linears.items():
        name = known.get(f"{path}.weight")
        if name is None:
            raise RefusedError(
                f"{base.name} has no tensor {path}.weight, to which the adapter adds LoRA."
            )
        embedding = ".lora_embedding_" in linear.A
        in_features = adapter.file.tensors[adapter.names[linear.A]].shape[1]
        out_features = adapter.file.tensors[adapter.names[linear.B]].shape[0]
        expected = (out_features, in_features)
        if embedding:
            # nn.Embedding stores its weight the other way round
            expected = (in_features, out_features)
        check_shape(name, tensors[name].shape, expected)
        found[name] = Target(linear, transposed=embedding)
    return found


def _expert_tensor(base: BaseModel, name: str) -> tuple[str, _ExpertTensor]:
    """The path of the experts module a tensor lies in, and what it holds of it.

    A tensor that is not of experts gets the path of its own module.
    """
    renamed = base.renamed(name)
    path = renamed.rpartition(".")[0]
    # a stack may be in a module of its own within the experts module
    while path and path not in base.experts:
        path = path.rpartition(".")[0]
    leaf = renamed.removeprefix(f"{path}.")
    if path and leaf in _parameters(base.experts[path]):
        return path, _ExpertTensor(name, None, leaf)
    parts = name.removesuffix(".weight").split(".")
    if len(parts) > 2 and parts[-2].isdigit():
        return base.resolve(".".join(parts[:-2])), _ExpertTensor(name, int(parts[-2]), parts[-1])
    return base.resolve(".".join(parts[:-1])), _ExpertTensor(name, None, parts[-1])


def _parameters(layout: ExpertsLayout) -> Iterator[str | None]:
    """The names of an experts module's stacks of weights and biases."""
    for projection in layout.projections.values():
        yield from projection.weights
        yield projection.bias


def _one_by_one(
    pair: Pair,
    base: BaseModel,
    path: str,
    projection: str,
    here: Sequence[_ExpertTensor],
    tensors: Mapping[str, TensorInfo],
) -> dict[str, Target]:
    """Tensor -> update, of a projection whose experts have tensors of their own.

    Args:
        pair, path, projection: of the update.
        base: the base model.
        here: the tensors of the experts module.
        tensors: all tensors of the checkpoint.
    """
    parts = _parts(base, path, projection, here)
    expected = (pair.out_features // len(parts), pair.in_features)
    found = {}
    held = set()
    for tensor in here:
        # some families have identity experts beyond E
        if tensor.expert is None or tensor.expert >= pair.num_experts or tensor.leaf not in parts:
            continue
        check_shape(tensor.name, tensors[tensor.name].shape, expected)
        found[tensor.name] = Target(pair, tensor.expert, parts[tensor.leaf])
        held.add((tensor.expert, tensor.leaf))
    wanted = pair.num_experts * len(parts)
    if len(held) != wanted:
        raise RefusedError(
            f"{base.name} holds {len(held)} of the {wanted} tensors of {path}, {projection}: its "
            "experts are stored in a way that is not known (quantized, perhaps). Save the model "
            "once with transformers' save_pretrained, dequantized, and merge into that."
        )
    return found


def _parts(
    base: BaseModel, path: str, projection: str, here: Sequence[_ExpertTensor]
) -> dict[str, slice | None]:
    """Published name of each part of a projection -> its rows in the projection, None for all."""
    names = base.hub_names
    if projection == "down":
        return {names.down: None}
    of_one_expert = any(tensor.expert is not None for tensor in here)
    if projection == "gate_up" and base.experts[path].gated and of_one_expert:
        gate, up = base.gate_and_up(path)
        return {names.gate: gate, names.up: up}
    return {names.up: None}


def _stacked(
    pair: Pair,
    layout: ExpertsLayout,
    path: str,
    projection: str,
    stacks: Mapping[str, str],
    tensors: Mapping[str, TensorInfo],
) -> dict[str, Target]:
    """Tensor -> update, of a projection whose experts are stacked.

    One stack holds all rows of a projection, or one holds those of gate and another those of up.

    Args:
        pair, layout, path, projection: of the update.
        stacks: parameter name -> tensor of the checkpoint.
        tensors: all tensors of the checkpoint.
    """
    shapes = {weight: tensors[name].shape for weight, name in stacks.items()}
    size = layout.projection(projection)
    n = size.out_features // len(size.weights)
    found = {}
    for i, weight in enumerate(size.weights):
        flat = len(shapes[weight]) == 2
        transposed = size.transposed
        if not flat:
            transposed = _is_transposed(layout, path, shapes)
        stack = (layout.num_experts, n, size.in_features)
        if transposed:
            stack = (layout.num_experts, size.in_features, n)
        expected: tuple[int, ...] = stack
        if flat:
            expected = (stack[0] * stack[1], stack[2])
        check_shape(stacks[weight], shapes[weight], expected)
        rows = None
        if len(size.weights) > 1:
            rows = slice(i * n, (i + 1) * n)
        found[stacks[weight]] = Target(pair, rows=rows, transposed=transposed, stack=stack)
    return found


def _is_transposed(layout: ExpertsLayout, path: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the stacks of a module are stored [E, K, N].

    The published files of some families differ from their modules in this, so the shapes decide;
    where K = N, the shape of the other stack does.

    Args:
        layout: of the module.
        path: of the module.
        shapes: parameter name -> shape of the stack in the checkpoint.
    """
    seen = set()
    for projection in layout.projections.values():
        shape = shapes.get(projection.weight)
        if shape is None:
            continue
        plain = (layout.num_experts, projection.out_features, projection.in_features)
        transposed = (layout.num_experts, projection.in_features, projection.out_features)
        if shape == transposed and transposed != plain:
            seen.add(True)
            continue
        check_shape(f"{path}.{projection.weight}", shape, plain)
        if transposed != plain:
            seen.add(False)
    if len(seen) == 2:
        raise AdapterError(
            f"the checkpoint stores one stack of {path} transposed and the other not; download it "
            "again."
        )
    if not seen:
        return layout.transposed
    return seen.pop()
