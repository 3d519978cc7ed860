"""The tensors of an adapter that are not LoRA, and the tensors of the base model they replace.

PEFT saves these: modules that were trained whole (modules_to_save), biases (bias), the weights of
an embedding that was adapted or resized, and some rows of an embedding (trainable_token_indices).
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from peft.utils.constants import EMBEDDING_LAYER_NAMES

from ..files.tensor_file import AdapterError
from ..files.text import quoted, shown
from .model import Tokens
from .source import Source

# PEFT adds both to modules_to_save of a classifier, whose head has one of these names
_ONE_OF_THESE = ("classifier", "score")
_TOKENS = re.compile(r"(?P<path>.+)\.token_adapter\.trainable_tokens_delta")
# PEFT's names of what is inside a wrapped module. If the vocabulary was resized, it saves all that
# is there: the trained module twice, and the base's own one
_INSIDE = re.compile(
    r"(?P<path>.+?)\.(?P<inside>(?:token_adapter\.)?base_layer|original_module|modules_to_save)\."
    r"(?P<last>[^.]+)"
)


class Saved(NamedTuple):
    """The tensors that are not LoRA; see `Adapter` for what the three are."""

    saved: dict[str, str]
    originals: dict[str, str]
    tokens: dict[str, Tokens]


def read_saved(source: Source, keys: Iterable[str]) -> Saved:
    """The tensors that are not LoRA, by the tensors of the base model that they replace.

    Args:
        source: the adapter.
        keys: keys of the tensors that are not LoRA.
    Raises:
        AdapterError: if the configuration does not name a tensor, if the file lacks rows that it
            names, or if a tensor does not fit the base model.
    """
    found: dict[str, dict[str, str]] = {"saved": {}, "original_module": {}, "modules_to_save": {}}
    rows: dict[str, str] = {}
    for key in keys:
        match = _TOKENS.fullmatch(key)
        if match is not None:
            rows[match["path"]] = key
            continue
        name, kind = _name_of(key)
        if not _is_named(source, name):
            raise AdapterError(
                f"{source.file.path}: {source.names[key]} is neither a LoRA tensor nor saved whole "
                "by modules_to_save or bias of adapter_config.json; such tensors cannot be "
                "converted. Remove it from the file."
            )
        if name in found[kind]:
            raise AdapterError(
                f"{source.file.path}: {source.names[key]} and {source.names[found[kind][name]]} "
                f"both replace {name}; keep one of them."
            )
        found[kind][name] = key
        _check_shape(source, name, key)
    saved = found["saved"]
    for name, key in found["modules_to_save"].items():
        if name not in saved or not torch.equal(source.load(key), source.load(saved[name])):
            raise AdapterError(
                f"{source.file.path}: {source.names[key]} is not the same as {name} of the file; "
                "save the adapter again."
            )
    tokens = {path: _tokens(source, path, key, saved) for path, key in rows.items()}
    _check_complete(source, tokens)
    _check_modules(source, saved)
    return Saved(saved, found["original_module"], tokens)


def _name_of(key: str) -> tuple[str, str]:
    """The tensor of the base model that a tensor replaces, and which kind of copy it is."""
    match = _INSIDE.fullmatch(key)
    if match is None:
        return key, "saved"
    name = f"{match['path']}.{match['last']}"
    if match["inside"].endswith("base_layer"):
        return name, "saved"
    return name, match["inside"]


def _is_named(source: Source, name: str) -> bool:
    """Whether the configuration, or PEFT's rule for embeddings, has this tensor saved."""
    path, _, last = name.rpartition(".")
    if ".lora_" in name or _INSIDE.fullmatch(name) or "modules_to_save" in path.split("."):
        return False
    if source.base is not None and name not in source.base.tensors:
        return False
    if source.config.get("bias", "none") != "none" and last == "bias":
        return True
    entries = source.config.get("modules_to_save") or ()
    return any(_is_inside(name, entry) for entry in entries) or _is_embedding(source, path)


def _is_inside(name: str, entry: str) -> bool:
    """Whether a tensor is inside a module that an entry of modules_to_save names."""
    parts = name.split(".")
    around = [".".join(parts[:i]) for i in range(1, len(parts))]
    # as in PEFT, an entry matches every path that ends with it, even inside a name
    return any(module.endswith(entry) for module in around)


