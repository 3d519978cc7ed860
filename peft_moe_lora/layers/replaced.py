"""Experts with an adapter to which other code has done something: to their activation or forward.

A layer has read its module's activation, and reads it again when it is another one. Where a layer
runs in place of its module's forward, the hooks on the module run around it.

accelerate and parallelism plans bind a forward to an experts module, which ends in the module's
own. liger-kernel, `TrainingArguments(use_liger_kernel=True)`, binds one that reads the weights and
knows no adapter. It is taken back; Liger's norms, rope and loss stay.
"""

import logging
import threading
from collections.abc import Callable
from functools import cache, partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..experts.activation import activation_facts, is_replica
from ..experts.families import LIGER
from ..experts.hooks import is_hooked
from ..experts.layout import with_activation
from ..experts.stored import UnsupportedExperts
from .offload import call_between_hooks

if TYPE_CHECKING:
    from .layer import MoELoraLayer

logger = logging.getLogger(__name__)

# stands for any thread, in a graph of torch.compile
_ANY = 0


def follow_activation(layer: "MoELoraLayer") -> None:
    """Let a layer compute the activation that its base module has now."""
    # not layer.base_layer: a look-up of nn.Module takes a microsecond, in every forward
    base: Any = layer._modules["base_layer"]
    facts = activation_facts(base)
    if facts != layer.activation_facts and not is_replica(base):
        _read_activation(layer, facts)


@torch.compiler.disable(reason="it reads the activation of experts: call the model once before")
def _read_activation(layer: "MoELoraLayer", facts: tuple[Any, ...]) -> None:
    layer.layout = with_activation(layer.layout, layer.base_layer)
    layer.activation_facts = facts
    layer.forget_checks()


def call_base(layer: "MoELoraLayer", base: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The output of a layer's base module, by the module's own forward.

    Args:
        layer: the layer.
        base: its base module, which gets the other arguments.
    Raises:
        UnsupportedExperts: if adapters are at work, and the module, which is on transformers'
            experts interface, did not call the layer's `compute`.
    """
    is_traced = torch.compiler.is_compiling()
    is_sure = not layer.layout.decorated
    # what is written while a graph is traced may break it
    if is_traced and "forward" not in vars(base):
        is_sure = is_sure or _is_of_transformers(type(base))
    if is_sure:
        return base(*args, **kwargs)
    caller = _ANY if is_traced else threading.get_ident()
    _set_awaited_by(layer, caller)
    out = base(*args, **kwargs)
    if layer.awaited_by == caller and layer.is_at_work():
        raise UnsupportedExperts(
            f"the forward of {type(base).__name__} was replaced by {base.forward}, which does not "
            "run the model's experts implementation, so its adapter had no effect. Give the module "
            "its own forward back, del module.forward, and its class too, and leave module.config "
            "alone."
        )
    return out


def note_computed(layer: "MoELoraLayer") -> None:
    """Note that `compute` runs, for which `call_base` may wait."""
    waiting = layer.awaited_by
    if waiting is None:
        return
    # a graph knows no threads, and may hold one of the two functions alone
    is_any = waiting == _ANY or torch.compiler.is_compiling()
    if is_any or waiting == threading.get_ident():
        _set_awaited_by(layer, None)


# torch.compile calls it while it traces
@torch.compiler.assume_constant_result
def _is_of_transformers(cls: type[nn.Module]) -> bool:
    """Whether the forward of a class on the experts interface is the one that the interface made.

    It has the name and the module of the class's own forward, but not its globals.
    """
    made_in = getattr(cls.forward, "__globals__", {})
    return made_in.get("__name__", "").startswith("transformers.integrations.")


def _set_awaited_by(layer: "MoELoraLayer", caller: int | None) -> None:
    # nn.Module's own takes a microsecond, in every forward
    object.__setattr__(layer, "awaited_by", caller)


def call_in_place_of(
    base: nn.Module, function: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
) -> torch.Tensor:
    """function(*args, **kwargs) in place of the forward of a layer's base module.

    The hooks on the module run around it, those of accelerate within those of PyTorch.

    Raises:
        UnsupportedExperts: if a forward was bound to the module that is not its class's own.
    """
    _check_own_forward(base)
    if not is_hooked(base):
        return call_between_hooks(base, function, *args, **kwargs)
    # what PyTorch calls, and hooks get: the module with another forward, which threads do not share
    stand_in = object.__new__(type(base))
    forward = partial(call_between_hooks, base, function)
    stand_in.__dict__.update(base.__dict__, forward=forward, _compiled_call_impl=None)
    return stand_in(*args, **kwargs)


def _check_own_forward(base: nn.Module) -> None:
    own: Any = vars(base)
    if "forward" not in own:
        return
    # accelerate keeps the forward that it has replaced
    forward = own.get("_old_forward", own["forward"])
    if getattr(forward, "__func__", None) is not type(base).forward:
        raise UnsupportedExperts(
            f"the forward of {type(base).__name__} was replaced by {forward}, but the class is not "
            "on transformers' experts interface, so its adapter runs in place of any forward. Give "
            "the module its own forward back, del module.forward, or replace the forward of the "
            "adapted layer around it."
        )


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
