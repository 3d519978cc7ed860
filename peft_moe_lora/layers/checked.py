"""Safe merging checks every weight of a model before one is changed.

PEFT's safe merge checks one layer after the other, and merges each before it looks at the next. It
replaces the data of a weight by a sum that it has checked. Of a sharded weight this replaces
nothing: the sum has to be checked before, and then added in place.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ..parallel.sharding import anywhere, is_divided, is_sharded, placed, shard_of
from .layer import MoELoraLayer
from .merging import check_finite


def still_unchecked(model: nn.Module, safe_merge: bool, adapter_names: list[str] | None) -> bool:
    """Check the merged weights of all layers, where this can be done before the first merge.

    It cannot for offloaded layers, nor for quantized ones beside experts. Every process must call
    this.

    Args:
        model: a model, or one adapted layer.
        safe_merge: whether merged weights have to be finite.
        adapter_names: the adapters to merge; the active ones by default.
    Returns: whether the caller of PEFT's merging still has to ask for the check; not in a divided
        model, where PEFT cannot check.
    Raises:
        ValueError: with safe_merge, if a merged weight is not finite; nothing has been merged.
    """
    if not safe_merge:
        return False
    divided = is_divided(model)
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and (divided or _can_be_checked(layer)):
            names = check_adapters_to_merge(layer, adapter_names)  # type: ignore[arg-type]  # PEFT: a BaseTunerLayer
            _check(path, layer, [name for name in names if name in layer.r])
    return not divided


def _can_be_checked(layer: LoraLayer) -> bool:
    """Whether the merged weight of a layer is its weight and B A, and both are here."""
    module: Any = layer
    if any(parameter.is_meta for parameter in module.parameters()):
        # offloaded: PEFT brings them in layer by layer
        return False
    if isinstance(layer, MoELoraLayer):
        return True
    weight = getattr(layer.get_base_layer(), "weight", None)
    return type(weight) is nn.Parameter and weight.is_floating_point() and not layer.lora_variant


def _check(path: str, layer: Any, adapter_names: Sequence[str]) -> None:
    if isinstance(layer, MoELoraLayer):
        for name in adapter_names:
            check_finite(layer, name)
        return
    weight = layer.weight
    merged = weight.detach()
    for name in adapter_names:
        delta = layer.get_delta_weight(name)
        if is_sharded(weight):
            delta = placed(delta, weight)
        merged = merged + delta.to(merged.dtype)
    here: Any = shard_of(merged).local
    if anywhere(not torch.isfinite(here).all(), weight):
        raise ValueError(
            f"NaNs detected in the merged weights: adapters {list(adapter_names)}, the weight of "
            f"{path} is not finite; nothing was merged."
        )
