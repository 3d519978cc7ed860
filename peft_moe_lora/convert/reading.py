"""Reads an adapter in any format from its two files; no tensor stays in memory.

The format is found from the tensors' keys. The tensors are compared with the configuration, with
the base model if it is known, and with the metadata if the file is in our own format. This finds
files that do not belong together.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..experts.layout import PROJECTIONS
from ..files.adapter_file import (
    PICKLE_NAME,
    WEIGHTS_NAME,
    Trained,
    check_trained,
    without_tensors,
)
from ..files.config_fields import (
    HIGHEST_ALPHA,
    HIGHEST_RANK,
    LOWEST_ALPHA,
    checked_indices,
    checked_projections,
    is_alpha,
    is_rank,
)
from ..files.field_rules import check_fields, check_format, check_known
from ..files.folders import check_own_file
from ..files.tensor_file import AdapterError, FilePath, TensorFile, Tensors, read_json
from ..files.text import quoted, shown
from ..files.writing import CONFIG_NAME, check_saved
from .base import BaseConfig, BaseModel, read_base
from .foreign import in_known_form, looks_like
from .formats import FORMATS, PREFIX, READERS, Format
from .formats.format import Opened, Slots
from .linears import natural, read_linears
from .model import Adapter, Experts, LinearPair, Pair
from .options import left_out, refuse_options, refuse_transposed
from .saved import read_saved
from .source import Source

# names that PEFT gives to what is inside a module that it wraps
_INSIDE = r"\.(?:lora_|base_layer\.|token_adapter\.|original_module\.|modules_to_save\.)"
# the path of an experts module, or of a wrapped module, or of a tensor's module
_MODULE_PATH = re.compile(rf"(.*\bexperts)(?=\.)|(.*?)(?={_INSIDE})|(.*)(?=\.)")


def open_adapter(
    path: FilePath, base_config: BaseConfig | None = None, b_layout: str = "auto"
) -> Adapter:
    """Read an adapter's configuration and the header of its tensors.

    Args:
        path: folder of the adapter.
        base_config, b_layout: as in `convert_adapter`.
    Raises:
        AdapterError, RefusedError: as in `convert_adapter`.
    """
    folder = Path(path)
    for form in FORMATS.values():
        opened = form.opened(folder)
        if opened is not None:
            return _of_another_program(folder, opened, base_config, b_layout)
    _check_weights(folder)
    file = TensorFile(folder / WEIGHTS_NAME)
    return read_adapter(file, folder / CONFIG_NAME, base_config, b_layout)


def _of_another_program(
    folder: Path, opened: Opened, base_config: BaseConfig | None, b_layout: str
) -> Adapter:
    """The adapter in a folder whose files are not PEFT's."""
    check_own_file(opened.file.path)
    path = folder / CONFIG_NAME
    check_own_file(path)
    config = _checked_config(path, opened.as_pefts(path, read_json(path)))
    adapter = _read(opened.file, config, base_config, b_layout)
    return replace(adapter, format=opened.format)


def read_adapter(
    file: Tensors, config_path: Path, base_config: BaseConfig | None = None, b_layout: str = "auto"
) -> Adapter:
    """The same of tensors and a configuration in places of their own."""
    config = _checked_config(config_path, read_json(config_path))
    return _read(file, config, base_config, b_layout)


def _read(
    file: Tensors, config: dict[str, Any], base_config: BaseConfig | None, b_layout: str
) -> Adapter:
    base = _base(base_config, config)
    file = in_known_form(file)
    names, paths = _names(file, base)
    _check_weights_of(file)
    source = Source(file, config, names, paths, base, b_layout)
    form, slots = _format_of(source)
    taken = _expert_keys(source, slots)
    read = form.read(source, slots)
    _check_all_read(source, slots)
    _check_description(source, read.experts)
    linears, others = read_linears(source, [key for key in names if key not in taken])
    refuse_transposed(file.path, config, linears)
    _check_trained(source, read.experts, linears)
    beside = read_saved(source, others)
    return Adapter(
        format=read.format,
        config=config,
        file=file,
        names=names,
        experts={path: read.experts[path] for path in sorted(read.experts, key=natural)},
        linears=linears,
        saved=beside.saved,
        originals=beside.originals,
        tokens=beside.tokens,
        base=base,
        notes=(*read.notes, *left_out(config)),
    )


def read_paths(path: FilePath, adapter: Adapter) -> list[FilePath]:
    """The folders that a conversion reads; its destination must not hold them.

    Args:
        path: folder of the adapter.
        adapter: the adapter that was read from there.
    """
    bases = [adapter.config.get("base_model_name_or_path")]
    if adapter.base is not None:
        bases.append(adapter.base.name)
    return [path, *(base for base in bases if isinstance(base, str) and os.path.exists(base))]


