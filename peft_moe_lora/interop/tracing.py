"""What torch.compile needs before it traces a call of experts that PEFT's adapters change."""

from contextlib import suppress
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper

from ..experts.layout import is_experts
from ..experts.stored import UnsupportedExperts
from ..layers.known import known_layout, layout_of
from . import counting
from .left import Unlogged


def check_prepared(wrapper: ParamWrapper) -> None:
    """Raise `Unlogged` if a call that is traced cannot be part of a graph."""
    # nn.Module annotates every attribute as a tensor or a module
    prepared: Any = wrapper
    if not prepared.moe_lora_prepare():
        raise Unlogged("the call cannot be part of a graph")


@torch.compiler.assume_constant_result
def moe_lora_prepare(wrapper: ParamWrapper) -> bool:
    """Read the layout of a wrapper's module while torch.compile traces a call.

    `apply_to_peft` makes it a method of PEFT's class. torch.compile runs such a method instead of
    tracing it, but no function that takes a module.

    Returns: whether the call can be part of a graph.
    """
    module = wrapper.get_base_layer()
    # a forward that others have bound to the module may do anything; a graph is not counted
    if "forward" in vars(module) or counting.awaits(module):
        return False
    if not is_experts(module):
        return False
    with suppress(UnsupportedExperts):
        layout_of(module)
    return known_layout(module) is not None
