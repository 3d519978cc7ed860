"""The keys of an adapter file among the names of tensors in a training's checkpoint.

    base_model.model.<path>.lora_A.<part>              an adapter file has this key
    base_model.model.<path>.lora_A.<adapter>.<part>    a model has this one

Anything may stand before `base_model.model.`, as `model.`, but not a part of an optimizer.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from ..files.tensor_file import AdapterError, FilePath, RefusedError
from ..files.text import quoted, shown
from ..parallel.sharding import path_without_wrappers
from .formats import PREFIX

# patterns of the names in a model; the key is made of `start` and `end`
_OF_A_MODEL = (
    re.compile(r"(?P<start>.+\.lora_[AB])\.(?P<adapter>[^.]+)(?P<end>\.[^.]+)"),
    re.compile(r"(?P<start>.+\.lora_embedding_[AB])\.(?P<adapter>[^.]+)(?P<end>)"),
    re.compile(r"(?P<start>.+\.trainable_tokens_delta)\.(?P<adapter>[^.]+)(?P<end>)"),
    re.compile(r"(?P<start>.+)\.modules_to_save\.(?P<adapter>[^.]+)(?P<end>\..+)"),
)


class _Named(NamedTuple):
    """A tensor of one adapter of a model: its key in a file of this adapter."""

    adapter: str
    key: str


def adapter_keys(
    path: FilePath, stored: Iterable[str], adapter_name: str | None = None
) -> dict[str, str]:
    """Key in an adapter file -> name in the checkpoint, for every tensor of one adapter.

    Args:
        path: the checkpoint, for messages.
        stored: the names in the checkpoint.
        adapter_name: the adapter; None if the checkpoint holds one only.
    Raises:
        AdapterError: if there is no adapter, or a tensor is there twice.
        RefusedError: if there are several adapters and none is named, or not the one named.
    """
    keys = {name: _key(name) for name in stored}
    found = {name: key for name, key in keys.items() if key is not None}
    named = {name: _named(key) for name, key in found.items()}
    of_models = {name: of for name, of in named.items() if of is not None}
    if not of_models:
        return _inverted(path, found)
    adapters = sorted({of.adapter for of in of_models.values()})
    if adapter_name is None and len(adapters) > 1:
        raise RefusedError(
            f"{path} holds the adapters {quoted(adapters)}; name one of them (adapter_name, "
            "--adapter-name)."
        )
    wanted = adapter_name or adapters[0]
    if wanted not in adapters:
        raise RefusedError(f"{path} holds no adapter {quoted(wanted)}, but {quoted(adapters)}.")
    return _inverted(path, {n: of.key for n, of in of_models.items() if of.adapter == wanted})


def _key(name: str) -> str | None:
    """What follows the wrappers of a training in a name; None if it is not of a PEFT model."""
    before, prefix, key = path_without_wrappers(name).partition(PREFIX)
    if not prefix or "optim" in before:
        return None
    return prefix + key


def _named(key: str) -> _Named | None:
    for pattern in _OF_A_MODEL:
        match = pattern.fullmatch(key)
        if match is not None:
            return _Named(match["adapter"], match["start"] + match["end"])
    return None


def _inverted(path: FilePath, keys: Mapping[str, str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for name, key in keys.items():
        if key in names:
            raise AdapterError(
                f"{path}: {shown(name)} and {shown(names[key])} are the same tensor under two "
                "names; save one model."
            )
        names[key] = name
    if not names:
        raise AdapterError(
            f"{path} holds no tensors of an adapter: no name contains {PREFIX}; name the "
            "checkpoint of a training with get_peft_model."
        )
    return names