def _check_weights(folder: Path) -> None:
    check_saved(folder)
    check_own_file(folder / WEIGHTS_NAME)
    check_own_file(folder / CONFIG_NAME)
    if (folder / WEIGHTS_NAME).is_file():
        return
    pickled = ""
    if (folder / PICKLE_NAME).is_file():
        pickled = f" ({PICKLE_NAME} is a pickle, which is not read)"
    raise AdapterError(
        f"{folder} holds no {WEIGHTS_NAME}{pickled}; name the folder of an adapter that was saved "
        "as safetensors."
    )


def _base(base_config: BaseConfig | None, config: dict[str, Any]) -> BaseModel | None:
    """The base model that the caller named, or the adapter's own one if it is a local folder."""
    if base_config is not None:
        return read_base(base_config)
    own = config.get("base_model_name_or_path")
    if isinstance(own, str) and _holds_config(own):
        return read_base(own)
    return None


def _holds_config(folder: str) -> bool:
    try:
        return Path(folder, "config.json").is_file()
    except OSError:
        # the name is too long for a file
        return False


def _checked_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Check the contents of adapter_config.json.

    Missing patterns become empty dicts, and use_rslora becomes a boolean.
    """
    if config.get("peft_type") not in ("LORA", "MOE_LORA"):
        raise AdapterError(
            f"{path}: peft_type must be LORA or MOE_LORA, got {quoted(config.get('peft_type'))}."
        )
    try:
        check_fields(config)
        check_known(config)
        check_format(config)
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from error
    refuse_options(path, config)
    for name in ("rank_pattern", "alpha_pattern"):
        config[name] = config.get(name) or {}
    for name, r in _values(config, "r", "rank_pattern"):
        if not is_rank(r):
            raise AdapterError(
                f"{path}: ranks must be integers of at least 1 and at most {HIGHEST_RANK}, got "
                f"{quoted(r)} as {name}; the configuration is damaged or another adapter's."
            )
    for name, alpha in _values(config, "lora_alpha", "alpha_pattern"):
        if not is_alpha(alpha) or alpha == 0:
            raise AdapterError(
                f"{path}: lora_alpha must be a finite number of a size from {LOWEST_ALPHA:g} to "
                f"{HIGHEST_ALPHA:g}, got {quoted(alpha)} as {name}; the configuration is damaged "
                "or another adapter's."
            )
    config["use_rslora"] = bool(config.get("use_rslora"))
    if config.get("expert_indices") is not None:
        try:
            config["expert_indices"] = checked_indices(config["expert_indices"])
        except ValueError as error:
            raise AdapterError(f"{path}: {error}") from error
    if config.get("target_projections") is not None:
        try:
            checked_projections(config["target_projections"], PROJECTIONS)
        except ValueError as error:
            raise AdapterError(f"{path}: {error}") from error
    return config


def _values(config: Mapping[str, Any], field: str, pattern_field: str) -> list[tuple[str, object]]:
    """(name, value) of a field and of each entry of its pattern."""
    values: list[tuple[str, object]] = [(field, config.get(field))]
    for pattern, value in config[pattern_field].items():
        values.append((f"{pattern_field}[{quoted(pattern)}]", value))
    return values


def _names(file: Tensors, base: BaseModel | None) -> tuple[dict[str, str], dict[str, str]]:
    """The names in the file by key, and the modules' paths in the file where these differ.

    Returns: key, without PEFT's prefix and with the base model's own path -> name in the file; path
        in the base model -> path in the file.
    """
    names: dict[str, str] = {}
    resolved: dict[str, str] = {}
    for name in file.tensors:
        key = name.removeprefix(PREFIX)
        path = _module_path(key)
        if base is not None and path is not None:
            if path not in resolved:
                resolved[path] = base.resolve(path)
            key = resolved[path] + key[len(path) :]
        if key in names:
            raise AdapterError(
                f"{file.path}: {name} and {names[key]} are the same tensor under two names; keep "
                "one of them."
            )
        names[key] = name
    paths = {own: path for path, own in resolved.items() if own != path}
    return names, paths


def _module_path(key: str) -> str | None:
    """The path of a tensor's module; of the experts module for every tensor inside one."""
    match = _MODULE_PATH.match(key)
    if match is None:
        return None
    return match[0]


