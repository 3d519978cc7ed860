"""An adapter file as PEFT's `key_mapping` renames it, for a base whose modules have other paths.

PEFT applies the mapping when it reads the tensors, and by then the adapter is already added. The
file is checked before that, so the check applies the same mapping.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import FrameType

from ..files.adapter_file import AdapterFile
from ..files.text import quoted, shown
from .checkpoint import PEFT_PREFIX
from .config import MoELoraConfig


def given_key_mapping() -> Mapping[str, str]:
    """The `key_mapping` with which PEFT is loading an adapter at this moment; {} without one.

    It is an argument of `PeftModel.from_pretrained` and of `PeftModel.load_adapter`, which do not
    hand it on to the tuner, so it is read from their frame.
    """
    for frame in _frames():
        if frame.f_globals.get("__name__") == "peft.peft_model" and "key_mapping" in frame.f_locals:
            return frame.f_locals["key_mapping"] or {}
    return {}


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        yield frame
        frame = frame.f_back


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
    }.items():
        if decide(path) != decide(new_path):
            raise ValueError(
                f"{field} gives {decide(path)} to {quoted(path)}, but key_mapping moves it "
                f"to {quoted(new_path)}, which gets {decide(new_path)}; write the new paths into "
                f"{field} of adapter_config.json."
            )
