"""The adapter file: safetensors with metadata that describe their layout.

The metadata hold the layout, the format version and the shapes of each module. No model is loaded
here. A file is checked completely before it is used. Changed metadata are written to a second
file, which then replaces the adapter file in one step.
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from .config_fields import is_count, is_finite, is_rank
from .scaling import is_same
from .tensor_file import (
    FilePath,
    RepeatedError,
    check_file,
    check_names,
    encoded_header,
    not_finite,
    not_whole,
    parsed,
    read_header,
)
from .text import quoted, shown
from .writing import check_saved, written_files

# the newest version that can be read. A file of version 2 may hold only some experts of a module. A
# file with all experts is written as version 1
FORMAT_VERSION = 2
CHOSEN_EXPERTS_VERSION = 2
LAYOUT = "expert_major"
METADATA_KEY = "peft_moe_lora"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
# what PEFT writes before the path of a module
PEFT_PREFIX = "base_model.model."

Description = dict[str, Any]


class Trained(NamedTuple):
    """Rank and scaling of one projection of experts, or of one other layer."""

    r: int
    scaling: float


class Held(NamedTuple):
    """One tensor of a file, without its values.

    Attributes:
        shape, dtype: of the tensor.
        largest: the largest |value|; 0 for a tensor without elements.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    largest: float


@dataclass(frozen=True)
class AdapterFile:
    """What a checked adapter file holds.

    Attributes:
        path: the file.
        tensors: tensor name -> what is known of it.
        description: the metadata under METADATA_KEY; {} if the file has none.
    """

    path: str
    tensors: dict[str, Held]
    description: Description

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: held.shape for name, held in self.tensors.items()}


def find_adapter_file(
    model_id: FilePath, subfolder: str | None = None, **hub_kwargs: Any
) -> str | None:
    """Path of the weights of an adapter; None if there is a configuration without weights.

    Args:
        model_id: a folder, or a name on the hub, from which the file is downloaded.
        subfolder: the adapter's folder within `model_id`.
        hub_kwargs: further arguments of `hf_hub_download`.
    Raises:
        ValueError: if the weights are a pickle, or not a file, or if saving was interrupted while
            they took their place.
    """
    folder = Path(model_id, subfolder or "")
    if folder.is_dir():
        check_saved(folder)
        weights = folder / WEIGHTS_NAME
        pickle = folder / PICKLE_NAME
        check_file(weights)
        if weights.is_file():
            return str(weights)
        if pickle.is_file():
            raise ValueError(
                f"{pickle}: pickled weights are not loaded; save the adapter again as safetensors "
                f"({WEIGHTS_NAME})."
            )
        return None
    hub_kwargs.pop("use_auth_token", None)
    try:
        return hf_hub_download(str(model_id), WEIGHTS_NAME, subfolder=subfolder, **hub_kwargs)
    except (EntryNotFoundError, LocalEntryNotFoundError):
        return None


def read_adapter_file(path: str) -> AdapterFile:
    """Read the header and all values of an adapter file, one tensor at a time.

    Raises:
        ValueError: if it is cut short or not a safetensors file, if its layout or version is
            unknown, or if a value is NaN or infinite.
    """
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            description = read_description(path, file.metadata() or {})
            check_names(path, file.keys())
            for name in file.keys():
                tensors[name] = _held(file.get_tensor(name))
                if not math.isfinite(tensors[name].largest):
                    raise ValueError(not_finite(path, name))
    except (SafetensorError, OSError) as error:
        raise ValueError(not_whole(path, error)) from error
    return AdapterFile(path, tensors, description)


def check_all_there(file: AdapterFile) -> None:
    """Check that a file has tensors of every layer that its metadata say was trained.

    Raises:
        ValueError: if it has none of one. The message names the layer.
    """
    modules = file.description.get("experts", {})
    for layer in file.description.get("trained", {}):
        module, _, projection = layer.rpartition(".")
        names = [f"{layer}.lora_A.weight", f"{layer}.lora_embedding_A"]
        if module in modules:
            names = [f"{module}.lora_A.{projection}"]
        if not any(PEFT_PREFIX + name in file.tensors for name in names):
            raise ValueError(without_tensors(file.path, layer))


def without_tensors(path: FilePath, layer: str) -> str:
    """The message for a layer that was trained, and of which the file has no tensors."""
    return (
        f"{path}: its metadata name {shown(layer)}, of which the file has no tensors; copy or save "
        "the adapter again."
    )


