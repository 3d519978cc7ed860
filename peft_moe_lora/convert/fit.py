"""Brings an adapter into a form that a format's readers accept; its update stays the same.

Projections that are not adapted get zeros, ranks are padded, and scalings are folded into B.
"""

import math
from collections.abc import Collection
from dataclasses import replace

from ..experts.layout import EVERY_PROJECTION
from ..files.scaling import tidy
from .base import need_base
from .model import Adapter, Experts, Pair


def fill_in(adapter: Adapter, projections: Collection[str], reader: str) -> Adapter:
    """Add zero updates for projections that some modules do not adapt.

    Args:
        adapter: the adapter.
        projections: the projections that every module must have.
        reader: name of the format that needs them, for messages.
    Raises:
        RefusedError: if a projection is missing and the base model's sizes are not known.
    """
    missing = [
        (path, projection)
        for path, pairs in adapter.experts.items()
        for projection in sorted(set(projections) - set(pairs))
    ]
    if not missing:
        return adapter
    base = need_base(
        adapter.base,
        f"{reader} needs {sorted(projections)} of every module, so their sizes must be known",
    )
    experts = {path: dict(pairs) for path, pairs in adapter.experts.items()}
    for path, projection in missing:
        adapted = next(iter(experts[path].values()))
        size = base.experts[path].projection(projection)
        experts[path][projection] = adapted.zeros_like(size.in_features, size.out_features)
    ordered = {
        path: {name: pairs[name] for name in EVERY_PROJECTION if name in pairs}
        for path, pairs in experts.items()
    }
    what = ", ".join(sorted({projection for _, projection in missing}))
    return replace(adapter, experts=ordered).noted(
        f"{what} without an adapter is written as zeros for {reader}"
    )


def make_uniform(adapter: Adapter, reader: str) -> Adapter:
    """Give all layers of an adapter the same rank and the same scaling.

    The rank is the highest rank; lower ranks are padded with zeros. The scaling is the most
    frequent scaling; other scalings are folded into B.
    """
    layers = adapter.layers()
    r = max(layer.r for layer in layers)
    scalings = [layer.scaling for layer in layers]
    scaling = max(dict.fromkeys(scalings), key=scalings.count)
    linears = {
        path: replace(layer, r=r, scaling=scaling, factor=layer.scaling / scaling)
        for path, layer in adapter.linears.items()
    }
    experts: Experts = {
        path: {name: pair.padded(r).scaled_to(scaling) for name, pair in pairs.items()}
        for path, pairs in adapter.experts.items()
    }
    config = {**adapter.config, "r": r, "lora_alpha": tidy(scaling * r), "use_rslora": False}
    changed = replace(adapter, experts=experts, linears=linears, config=config)
    return changed.noted(*_uniform_notes(adapter, r, scaling, reader))


def _uniform_notes(adapter: Adapter, r: int, scaling: float, reader: str) -> list[str]:
    """Notes on what `make_uniform` changes."""
    layers = adapter.layers()
    notes = []
    ranks = sorted({layer.r for layer in layers})
    if ranks != [r]:
        notes.append(f"ranks {ranks} are padded with zeros to {r}: {reader} supports one rank")
    if not all(math.isclose(layer.scaling, scaling) for layer in layers):
        folded = (
            f"scalings other than {scaling:g} are folded into B: {reader} supports only "
            "lora_alpha / r"
        )
        narrow = _narrow_dtypes(list(adapter.pairs()))
        if narrow:
            folded += f" (B is rounded to {narrow[0]} once more)"
        notes.append(folded)
    return notes


def _narrow_dtypes(pairs: list[Pair]) -> list[str]:
    """Names of the dtypes below fp32, sorted."""
    narrow = {pair.dtype for pair in pairs if pair.dtype.itemsize < 4}
    return sorted(str(dtype).removeprefix("torch.") for dtype in narrow)
