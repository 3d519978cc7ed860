"""Which tensors of a checkpoint an adapter replaces, whole or by rows.

A checkpoint holds tied embeddings once. So an adapter that changes one of them and not the others
has no checkpoint.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from ..files.tensor_file import RefusedError, TensorInfo
from .base import BaseModel
from .checkpoint import Target, check_shape, own_names
from .model import Adapter, Tokens


class Replacement(NamedTuple):
    """What takes the place of a tensor of the checkpoint.

    Attributes:
        key: key, in the adapter's file, of the tensor that replaces it whole; None for none.
        tokens: the rows that are replaced after that; None for none.
    """

    key: str | None = None
    tokens: Tokens | None = None


def find_replacements(
    adapter: Adapter, base: BaseModel, tensors: Mapping[str, TensorInfo]
) -> dict[str, Replacement]:
    """Name of a tensor in the checkpoint -> what replaces it.

    Raises:
        AdapterError: if a shape differs.
        RefusedError: if the checkpoint has no such tensor, or if the adapter's vocabulary has
            another size.
    """
    wanted = {name: Replacement(key) for name, key in adapter.saved.items()}
    for path, rows in adapter.tokens.items():
        name = f"{path}.weight"
        wanted[name] = Replacement(adapter.saved.get(name), rows)
    known = own_names(base, tensors)
    found = {}
    for name, replacement in wanted.items():
        if name not in known:
            raise RefusedError(
                f"{base.name} has no tensor {name}, but the adapter replaces it; merge into the "
                "base model that the adapter was trained on."
            )
        _check_fits(adapter, base, name, tensors[known[name]].shape, replacement)
        found[known[name]] = replacement
    return found


def _check_fits(
    adapter: Adapter,
    base: BaseModel,
    name: str,
    shape: tuple[int, ...],
    replacement: Replacement,
) -> None:
    needed = shape
    if replacement.key is not None:
        needed = adapter.file.tensors[adapter.names[replacement.key]].shape
    elif replacement.tokens is not None:
        width = adapter.file.tensors[adapter.names[replacement.tokens.key]].shape[1]
        # at least so many rows
        needed = (max(*replacement.tokens.indices, shape[0] - 1) + 1, width)
    if shape == needed:
        return
    is_embedding = name.rpartition(".")[0] in base.embeddings
    if is_embedding and shape[1:] == needed[1:]:
        raise RefusedError(
            f"{base.name} has {shape[0]} rows of {name}, but the adapter needs {needed[0]}: its "
            "vocabulary was resized. Call resize_token_embeddings on the base model as before "
            "the training, save it, and merge into that."
        )
    check_shape(name, shape, needed)


def complete_changes(
    base: BaseModel,
    tensors: Mapping[str, TensorInfo],
    targets: dict[str, Target],
    replacements: dict[str, Replacement],
) -> None:
    """Give all tied tensors of the checkpoint the change of one, which `check_tied` has found.

    Raises:
        RefusedError: if experts are replaced whole and adapted too.
    """
    for name in replacements:
        if name in targets and targets[name].stack is not None:
            raise RefusedError(
                f"the adapter holds {name} whole and a LoRA of it, which cannot be merged; load "
                "the adapter with PEFT and merge there."
            )
    names = own_names(base, tensors)
    tied = {names[name] for name in base.tied if name in names}
    for name in sorted(tied & targets.keys())[:1]:
        targets.update(dict.fromkeys(tied, targets[name]))
    # PEFT saves rows once, and copies of the whole weight for each of its names
    replaced = sorted(
        tied & replacements.keys(), key=lambda name: replacements[name].tokens is None
    )
    for name in replaced[:1]:
        replacements.update(dict.fromkeys(tied, replacements[name]))


def check_tied(adapter: Adapter, base: BaseModel) -> None:
    """Check that tied embeddings change together.

    Raises:
        RefusedError: if the adapter changes one of them and not the others.
    """
    changed = changed_ties(adapter, base)
    if changed and not _are_one(adapter, base, changed):
        raise RefusedError(
            f"{base.name} has one weight for {' and '.join(sorted(base.tied))}, but the adapter "
            f"changes {' and '.join(changed)} on its own, which a checkpoint of this model cannot "
            "hold. Save the base model with tie_word_embeddings=False and both weights, and merge "
            "into that."
        )


def changed_ties(adapter: Adapter, base: BaseModel) -> list[str]:
    """The names of tied embeddings that an adapter changes."""
    return sorted(name for name in base.tied if _changes(adapter, name))


def _changes(adapter: Adapter, name: str) -> bool:
    path = name.rpartition(".")[0]
    return name in adapter.saved or path in adapter.linears or path in adapter.tokens


def _are_one(adapter: Adapter, base: BaseModel, changed: list[str]) -> bool:
    """Whether the changes of tied tensors are one change of the weight that they share."""
    paths = [name.rpartition(".")[0] for name in changed]
    # PEFT gives a tied head the rows of the input embedding
    rows_of_input = [path for path in paths if path in adapter.tokens] == [base.embeddings[0]]
    if len(changed) > 1:
        adapted = any(path in adapter.linears for path in paths)
        rows_of_others = any(path in adapter.tokens for path in paths) and not rows_of_input
        if adapted or rows_of_others or not all(name in adapter.saved for name in changed):
            return False
        # if the vocabulary was resized, PEFT saves the weight under each of its names
        first, *others = (adapter.file.load(adapter.names[adapter.saved[n]]) for n in changed)
        return all(torch.equal(first, other) for other in others)
    return rows_of_input or bool(adapter.config.get("ensure_weight_tying"))