def _held(tensor: torch.Tensor) -> Held:
    largest = 0.0
    if tensor.is_floating_point() and tensor.numel():
        wide = tensor
        if tensor.dtype.itemsize == 1:
            # torch has no maximum of 8-bit floats
            wide = tensor.float()
        largest = wide.abs().max().item()
    return Held(tuple(tensor.shape), tensor.dtype, largest)


def complete_adapter_file(folder: FilePath, description: Description) -> None:
    """Write the description into the metadata of the adapter file that was just saved in a folder.

    Raises:
        ValueError: if a pickle was saved instead, which is removed; if the file has a description
            already, and another one: then it was not saved just now, and holds another adapter.
    """
    weights = Path(folder, WEIGHTS_NAME)
    pickle = Path(folder, PICKLE_NAME)
    if pickle.is_file() and (not weights.is_file() or _is_newer(pickle, weights)):
        pickle.unlink()
        raise ValueError(
            "safe_serialization=False is not supported: adapters are saved as safetensors, because "
            "their metadata hold the layout; leave safe_serialization unset."
        )
    if weights.is_file():
        described = json.dumps(description, sort_keys=True)
        _check_same(weights, json.loads(described))
        _replace_metadata(weights, {"format": "pt", METADATA_KEY: described})


def _check_same(weights: Path, description: Description) -> None:
    """Check that a file has no description yet, or one that says nothing else than this one."""
    with weights.open("rb") as file:
        header = read_header(file)
    present = read_description(str(weights), header.get("__metadata__") or {})
    # files of earlier releases say less
    said = {name: value for name, value in present.items() if name != "format_version"}
    says_the_same = all(description.get(name) == value for name, value in said.items())
    if not says_the_same or not _has_ranks(header, description):
        raise ValueError(
            f"{weights} holds another adapter: it has other modules, ranks or scalings than the "
            "one whose configuration is being saved there. Nothing was written; give a folder "
            "that holds the same adapter, or a new one."
        )


def _has_ranks(header: Mapping[str, Any], description: Description) -> bool:
    """Whether every A of a file that a description names has as many rows as it says."""
    modules = description.get("experts", {})
    for layer, numbers in description.get("trained", {}).items():
        path, _, projection = layer.rpartition(".")
        rows = numbers["r"]
        name = f"{layer}.lora_A.weight"
        module = modules.get(path)
        if module is not None:
            rows *= len(module.get("experts") or range(module["num_experts"]))
            name = f"{path}.lora_A.{projection}"
        A = header.get(PEFT_PREFIX + name)
        if A is not None and A["shape"][0] != rows:
            return False
    return True


def described_module(num_experts: int, experts: Sequence[int] | None) -> Description:
    """The metadata of one experts module, without its projections.

    Args:
        num_experts: E.
        experts: ids of the experts that have an adapter; None if all have one.
    """
    described: Description = {"num_experts": num_experts}
    if experts is not None:
        described["experts"] = list(experts)
    return described


def described(
    modules: dict[str, Description], routers: list[str], trained: Mapping[str, Trained]
) -> Description:
    """The description of a whole file, in the oldest format version that can express it.

    Args:
        modules: path -> description of an experts module.
        routers: paths of the routers.
        trained: `<path>.<projection>` of an experts module, or the path of another layer -> the
            rank and scaling that the layer was trained with.
    """
    version = 1
    if any("experts" in module for module in modules.values()):
        version = CHOSEN_EXPERTS_VERSION
    return {
        "format_version": version,
        "layout": LAYOUT,
        "experts": modules,
        "routers": routers,
        "trained": {path: numbers._asdict() for path, numbers in trained.items()},
    }


def check_trained(path: str, layer: str, said: object, given: Trained) -> None:
    """Compare rank and scaling in a file's metadata with those of its adapter_config.json.

    Args:
        path: path of the file.
        layer: key of the layer under "trained".
        said: the entry of the layer; None in files of earlier releases, which have none.
        given: what the configuration gives the layer.
    Raises:
        ValueError: if they differ.
    """
    if not isinstance(said, Mapping):
        return
    was = Trained(**said)
    if was.r == given.r and is_same(was.scaling, given.scaling):
        return
    raise ValueError(
        f"{path}: {layer} was saved with rank {was.r} and scaling {was.scaling:g}, but the "
        f"configuration gives it rank {given.r} and scaling {given.scaling:g}. Load the adapter "
        "with the adapter_config.json that was saved with it; then set_scale(adapter_name, factor) "
        "of each LoRA layer changes the scaling."
    )


