"""Experts with an adapter whose forward another library has replaced.

accelerate and parallelism plans bind a forward to an experts module, which ends in the module's
own. liger-kernel, `TrainingArguments(use_liger_kernel=True)`, binds one that reads the weights and
knows no adapter. It is taken back; Liger's norms, rope and loss stay.
"""

import logging
from functools import cache
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..experts.families import LIGER
from ..experts.stored import UnsupportedExperts

if TYPE_CHECKING:
    from .layer import MoELoraLayer

logger = logging.getLogger(__name__)


def call_base(layer: "MoELoraLayer", *args: Any, **kwargs: Any) -> torch.Tensor:
    """The output of a layer's base module, which is on transformers' experts interface.

    Raises:
        UnsupportedExperts: if adapters are at work, and a forward that was bound to the module did
            not call the layer's `compute`.
    """
    base = layer.base_layer
    if "forward" not in vars(base):
        return base(*args, **kwargs)
    layer.is_awaited = layer.is_at_work()
    out = base(*args, **kwargs)
    if layer.is_awaited:
        raise UnsupportedExperts(
            f"the forward of {type(base).__name__} was replaced by {base.forward}, which does not "
            "run the model's experts implementation, so its adapter had no effect. Give the module "
            "its own forward back: del module.forward."
        )
    return out


def take_back_forward(module: nn.Module) -> None:
    """Give a module the forward of its class back, if liger-kernel has bound another one to it."""
    forward: Any = vars(module).get("forward")
    if not isinstance(forward, MethodType):
        return
    if not forward.__func__.__module__.startswith(LIGER):
        return
    del module.__dict__["forward"]
    # the name of the class, which Liger has replaced too
    module.__dict__.pop("_get_name", None)
    _log_once()


@cache
def _log_once() -> None:
    logger.info("liger-kernel replaced the forward of experts with an adapter; it is taken back.")
