"""The layout of an experts module that has no layer of ours: read once, and kept in the module.

Reading a layout takes too long for each call, and torch.compile cannot trace it. It is read again
if what it depends on has changed.
"""

from typing import Any, NamedTuple

import torch
from torch import nn

from ..experts.activation import ALPHA_NAMES, LIMIT_NAMES, activation_facts, is_replica
from ..experts.families import STACKS
from ..experts.layout import ExpertsLayout, read_layout

# of a module, not a dict by modules, which torch.compile does not trace
_ATTRIBUTE = "_moe_lora_layout"


class _Known(NamedTuple):
    """A layout, and what it was read from."""

    facts: tuple[Any, ...]
    layout: ExpertsLayout

    def __reduce__(self) -> tuple[Any, ...]:
        # None stands in copies and pickled models, which must not need this package
        return type(None), ()


def known_layout(module: nn.Module) -> ExpertsLayout | None:
    """The layout of a module if it was read before and still holds, else None."""
    known = module.__dict__.get(_ATTRIBUTE)
    if known is None or (known.facts != _facts(module) and not is_replica(module)):
        return None
    return known.layout


def layout_of(module: nn.Module) -> ExpertsLayout:
    """The layout of a module, read if it is not known.

    Raises:
        UnsupportedExperts: as `read_layout`.
    """
    layout = known_layout(module)
    if layout is None:
        _remember(module)
        layout = module.__dict__[_ATTRIBUTE].layout
    return layout


@torch.compiler.disable(reason="it reads the layout of experts: call the model once before")
def _remember(module: nn.Module) -> None:
    """Read the layout of a module into an attribute of it."""
    # not an assignment, because nn.Module looks for modules and parameters in each
    module.__dict__[_ATTRIBUTE] = _Known(_facts(module), read_layout(module))


def _facts(module: nn.Module) -> tuple[Any, ...]:
    """What the layout of a module was read from, and training or pruning may change."""
    facts = [*activation_facts(module)]
    for name in (*LIMIT_NAMES, *ALPHA_NAMES):
        if hasattr(type(module), name):
            # a property, or an attribute of the class
            facts.append(getattr(module, name))
    for name in STACKS:
        # a parametrized weight would be decoded by getattr
        parameter = module._parameters.get(name)
        facts.append(None if parameter is None else tuple(parameter.shape))
    return tuple(facts)
