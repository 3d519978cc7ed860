"""Checks an adapter file against a model, before the model is changed."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..config import MoELoraConfig
from ..experts.layout import ExpertsLayout
from ..experts.routers import linear_features
from ..experts.stored import shape_of
from ..files.adapter_file import AdapterFile, Held, Trained, check_all_there, check_trained
from ..files.text import shown
from ..parallel import zero
from ..parallel.sharding import CHECKPOINT_WRAPPER, is_sharded
from .beside import Shape, Tensors
from .saving import PEFT_PREFIX


class ExpertsTarget(NamedTuple):
    """How a configuration adapts one experts module.

    Attributes:
        layout: layout of the module.
        r: rank of the adapter.
        chosen: ascending ids of the experts that get an adapter; None for all.
    """

    layout: ExpertsLayout
    r: int
    chosen: tuple[int, ...] | None


@dataclass(frozen=True)
class Targets:
    """How a configuration adapts a model. All paths are paths in the base model.

    Attributes:
        experts: path of a targeted experts module -> its layout, rank and chosen experts.
        others: path of another targeted module -> the base module and the rank.
        beside: the tensors that the file holds beside A and B.
        dtype: the narrowest dtype of the model's weights.
    """

    experts: Mapping[str, ExpertsTarget]
    others: Mapping[str, tuple[nn.Module, int]]
    beside: Tensors
    dtype: torch.dtype

    def expected_shapes(self, config: MoELoraConfig) -> dict[str, Shape]:
        """Key in the file -> shape, of every tensor that the file must hold and that is known."""
        shapes = dict(self.beside.needed)
        for key, target in self.experts.items():
            shapes |= _shapes_of_experts(key, target, config)
        for key, (module, r) in self.others.items():
            shapes |= _shapes_of_other(key, module, r)
        return _prefixed(shapes)


def _shapes_of_experts(key: str, target: ExpertsTarget, config: MoELoraConfig) -> dict[str, Shape]:
    number = target.layout.num_experts
    if target.chosen is not None:
        number = len(target.chosen)
    ranks = target.r * number
    shapes: dict[str, Shape] = {}
    for name in config.projections_of(key, target.layout):
        projection = target.layout.projection(name)
        shapes[f"{key}.lora_A.{name}"] = (ranks, projection.in_features)
        shapes[f"{key}.lora_B.{name}"] = (projection.out_features, ranks)
    return shapes


def _shapes_of_other(key: str, module: nn.Module, r: int) -> dict[str, Shape]:
    """Shapes of the tensors with which PEFT adapts a module; {} if they are not known here."""
    if isinstance(module, nn.Embedding):
        return {
            f"{key}.lora_embedding_A": (r, module.num_embeddings),
            f"{key}.lora_embedding_B": (module.embedding_dim, r),
        }
    features = linear_features(module)
    if features is None:
        return {}
    in_features, out_features = features
    return {
        f"{key}.lora_A.weight": (r, in_features),
        f"{key}.lora_B.weight": (out_features, r),
    }


def check_file(file: AdapterFile, targets: Targets, config: MoELoraConfig) -> None:
    """Check that an adapter file fits a model, before the model is changed.

    Raises:
        ValueError: if a tensor is missing, unknown, or of a wrong shape, dtype or size of values,
            or if the adapter was made for another number of experts, for other experts, or with
            another rank or scaling.
    """
    _check_prefixes(file)
    for key, description in file.description.get("experts", {}).items():
        if key in targets.experts:
            _check_description(file.path, key, description, targets.experts[key])
    _check_trained(file, targets, config)
    expected = targets.expected_shapes(config)
    allowed = _prefixed(targets.beside.allowed)
    shapes = file.shapes
    _check_vocabulary(file.path, shapes, targets.beside)
    # tensors of modules whose shapes are not known here are checked by PEFT
    known = {key.rpartition(".lora_")[0].removeprefix(PEFT_PREFIX) for key in expected}
    unknown = tuple(f"{key}." for key in set(targets.others) - known)
    free = tuple(PEFT_PREFIX + start for start in (*targets.beside.free, *unknown))
    found = {
        key: shape
        for key, shape in shapes.items()
        if key in expected or (key not in allowed and not key.startswith(free))
    }
    _raise_unless_whole(file.path, found, expected)
    for key, held in file.tensors.items():
        if not key.startswith(free):
            _check_values(file.path, key, held, targets.dtype)
    check_all_there(file)


def _check_prefixes(file: AdapterFile) -> None:
    """Check that every key has PEFT's prefix: PEFT reads no other key."""
    for key in file.tensors:
        if key.startswith(PEFT_PREFIX):
            continue
        if PEFT_PREFIX + key in file.tensors:
            raise ValueError(
                f"{file.path} holds {shown(key)} twice, with the prefix {PEFT_PREFIX} and without "
                "it; keep the tensors of one kind."
            )
        raise ValueError(
            f"{file.path} holds {shown(key)}, but PEFT reads keys that begin with {PEFT_PREFIX}; "
            'convert_adapter(path, new_path, to="moe_lora") adds the prefix.'
        )