def _is_embedding(source: Source, path: str) -> bool:
    """Whether a module is an embedding or a head; PEFT also saves the resized ones unasked."""
    if source.base is not None and source.base.embeddings:
        return path in source.base.embeddings
    return path.rpartition(".")[2] in EMBEDDING_LAYER_NAMES


def _check_shape(source: Source, name: str, key: str) -> None:
    """Compare a tensor with the base's; an embedding may have another number of rows."""
    if source.base is None:
        return
    shape = source.info(key).shape
    right = source.base.tensors[name]
    if _is_embedding(source, name.rpartition(".")[0]):
        fits = shape[1:] == right[1:]
    else:
        fits = shape == right
    if not fits:
        raise AdapterError(
            f"{source.file.path}: {source.names[key]} has shape {list(shape)}, but {name} of "
            f"{source.base.name} has {list(right)}. Name the base model that the adapter was "
            "trained on."
        )


def _tokens(source: Source, path: str, key: str, saved: Mapping[str, str]) -> Tokens:
    """The rows of an embedding; checks that there are as many as the configuration names."""
    indices = _indices(source, path)
    info = source.info(key)
    weight = f"{path}.weight"
    size: tuple[int, ...] | None = None
    if weight in saved:
        size = source.info(saved[weight]).shape
    elif source.base is not None:
        size = source.base.tensors.get(weight, ())
    wrong = ""
    if indices is None:
        wrong = "but trainable_token_indices of adapter_config.json does not name them"
    elif len(set(indices)) < len(indices):
        wrong = f"but trainable_token_indices repeats an id: {quoted(list(indices))}"
    elif len(info.shape) != 2 or info.shape[0] != len(indices) or not info.dtype.is_floating_point:
        wrong = f"as {info.dtype} {list(info.shape)}, but needs {len(indices)} rows of numbers"
    elif size is not None and (info.shape[1:] != size[1:] or max(indices) >= size[0]):
        wrong = (
            f"of ids up to {max(indices)}, as {list(info.shape)}, but the base's weight is "
            f"{list(size) or 'not there'}"
        )
    if wrong:
        raise AdapterError(
            f"{source.file.path}: it holds rows of {path} {wrong}. The two files do not belong "
            "together, or the adapter is for another base model."
        )
    assert indices is not None
    return Tokens(key, indices)


def _indices(source: Source, path: str) -> tuple[int, ...] | None:
    """The ids of an embedding's rows, from the configuration; None if it does not name them."""
    given = source.config.get("trainable_token_indices")
    if given is None:
        return None
    if not isinstance(given, Mapping):
        return tuple(given)
    for name, ids in given.items():
        if path.endswith(name):
            return tuple(ids)
    return None


def _check_complete(source: Source, tokens: Mapping[str, Tokens]) -> None:
    """Check that the file holds all rows that the configuration names."""
    given = source.config.get("trainable_token_indices")
    if given is None:
        return
    if isinstance(given, Mapping):
        wanted = dict(given)
    else:
        wanted = {"the input embedding": given}
    # the rows of a tied head are saved once, with the embedding's
    held = [rows.indices for rows in tokens.values()]
    for name, ids in wanted.items():
        if tuple(ids) not in held:
            raise AdapterError(
                f"{source.file.path}: trainable_token_indices of adapter_config.json names "
                f"{len(ids)} rows of {quoted(name)}, but the file does not hold them; the two "
                "files do not belong together."
            )


def _check_modules(source: Source, saved: Mapping[str, str]) -> None:
    """Check that the file holds the modules that modules_to_save names.

    Without the base model, one tensor of each name is enough.
    """
    for entry in source.config.get("modules_to_save") or ():
        missing = None
        if source.base is not None:
            wanted = [name for name in source.base.tensors if _is_inside(name, entry)]
            missing = next((name for name in wanted if name not in saved), None)
        elif entry not in _ONE_OF_THESE and not any(_is_inside(name, entry) for name in saved):
            missing = f"tensor of {entry}"
        if missing is not None:
            raise AdapterError(
                f"{source.file.path}: modules_to_save of adapter_config.json names "
                f"{quoted(entry)}, but the file holds no {shown(missing)}; the two files do not "
                "belong together."
            )