def _check_weights_of(file: Tensors) -> None:
    """Check that weights are floating point; a module that is saved whole may have other buffers.

    Raises:
        AdapterError: if one is not, or if a LoRA tensor is empty.
    """
    for name, info in file.tensors.items():
        is_weight = ".lora_" in name or name.endswith((".weight", ".bias"))
        if is_weight and not info.dtype.is_floating_point:
            raise AdapterError(
                f"{file.path}: {name} is {info.dtype}, but LoRA tensors and weights must be "
                "floating point; copy or save the adapter again."
            )
        # without elements, a tensor of any size fits into a small file
        if ".lora_" in name and 0 in info.shape:
            raise AdapterError(
                f"{file.path}: {name} has shape {list(info.shape)}, but LoRA tensors must not be "
                "empty; copy or save the adapter again."
            )


def _format_of(source: Source) -> tuple[Format, Slots]:
    """The format of the file's expert tensors, and the keys of these tensors."""
    found = []
    for form in READERS:
        slots = form.slots(source)
        if slots:
            found.append((form, slots))
    if not found:
        raise AdapterError(
            f"{source.file.path} holds no tensors of experts in a known format, so there is "
            f"nothing to convert.{looks_like(source.names)}"
        )
    if len(found) > 1:
        names = " and ".join(form.name for form, _ in found)
        raise AdapterError(
            f"{source.file.path} holds tensors of experts in the formats {names}, but an adapter "
            "must have one format; save each format in a file of its own."
        )
    return found[0]


def _expert_keys(source: Source, slots: Slots) -> set[str]:
    """The keys of all expert tensors; checks that each module has one dtype."""
    taken: set[str] = set()
    for path, found in slots.items():
        keys = {key for slot in found.values() for key in slot}
        dtypes = sorted({str(source.info(key).dtype) for key in keys})
        if len(dtypes) > 1:
            raise AdapterError(
                f"{source.file.path}: {path} mixes {' and '.join(dtypes)}; save it in one dtype."
            )
        taken |= keys
    return taken


def _check_all_read(source: Source, slots: Slots) -> None:
    """Check that the format's reader took every expert tensor out of `slots`.

    Raises:
        AdapterError: if some are left.
    """
    left = [slot for found in slots.values() for slot in found.values()]
    if left:
        raise AdapterError(
            f"{source.file.path}: {source.names[left[0].A]} and {2 * len(left) - 1} more tensors "
            "belong to experts, but not to a projection that these experts have; the adapter is "
            "for another model, or another program wrote it in a form that is not known."
        )


def _check_description(source: Source, experts: Experts) -> None:
    """Compare E, r, K and N in the metadata of our own format with the tensors."""
    for path, described in source.description.get("experts", {}).items():
        pairs = experts.get(_own_path(source, path), {})
        held = {name: _described(pair) for name, pair in pairs.items()}
        said = {n: value for n, value in described.items() if n not in ("num_experts", "experts")}
        numbers = {pair.num_experts for pair in pairs.values()}
        chosen = {pair.chosen for pair in pairs.values()}
        if (
            said != held
            or numbers != {described.get("num_experts")}
            or chosen != {_as_tuple(described.get("experts"))}
        ):
            raise AdapterError(
                f"{source.file.path}: its metadata describe {path} as {shown(described)}, but its "
                f"tensors and adapter_config.json give {numbers or 'no'} experts of {held}, with "
                f"the expert ids {shown(chosen)}; the two files do not belong together."
            )


def _check_trained(source: Source, experts: Experts, linears: Mapping[str, LinearPair]) -> None:
    """Compare rank and scaling in the metadata of our own format with the configuration."""
    layers: dict[str, Pair | LinearPair] = dict(linears)
    for path, pairs in experts.items():
        layers.update({f"{path}.{name}": pair for name, pair in pairs.items()})
    for said_path, said in source.description.get("trained", {}).items():
        layer = layers.get(_own_layer(source, said_path))
        if layer is None:
            raise AdapterError(without_tensors(source.file.path, said_path))
        try:
            check_trained(str(source.file.path), said_path, said, Trained(layer.r, layer.scaling))
        except ValueError as error:
            raise AdapterError(str(error)) from error


def _own_path(source: Source, path: str) -> str:
    """The base model's own path for a path in the file."""
    if source.base is None:
        return path
    return source.base.resolve(path)


def _own_layer(source: Source, layer: str) -> str:
    """The same for a layer of "trained", which may be a projection of an experts module."""
    path, _, projection = layer.rpartition(".")
    if path in source.description.get("experts", {}):
        return f"{_own_path(source, path)}.{projection}"
    return _own_path(source, layer)


def _described(pair: Pair) -> dict[str, int]:
    return {"r": pair.r, "in_features": pair.in_features, "out_features": pair.out_features}


def _as_tuple(experts: Iterable[int] | None) -> tuple[int, ...] | None:
    if experts is None:
        return None
    return tuple(experts)