def _check_values(path: str, key: str, held: Held, dtype: torch.dtype) -> None:
    """Check that the values of a tensor are numbers that the model can hold.

    Args:
        path, key: of the tensor, for the message.
        held: the tensor.
        dtype: the narrowest dtype of the model's weights.
    """
    ends = (".weight", ".bias", ".trainable_tokens_delta")
    is_weight = ".lora_" in key or key.endswith(ends)
    # 8-bit floats need scales, which an adapter does not have
    if is_weight and (not held.dtype.is_floating_point or held.dtype.itemsize == 1):
        raise ValueError(
            f"{path}: {shown(key)} is {held.dtype}, but weights must be floating point of at least "
            "16 bits; copy or save the adapter again."
        )
    if held.largest > torch.finfo(dtype).max:
        raise ValueError(
            f"{path}: {shown(key)} holds a value of size {held.largest:g}, but the model computes "
            f"in {dtype}, which ends at {torch.finfo(dtype).max:g}; load the base model in "
            "bfloat16 or float32, or use an earlier checkpoint."
        )


def _prefixed(shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    return {PEFT_PREFIX + key: shape for key, shape in shapes.items()}


def _check_vocabulary(path: str, shapes: Mapping[str, Shape], beside: Tensors) -> None:
    """Check that the embeddings in the file have as many rows as those of the model."""
    for key, shape in _prefixed(beside.allowed).items():
        found = shapes.get(key, shape)
        if found == shape:
            continue
        remedy = "load the base model that the adapter was trained on"
        if key.endswith(".weight") and found[1:] == shape[1:]:
            remedy = (
                f"the vocabulary was resized when the adapter was trained, so call "
                f"model.resize_token_embeddings({found[0]}) before the adapter is loaded"
            )
        raise ValueError(
            f"{path} holds {shown(key)} of shape {found}, but the model has {shape} there; "
            f"{remedy}."
        )


def _check_description(
    path: str, key: str, description: Mapping[str, Any], target: ExpertsTarget
) -> None:
    num_experts = description.get("num_experts")
    if num_experts != target.layout.num_experts:
        raise ValueError(
            f"{path} holds an adapter for {num_experts} experts in {key}, but the model has "
            f"{target.layout.num_experts} there; load the base model that the adapter was trained "
            "on."
        )
    held = description.get("experts")
    chosen: list[int] | None = None
    if target.chosen is not None:
        chosen = list(target.chosen)
    if held != chosen:
        raise ValueError(
            f"{path} holds {_listed_experts(held)} in {key}, but expert_indices chooses "
            f"{_listed_experts(chosen)}; load the adapter with the adapter_config.json that was "
            "saved with it."
        )


def _check_trained(file: AdapterFile, targets: Targets, config: MoELoraConfig) -> None:
    """Compare rank and scaling of every target with those in the file's metadata."""
    trained = file.description.get("trained", {})
    layers = {key: key for key in targets.others}
    for key, target in targets.experts.items():
        for name in config.projections_of(key, target.layout):
            layers[f"{key}.{name}"] = key
    for layer, key in layers.items():
        given = Trained(config.rank_of(key), config.scaling_of(key))
        check_trained(file.path, layer, trained.get(layer), given)


def narrowest_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a model's weights that ends first; 8-bit codes do not count."""
    found = {parameter.dtype for parameter in model.parameters()}
    wide = [dtype for dtype in found if dtype.is_floating_point and dtype.itemsize > 1]
    return min([torch.float32, *wide], key=lambda dtype: torch.finfo(dtype).max)


def check_state_dict(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> None:
    """Check that a state dict fits the adapted layers of a model, before it is loaded.

    Args:
        model: a model with the adapter.
        adapter_name: the adapter.
        state_dict: keys as in the model, with the adapter's name.
    Raises:
        ValueError: if a tensor is missing, unknown, of a wrong shape or dtype, or not finite in the
            dtype of its parameter.
    """
    parameters = {}
    # key in the model, with the adapter's name -> key in a file
    names = {}
    for start, end, parameter in _parameters_of(model, adapter_name):
        name = start + end
        parameters[name] = parameter
        names[f"{start}.{adapter_name}{end}"] = name
    tensors = {names.get(k, k): tensor for k, tensor in state_dict.items() if ".lora_" in k}
    where = "the adapter's state dict"
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: shape_of(parameter) for name, parameter in parameters.items()}
    _raise_unless_whole(where, found, expected)
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"{where}: {shown(name)} is {tensor.dtype}, but weights must be floating point; "
                "load an earlier checkpoint."
            )
        if not torch.isfinite(tensor.to(parameters[name].dtype)).all():
            raise ValueError(
                f"{where}: tensor {shown(name)} holds NaN or infinity in "
                f"{parameters[name].dtype}; load an earlier checkpoint."
            )


