"""Run `linear_roles` if the table has a row for it and Triton has the Gluon functions it needs."""

import torch

from ...activation import Activation
from ...dropout import Dropout
from ...routing import Routing
from ..tiles.tile import linear_blocks
from .in_gluon import in_gluon


def by_roles(
    x: torch.Tensor,
    weight: torch.Tensor,
    routing: Routing,
    bias: torch.Tensor | None,
    xa: torch.Tensor | None,
    lora_B: torch.Tensor | None,
    y: torch.Tensor | None,
    gather: bool = False,
    activation: Activation | None = None,
    act: torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> bool:
    """Compute the product by `linear_roles` if possible; return whether it was computed.

    The arguments are those of the launcher `linear_roles`.
    """
    op = "linear_roles"
    if gather:
        op = "linear_roles_gathered"
    found = linear_blocks(op, x, weight, routing.block_m)
    if found is None:
        return False
    kernel = in_gluon("linear_roles")
    if kernel is None:
        return False
    programs, _, blocks = found
    return kernel(
        programs, blocks, x, weight, routing, bias, xa, lora_B, y, gather, activation, act, dropout
    )
