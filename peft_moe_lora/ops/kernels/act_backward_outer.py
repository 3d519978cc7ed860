"""dpre, d_top_k_weights, yb, dB and dA, by one kernel that reads draw and pre once."""

import torch

from ..activation import Activation
from ..dropout import Dropout
from ..operations import RankRows
from ..routing import Routing
from .launching.table import device_facts, lookup
from .sm90.in_gluon import in_gluon


def expert_act_backward_outer(
    draw: torch.Tensor,
    pre: torch.Tensor,
    routing: Routing,
    activation: Activation,
    top_k_weights: torch.Tensor,
    rows: RankRows,
    *,
    dout: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """`expert_act_backward`, `expert_outer` of act, `expert_shrink_outer` of dpre, in one kernel.

    Args:
        draw, pre, activation, top_k_weights, dout, bias: as for `expert_act_backward`; draw may
            be overwritten.
        rows: the rank-r rows and the gradients to write; no field is None.
        dropout: masks act in dA.
    Returns: dpre [M, N], yb [M, R] = scaling * B^T dpre, d_top_k_weights [T, top_k] fp32; None
        if no kernel supports this call, and then nothing is written.
    Twin: `composed.expert_act_backward_outer` with the operations of `reference`.
    """
    arch, _ = device_facts(pre.device)
    blocks = lookup("act_backward_outer", arch, pre.element_size(), routing.block_m)
    if not blocks:
        return None
    kernel = in_gluon("act_backward_outer")
    if kernel is None:
        return None
    return kernel(blocks, draw, pre, routing, activation, top_k_weights, rows, dout, bias, dropout)
