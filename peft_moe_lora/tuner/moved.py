"""An adapter file as PEFT or transformers renames it, for a base whose modules have other paths.

They rename when they read the tensors, and by then the adapter is already added. The file is
checked before that, so the check renames in the same way.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from ..config import MoELoraConfig
from ..files.adapter_file import AdapterFile
from ..files.text import quoted, shown
from .checkpoint import PEFT_PREFIX


def moved_file(
    file: AdapterFile, config: MoELoraConfig, key_mapping: Mapping[str, str]
) -> AdapterFile:
    """The file as if it had been saved with the paths that a mapping gives.

    Args:
        file: the file.
        config: the configuration that was saved with it.
        key_mapping: regular expression -> replacement, on keys without PEFT's prefix. The first
            expression that matches a key replaces all of its matches.
    Raises:
        ValueError: if the configuration gives a module another rank or lora_alpha at its new path,
            or if a key has no prefix, so that PEFT could not rename it.
    """
    if not key_mapping:
        return file
    bare = [key for key in file.shapes if not key.startswith(PEFT_PREFIX)]
    if bare:
        raise ValueError(
            f"{file.path}: key_mapping renames keys that begin with {PEFT_PREFIX}, but the file "
            f"holds {shown(bare[0])}; save the adapter from a PeftModel, or load it into the base "
            "that it was trained on."
        )
    tensors = {_moved(key, key_mapping): held for key, held in file.tensors.items()}
    modules = {}
    for path, module in file.description.get("experts", {}).items():
        new_path = _moved_path(path, key_mapping)
        _check_patterns(config, path, new_path)
        modules[new_path] = module
    for key in file.shapes:
        path, is_adapted, _ = key.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if is_adapted:
            _check_patterns(config, path, _moved_path(path, key_mapping))
    description = file.description
    if modules:
        description = {**description, "experts": modules}
    if "trained" in description:
        moved = {_moved_layer(file, k, key_mapping): v for k, v in description["trained"].items()}
        description = {**description, "trained": moved}
    return replace(file, tensors=tensors, description=description)


def _moved(key: str, key_mapping: Mapping[str, str]) -> str:
    path = key.removeprefix(PEFT_PREFIX)
    for pattern, replacement in key_mapping.items():
        new_path, number = re.subn(pattern, replacement, path)
        if number:
            return PEFT_PREFIX + new_path
    return key


def _moved_path(path: str, key_mapping: Mapping[str, str]) -> str:
    """The new path of a module, which is where its first tensor goes."""
    moved = _moved(f"{path}.lora_A.weight", key_mapping)
    return moved.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0]


def _moved_layer(file: AdapterFile, layer: str, key_mapping: Mapping[str, str]) -> str:
    """The new key of a layer under "trained", which may be a projection of an experts module."""
    path, _, projection = layer.rpartition(".")
    if path in file.description.get("experts", {}):
        return f"{_moved_path(path, key_mapping)}.{projection}"
    return _moved_path(layer, key_mapping)


def _check_patterns(config: MoELoraConfig, path: str, new_path: str) -> None:
    """Check that the patterns of a configuration give a module the same at both of its paths."""
    for field, decide in {
        "rank_pattern": config.rank_of,
        "alpha_pattern": config.lora_alpha_of,
        "target_projections": config.named_projections_of,
    }.items():
        if decide(path) != decide(new_path):
            raise ValueError(
                f"{field} gives {decide(path)} to {quoted(path)}, but key_mapping moves it "
                f"to {quoted(new_path)}, which gets {decide(new_path)}; write the new paths into "
                f"{field} of adapter_config.json."
            )


def renamed_file(file: AdapterFile, model: PreTrainedModel) -> AdapterFile:
    """The file as transformers' `load_adapter` reads it: with or without PEFT's prefix.

    Tensors of modules that the model does not have are renamed as transformers renames those of
    older checkpoints.

    Raises:
        ValueError: if the file holds a tensor with the prefix and without it.
    """
    renamings = [
        entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)
    ]
    modules = dict(model.named_modules())
    tensors = {}
    for name, held in file.tensors.items():
        key = name.removeprefix(PEFT_PREFIX)
        if key != name and key in file.tensors:
            raise ValueError(
                f"{file.path} holds {shown(key)} twice, with the prefix {PEFT_PREFIX} and without "
                "it; keep the tensors of one kind."
            )
        path = key.rpartition(".lora_")[0] or key.rpartition(".")[0]
        if path not in modules:
            key, _ = rename_source_key(key, renamings, [])
        tensors[PEFT_PREFIX + key] = held
    return replace(file, tensors=tensors)
