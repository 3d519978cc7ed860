"""Reads an adapter in any format from its two files; no tensor stays in memory.

The format is found from the tensors' keys. The tensors are compared with the configuration, with
the base model if it is known, and with the metadata if the file is in our own format. This finds
files that do not belong together.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..files.adapter_file import PICKLE_NAME, WEIGHTS_NAME
from ..files.tensor_file import AdapterError, FilePath, RefusedError, TensorFile, read_json
from ..tuner.config import checked_indices
from .base import BaseConfig, BaseModel, read_base
from .formats import PREFIX, READERS, Format
from .formats.format import Slots
from .linears import natural, read_linears
from .model import Adapter, Experts, Pair
from .source import Source

CONFIG_NAME = "adapter_config.json"
# options of LoRA that change the computation and that no format can express
_REFUSED_OPTIONS = ("use_dora", "lora_bias", "use_qalora", "fan_in_fan_out")


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
    _check_weights(folder)
    config = _read_config(folder / CONFIG_NAME)
    file = TensorFile(folder / WEIGHTS_NAME)
    base = _base(base_config, config)
    names = _names(file, base)
    _check_floating(file)
    source = Source(file, config, names, base, b_layout)
    form, slots = _format_of(source)
    taken = _expert_keys(source, slots)
    read = form.read(source, slots)
    _check_description(source, read.experts)
    linears, carried = read_linears(source, [key for key in names if key not in taken])
    return Adapter(
        format=read.format,
        config=config,
        file=file,
        names=names,
        experts={path: read.experts[path] for path in sorted(read.experts, key=natural)},
        linears=linears,
        carried=carried,
        base=base,
        notes=read.notes,
    )


def _check_weights(folder: Path) -> None:
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
    if isinstance(own, str) and Path(own, "config.json").is_file():
        return read_base(own)
    return None


def _read_config(path: Path) -> dict[str, Any]:
    """Read and check adapter_config.json.

    Missing patterns become empty dicts, and use_rslora becomes a boolean.
    """
    config = read_json(path)
    if config.get("peft_type") not in ("LORA", "MOE_LORA"):
        raise AdapterError(
            f"{path}: peft_type must be LORA or MOE_LORA, got {config.get('peft_type')!r}."
        )
    for name in _REFUSED_OPTIONS:
        if config.get(name):
            raise RefusedError(
                f"{path}: adapters with {name}={config[name]!r} cannot be converted."
            )
    for name in ("rank_pattern", "alpha_pattern"):
        config[name] = config.get(name) or {}
        if not isinstance(config[name], dict):
            raise AdapterError(
                f"{path}: {name} must be an object that maps names to numbers, got "
                f"{config[name]!r}."
            )
    ranks = [config.get("r"), *config["rank_pattern"].values()]
    if not all(isinstance(r, int) and not isinstance(r, bool) and r >= 1 for r in ranks):
        raise AdapterError(f"{path}: ranks must be integers of at least 1, got {ranks}.")
    alphas = [config.get("lora_alpha"), *config["alpha_pattern"].values()]
    if not all(isinstance(x, int | float) and math.isfinite(x) and x != 0 for x in alphas):
        raise AdapterError(
            f"{path}: lora_alpha must be a finite number other than 0, got {alphas}."
        )
    config["use_rslora"] = bool(config.get("use_rslora"))
    if config.get("expert_indices") is not None:
        try:
            config["expert_indices"] = checked_indices(config["expert_indices"])
        except ValueError as error:
            raise AdapterError(f"{path}: {error}") from error
    return config


def _names(file: TensorFile, base: BaseModel | None) -> dict[str, str]:
    """Key, without PEFT's prefix and with the base model's own path -> name in the file."""
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
    return names


def _module_path(key: str) -> str | None:
    """The path of a tensor's module; of the experts module for every tensor inside one."""
    match = re.match(r"(.*\bexperts)(?=\.)|(.*?)(?=\.lora_)|(.*)(?=\.)", key)
    if match is None:
        return None
    return match[0]


def _check_floating(file: TensorFile) -> None:
    for name, info in file.tensors.items():
        if ".lora_" in name and not info.dtype.is_floating_point:
            raise AdapterError(
                f"{file.path}: {name} is {info.dtype}, but LoRA tensors must be floating point."
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
            "nothing to convert."
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


def _check_description(source: Source, experts: Experts) -> None:
    """Compare E, r, K and N in the metadata of our own format with the tensors."""
    for path, described in source.description.get("experts", {}).items():
        own_path = path
        if source.base is not None:
            own_path = source.base.resolve(path)
        pairs = experts.get(own_path, {})
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
                f"{source.file.path}: its metadata describe {path} as {described}, but its tensors "
                f"and adapter_config.json give {numbers or 'no'} experts of {held}, with the "
                f"expert ids {chosen}; the two files do not belong together."
            )


def _described(pair: Pair) -> dict[str, int]:
    return {"r": pair.r, "in_features": pair.in_features, "out_features": pair.out_features}


def _as_tuple(experts: Iterable[int] | None) -> tuple[int, ...] | None:
    if experts is None:
        return None
    return tuple(experts)
