"""Parts of modules, found without the look-up of `nn.Module`.

That look-up takes a microsecond for a module or parameter, and a forward needs a dozen of them.
"""

from typing import Any

import torch
from torch import nn


def children(module: nn.Module, name: str) -> Any:
    """The modules in a `ModuleDict` of a module, by name: of module.lora_A, a dict of adapters."""
    held: Any = module._modules[name]
    return held._modules


def active_adapters(layer: Any) -> list[str]:
    """The names of a layer's active adapters, without PEFT's properties, which call each other."""
    active = layer._active_adapter
    if isinstance(active, str):
        return [active]
    return active


def weight_and_bias(module: Any) -> tuple[Any, Any]:
    """Of an `nn.Linear`: its parameters, or what has their names if it is parametrized."""
    parameters = module._parameters
    if "weight" in parameters and "bias" in parameters:
        return parameters["weight"], parameters["bias"]
    return module.weight, module.bias


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is none of a subclass: a DTensor, or quantized."""
    kind = type(tensor)
    return kind is torch.Tensor or kind is nn.Parameter