def read_description(path: str, metadata: Mapping[str, str]) -> Description:
    """The entry METADATA_KEY of a file's metadata; {} if there is none.

    Args:
        path: path of the file, for error messages.
        metadata: the metadata in the file's header.
    Raises:
        ValueError: if it is not a JSON object, if its layout or version is unknown, or if it does
            not describe modules as `described` does.
    """
    try:
        description = parsed(metadata.get(METADATA_KEY, "{}"))
    except RepeatedError as error:
        raise ValueError(
            f"{path}: in its metadata {METADATA_KEY!r}, {error}; save the adapter again."
        ) from error
    except RecursionError as error:
        raise ValueError(
            f"{path}: its metadata {METADATA_KEY!r} are nested too deeply; save the adapter again."
        ) from error
    except ValueError as error:
        # not JSON, or an integer of thousands of digits
        raise ValueError(
            f"{path}: its metadata {METADATA_KEY!r} are not JSON ({shown(error)}); save the "
            "adapter again."
        ) from error
    if not isinstance(description, dict):
        raise ValueError(
            f"{path}: its metadata {METADATA_KEY!r} are not a JSON object; save the adapter again."
        )
    layout = description.get("layout", LAYOUT)
    if layout != LAYOUT:
        raise ValueError(
            f"{path}: layout {quoted(layout)} is not known; this version reads {LAYOUT!r}. Convert "
            "the adapter."
        )
    version = description.get("format_version", FORMAT_VERSION)
    if not is_rank(version) or version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version {quoted(version)} is not known; this version reads 1 to "
            f"{FORMAT_VERSION}. Upgrade peft_moe_lora."
        )
    _check_described(path, description)
    return description


def _check_described(path: str, description: Description) -> None:
    """Check the types of a description's modules and routers."""
    modules = description.get("experts", {})
    routers = description.get("routers", [])
    _check(path, "experts", modules, isinstance(modules, dict), "an object of modules")
    are_paths = isinstance(routers, list) and all(isinstance(router, str) for router in routers)
    _check(path, "routers", routers, are_paths, "a list of paths")
    check_names(path, (*modules, *routers))
    for module, described in modules.items():
        _check_module(path, module, described)
    trained = description.get("trained", {})
    _check(path, "trained", trained, isinstance(trained, dict), "an object of layers")
    check_names(path, trained)
    for layer, numbers in trained.items():
        needed = "an object of a rank r and a finite scaling"
        _check(path, f"trained[{layer!r}]", numbers, _are_numbers(numbers), needed)


def _check_module(path: str, module: str, described: object) -> None:
    _check(path, module, described, isinstance(described, dict), "an object")
    assert isinstance(described, dict)
    for name, value in described.items():
        where = f"{name} of {module}"
        if name == "num_experts":
            _check(path, where, value, is_rank(value), "an integer of at least 1")
        elif name == "experts":
            _check(path, where, value, _are_ids(value), "a list of ascending ids, or left out")
        else:
            is_right = isinstance(value, dict) and all(is_finite(size) for size in value.values())
            _check(path, where, value, is_right, "an object of finite numbers")


def _check(path: str, name: str, value: object, is_right: bool, needed: str) -> None:
    if not is_right:
        raise ValueError(
            f"{path}: in its metadata {METADATA_KEY!r}, {shown(name)} must be {needed}, got "
            f"{quoted(value)}; save the adapter again."
        )


def _are_ids(value: object) -> bool:
    if not isinstance(value, list) or not all(is_count(expert) for expert in value):
        return False
    return all(one < next_one for one, next_one in pairwise(value))


def _are_numbers(value: object) -> bool:
    """Whether a value is an entry of "trained"."""
    if not isinstance(value, dict) or value.keys() != {"r", "scaling"}:
        return False
    return is_rank(value["r"]) and is_finite(value["scaling"])


def _is_newer(one: Path, other: Path) -> bool:
    return one.stat().st_mtime_ns > other.stat().st_mtime_ns


def _replace_metadata(path: Path, metadata: dict[str, str]) -> None:
    """Replace the `__metadata__` of a safetensors file; the tensors' bytes are copied unchanged."""
    with path.open("rb") as source, written_files(path.parent) as folder:
        header = read_header(source)
        header["__metadata__"] = metadata
        with (folder / path.name).open("wb") as target:
            target.write(encoded_header(header))
            shutil.copyfileobj(source, target)