def _parameters_of(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Every A and B of an adapter: the key before the adapter's name, after it, the parameter."""
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for part in layer.adapter_layer_names:
            adapters = getattr(layer, part, {})
            if adapter_name not in adapters:
                continue
            key = path.replace(CHECKPOINT_WRAPPER, "")
            start = f"{key}.{part}".removeprefix(".")
            if isinstance(adapters[adapter_name], nn.Parameter):
                yield start, "", adapters[adapter_name]
                continue
            for name, parameter in adapters[adapter_name].named_parameters():
                yield start, f".{name}", parameter


def keyed_by_adapter(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The state dict with the adapter's name in the keys of its A and B, as the model has them.

    PEFT does not insert it where a checkpoint wrapper is around the layer, and then loads nothing.
    """
    keys = {}
    for start, end, _ in _parameters_of(model, adapter_name):
        key = f"{start}.{adapter_name}{end}"
        keys[start + end] = key
        if not start.startswith(PEFT_PREFIX):
            # a model without a PeftModel around it
            keys[PEFT_PREFIX + start + end] = key
    return {keys.get(key, key): tensor for key, tensor in state_dict.items()}


def placed_as(state_dict: Mapping[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with its whole tensors sharded as the model's parameters of these names.

    Values for parameters under ZeRO-3 are written here, because each process then loads an empty
    tensor. Every process must call this if a parameter is sharded.
    """
    parameters = {
        name.replace(CHECKPOINT_WRAPPER, ""): parameter
        for name, parameter in model.named_parameters()
    }
    placed = {}
    for key, tensor in state_dict.items():
        parameter: Any = parameters.get(key)
        if zero.is_partitioned(parameter):
            zero.write(parameter, tensor)
            tensor = parameter.detach()
        else:
            zero.write_copy(parameter, tensor)
        if is_sharded(parameter) and not is_sharded(tensor):
            from torch.distributed.tensor import distribute_tensor

            if not parameter.is_meta:
                tensor = tensor.to(parameter.device)
            tensor = distribute_tensor(
                tensor, parameter.device_mesh, parameter.placements, src_data_rank=None
            )
        placed[key] = tensor
    return placed


def _raise_unless_whole(
    where: str, found: Mapping[str, Shape], expected: Mapping[str, Shape]
) -> None:
    """Raise an error that lists every difference between the tensors found and those expected."""
    missing = sorted(set(expected) - set(found))
    unknown = sorted(set(found) - set(expected))
    wrong = [
        f"{key} is {found[key]}, not {shape}"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    faults = []
    if missing:
        faults.append(f"misses: {_listed(missing)}")
    if unknown:
        faults.append(f"holds unknown tensors: {_listed(unknown)}")
    if wrong:
        faults.append(f"holds tensors of another shape: {_listed(wrong)}")
    if faults:
        raise ValueError(
            f"{where} {'; '.join(faults)}. It belongs to another model, rank or choice of targets, "
            "or it is damaged; load the base model and the configuration that it was trained with."
        )


def _listed(items: Sequence[str]) -> str:
    """The first three items, and the number of further ones."""
    listed = ", ".join(shown(item) for item in items[:3])
    if len(items) > 3:
        listed += f" and {len(items) - 3} more"
    return listed


def _listed_experts(experts: Iterable[int] | None) -> str:
    if experts is None:
        return "every expert"
    return f"experts {shown(list(experts))}"
