"""A base model's checkpoint on disk, and which of its tensors get which update of an adapter.

The experts of a module are stored as stacks, as in transformers 5, or as one tensor for each
expert, under the names of published checkpoints.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..experts.layout import ExpertsLayout
from ..files.folders import check_own_file
from ..files.tensor_file import AdapterError, RefusedError, TensorFile, TensorInfo, read_json
from ..files.text import quoted
from .base import BaseModel
from .model import Adapter, LinearPair, Pair

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class Target:
    """The update of one tensor of the checkpoint.

    Attributes:
        pair: A, B and the scaling of the experts' projection, or of an ordinary layer.
        expert: id of the one expert that the tensor holds; None if it holds a stack of all experts.
        rows: the rows of the projection that the tensor holds: gate's or up's; None for all rows.
        transposed: whether the tensor is stored as [.., K, N].
        stack: for a stack, its shape with the experts as the first of three dimensions; else None.
    """

    pair: Pair | LinearPair
    expert: int | None = None
    rows: slice | None = None
    transposed: bool = False
    stack: tuple[int, ...] | None = None


class _ExpertTensor(NamedTuple):
    """A tensor of the checkpoint that belongs to an experts module.

    Attributes:
        name: the tensor's name in the checkpoint.
        expert: id of the one expert that it holds; None for a stack.
        leaf: name of the stack, or of the expert's projection.
    """

    name: str
    expert: int | None
    leaf: str


def shard_paths(base: Path) -> list[Path]:
    """The checkpoint's safetensors files.

    Raises:
        AdapterError: if the index names a file that is missing or outside the folder, if a file is
            a link that leads out of it, or if the tensors in the files differ from the index.
        RefusedError: if the folder holds two checkpoints, in one file and in shards.
    """
    index = base / INDEX_NAME
    single = base / SINGLE_NAME
    check_own_file(index)
    check_own_file(single)
    if not index.is_file():
        if not single.is_file():
            raise AdapterError(
                f"{base} holds neither {SINGLE_NAME} nor {INDEX_NAME}, but merging needs its "
                "weights; download the checkpoint as safetensors."
            )
        return [single]
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise AdapterError(
            f"{index} has no weight_map of tensor names and files; download it again."
        )
    shards = set(named.values())
    if single.is_file() and SINGLE_NAME not in shards:
        # transformers' save_pretrained leaves the one when it writes the other
        _check_left_over(base, shards)
        return [single]
    for file in shards:
        # a bare file name, so that no file outside the folder is read
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise AdapterError(
                f"{index} names {quoted(file)}, which is not the name of a safetensors file in its "
                "folder; download the checkpoint again."
            )
        check_own_file(base / file)
        if not (base / file).is_file():
            raise AdapterError(
                f"{index} names {file}, which is missing; download the checkpoint again."
            )
    files = [base / file for file in sorted(shards)]
    held = {name for file in files for name in TensorFile(file).tensors}
    different = sorted(held ^ set(named))
    if different:
        raise AdapterError(
            f"{index} and the files in its folder differ on {different[0]}; download the "
            "checkpoint again."
        )
    return files


def _check_left_over(base: Path, shards: Iterable[str]) -> None:
    """Check that of the shards of an index, beside which there is a whole file, nothing is left.

    Raises:
        RefusedError: if a shard is there.
    """
    present = [file for file in sorted(shards) if (base / Path(file).name).is_file()]
    if present:
        raise RefusedError(
            f"{base} holds {SINGLE_NAME}, which transformers loads, and {present[0]} with an "
            f"{INDEX_NAME}, which others load; remove the one that is not the base model."
        )


def own_names(base: BaseModel, tensors: Iterable[str]) -> dict[str, str]:
    """Name of a tensor in the base model -> its name in the checkpoint.

    Names of tied tensors that the checkpoint leaves out lead to one that it holds.
    """
    names = {}
    for name in tensors:
        path, _, last = name.rpartition(".")
        names[f"{base.resolve(path)}.{last}"] = name
    for held in base.tied & names.keys():
        for other in base.tied:
            names.setdefault(other, names[held])
    return names


def find_targets(
    adapter: Adapter, base: BaseModel, tensors: Mapping[str, TensorInfo]
) -> dict[str, Target]:
    """Name of a tensor in the checkpoint -> its update.

    Raises:
        AdapterError: if a tensor's shape does not fit the base model.
        RefusedError: if the checkpoint has no tensor for a part of the adapter.
    """
    return {
        **_expert_targets(adapter, base, tensors),
        **_linear_targets(adapter, base, tensors),
    }


def check_shape(name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Check that a checkpoint's tensor has the expected shape.

    Raises:
        AdapterError: if it has another shape.
    """
    if shape != expected:
        raise AdapterError(
            f"the checkpoint's {name} must have shape {list(expected)}, but has {list(shape)}; use "
            "the unquantized checkpoint that belongs to the config."
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
    known = own_names(base, tensors)
    found = {}
    for path, linear in adapter.linears.items():
        name = known.get(f"{path}.weight")
        if name is None:
            raise RefusedError(
                f"{base.name} has no tensor {path}.weight, but the adapter updates it; merge into "
                "the base model that the adapter was trained on."
            )
        in_features = adapter.file.tensors[adapter.names[linear.A]].shape[1]
        out_features = adapter.file.tensors[adapter.names[linear.B]].shape[0]
        expected = (out_features, in_features)
        if linear.is_embedding:
            # nn.Embedding stores its weight as [in_features, out_features]
            expected = (in_features, out_features)
        check_shape(name, tensors[name].shape, expected)
        found[name] = Target(linear, transposed=linear.is_embedding)
    return found


def _expert_tensor(base: BaseModel, name: str) -> tuple[str, _ExpertTensor]:
    """The path of the experts module that a tensor belongs to, and what the tensor holds.

    For a tensor that does not belong to experts, it is the path of the tensor's own module.
    """
    renamed = base.renamed(name)
    path = renamed.rpartition(".")[0]
    # a stack may be in a submodule of the experts module
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
    """Tensor -> update, for a projection that is stored as separate tensors of each expert.

    Args:
        pair, path, projection: the update, its experts module and its projection.
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
            "experts are stored in a way that is not known (perhaps quantized). Save the "
            "dequantized model with transformers' save_pretrained, and merge into that checkpoint."
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
    """Tensor -> update, for a projection whose experts are stored as stacks.

    One stack holds all rows of the projection, or one stack holds the rows of gate and another the
    rows of up.

    Args:
        pair, layout, path, projection: the update, its experts module and its projection.
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
    """Whether the stacks of a module are stored as [E, K, N].

    In some families the published files and the modules differ in this order. So the shapes of the
    stacks decide. If one stack has K = N, the shape of the other stack decides.

    Args:
        layout: layout of the module.
        path: path of the module.
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
            f"the checkpoint stores only one of the two stacks of {path} transposed; download it "
            "again."
        )
    if not seen:
        return layout.transposed
    return seen.pop()
