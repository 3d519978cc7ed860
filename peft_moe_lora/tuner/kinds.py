"""Which kind of layer each target of an adapter becomes."""

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..config import MoELoraConfig
from ..experts.layout import is_experts
from ..experts.routers import is_router
from ..layers.layer import MoELoraLayer
from ..layers.linear import DividedLinear, ShardedLinear
from ..layers.router import MoELoraRouter
from ..parallel import divided, sharding


def layer_for(
    model: nn.Module,
    config: MoELoraConfig,
    adapter_name: str,
    target: nn.Module,
    parent: nn.Module,
    path: str,
) -> nn.Module | None:
    """The layer that takes the place of a target; None if PEFT's own LoRA makes or extends it.

    Args:
        model: the model.
        config: the adapter's configuration.
        adapter_name: the adapter.
        target: the module.
        parent: the module that holds it.
        path: its path in the model, by which the configuration gives it a rank and a lora_alpha.
    """
    if is_experts(target):
        share = divided.share_of(model, target)
        return MoELoraLayer(target, adapter_name, config, path, share)
    settings: dict[str, Any] = {
        "config": config,
        "r": config.rank_of(path),
        "lora_alpha": config.lora_alpha_of(path),
    }
    if is_router(target, parent):
        factors = divided.factors_of(model, target)
        return MoELoraRouter(target, adapter_name, factors=factors, **settings)
    if divided.is_divided(model) and not isinstance(target, BaseTunerLayer):
        factors = divided.factors_of(model, target)
        return DividedLinear(target, adapter_name, factors=factors, **settings)
    if type(target) is nn.Linear and sharding.is_sharded(target.weight):
        return ShardedLinear(target, adapter_name, **settings)
    return None
