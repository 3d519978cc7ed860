"""What an adapter adds to each weight, as we say it and as a reader ended up with it.

A delta is scaling * B A. Its name is (layer, projection): `gate_up` [E, N, K] and `down` [E, N, K]
of the experts, or the last name of a linear layer [N, K].
"""

import re
from pathlib import Path

import torch

from peft_moe_lora.convert.reading import open_adapter

Deltas = dict[tuple[int, str], torch.Tensor]
# fp32, in which everything here is: measured differences are 0
TOLERANCE = 1e-6


def layer_of(path: str) -> int:
    """The number of the decoder layer that holds a module."""
    match = re.search(r"\blayers\.(\d+)\.", path)
    assert match, f"{path} is in no layer"
    return int(match[1])


def our_deltas(folder: Path, base: Path) -> Deltas:
    """The deltas of an adapter, by our own reading."""
    adapter = open_adapter(folder, base)
    found: Deltas = {}
    for path, pairs in adapter.experts.items():
        for name, pair in pairs.items():
            A, B = pair.load()
            found[layer_of(path), name] = pair.scaling * (B @ A)
    for path, layer in adapter.linears.items():
        A, B = adapter.load_linear(layer)
        found[layer_of(path), path.rpartition(".")[2]] = layer.scaling * (B @ A)
    return found


def lost(found: Deltas, right: Deltas) -> list[tuple[int, str]]:
    """The names of the deltas that a reader lacks or holds as zeros."""
    return [name for name in right if name not in found or not found[name].any()]


def wrong(found: Deltas, right: Deltas) -> dict[tuple[int, str], float]:
    """The deltas that differ -> their largest error, over the largest value."""
    errors = {}
    for name, delta in right.items():
        error = float("inf")
        if name in found and found[name].shape == delta.shape:
            error = ((found[name] - delta).abs().max() / delta.abs().max()).item()
        if not error <= TOLERANCE:
            errors[name] = error
    return errors
