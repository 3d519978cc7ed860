"""Copies of the base's embeddings in an adapter file, beside adapters that use the base already.

PEFT saves them where a vocabulary was resized or an embedding is a target, and loads them into the
base, so they would change what every other adapter of the model computes.
"""

from collections.abc import Collection

import torch
from safetensors import safe_open

from ..files.adapter_file import AdapterFile
from ..files.text import shown
from .beside import Beside
from .saving import PEFT_PREFIX


def check_copies(
    file: AdapterFile, beside: Beside, needed: Collection[str], others: Collection[str]
) -> None:
    """Check that loading a file leaves the base as the other adapters of the model know it.

    Args:
        file: the file of a further adapter.
        beside: what that adapter trains beside its targets.
        needed: keys, without PEFT's prefix, of the trained tensors.
        others: names of the other adapters.
    Raises:
        ValueError: if the file holds an embedding of another base.
    """
    if not others:
        return
    with safe_open(file.path, framework="pt") as tensors:
        for name in tensors.keys():
            key = name.removeprefix(PEFT_PREFIX)
            base = beside.base_tensor(key)
            if key in needed or base is None or base.is_meta:
                continue
            if not torch.equal(tensors.get_tensor(name).to(base.dtype), base.detach().cpu()):
                raise ValueError(
                    f"{file.path} holds {shown(name)}, a copy of the base's embedding that differs "
                    f"from this model's, which the adapters {sorted(others)} use. Load the adapter "
                    "into a model of its own, or save it with save_embedding_layers=False."
                )
