"""What an experts module computes beside its projections: its activation, its norm, its forward."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..experts.activation import own_activation
from ..experts.layout import ExpertsLayout
from ..functional import Projection, experts


def compute(
    module: nn.Module,
    layout: ExpertsLayout,
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    up: Projection,
    down: Projection,
    *,
    backend: str = "auto",
    recompute: bool = False,
    seeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute an experts module by `functional.experts`, with the module's own activation and norm.

    Args:
        module: the experts module, whose parameters are plain local tensors during this call.
        layout: layout of the module.
        rows: hidden_states [T, H] float, top_k_index [T, top_k] integer, where ids outside 0..E-1
            are skipped, and top_k_weights [T, top_k] float.
        up: the gate_up projection.
        down: the down projection.
        backend, recompute, seeds: as in `functional.experts`.
    Returns: [T, H], dtype of hidden_states.
    """
    post_norm = None
    if getattr(module, "has_post_expert_norm", False):
        post_norm = cast(nn.Module, module.post_expert_norm)
    return experts(
        *rows,
        up,
        down,
        layout.activation or own_activation(module, layout.gated),
        post_norm=post_norm,
        backend=backend,
        recompute=recompute,
        seeds=seeds,
    )


def implementation(name: str, module: nn.Module) -> Callable[..., torch.Tensor]:
    """The function that transformers registers under a name, or the class's own forward.

    Args:
        name: an experts implementation, as "grouped_mm"; "eager" is the class's own forward.
        module: an experts module on transformers' experts interface.
    Raises:
        KeyError: if there is no implementation of this name.
    """
    # the decorator of the interface wraps the class's own forward
    forward: Any = type(module).forward
    return ALL_EXPERTS_FUNCTIONS.get_interface(name, forward.__wrapped__)
