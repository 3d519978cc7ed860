"""Decides from a module's class and weight whether it is a router."""

from typing import cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from .layout import is_experts
from .stored import shape_of


def is_router(module: nn.Module, parent: nn.Module | None = None) -> bool:
    """Whether a module is a router: its own forward multiplies by a 2-D weight [E, H].

    There are two kinds. A router may be a module that is not a linear layer and has the weight as a
    parameter. Or it may be a linear layer whose class overrides forward (phimoe, llama4); such a
    layer is a router only if its parent also holds experts.

    Args:
        module: any module.
        parent: the module that contains it; None if it has no parent.
    """
    if isinstance(module, nn.Linear):
        overrides_forward = type(module).forward is not nn.Linear.forward
        return overrides_forward and parent is not None and _holds_experts(parent)
    if isinstance(module, nn.Embedding | Conv1D) or hasattr(module, "in_features"):
        return False
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter):
        return False
    return weight.is_floating_point() and len(shape_of(weight)) == 2


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(in-features, out-features) of a linear layer, an embedding or a router; else None."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return cast(int, module.in_features), cast(int, module.out_features)
    if is_router(module):
        out_features, in_features = shape_of(module.weight)
        return in_features, out_features
    return None


def _holds_experts(parent: nn.Module) -> bool:
    # if the experts are adapted, the child is the adapted layer and its base_layer are the experts
    return any(is_experts(getattr(child, "base_layer", child)) for child in parent.children())
