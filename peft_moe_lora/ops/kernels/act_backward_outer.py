"""dpre, dw, yb, dB and dA from draw and pre: what backward asks of an activation and of the rank-r rows beside it."""

import torch

from ..activation import Activation
from ..routing import Dropout, Routing
from .act_backward import expert_act_backward
from .launching.table import device_facts, lookup
from .outer import expert_outer
from .shrink_outer import expert_shrink_outer
from .sm90.in_gluon import in_gluon


def expert_act_backward_outer(
    draw: torch.Tensor,
    pre: torch.Tensor,
    routing: Routing,
    activation: Activation,
    top_k_weights: torch.Tensor,
    right: torch.Tensor,
    xa: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    dA: torch.Tensor,
    dB: torch.Tensor,
    *,
    dout: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`expert_act_backward`, `expert_outer` of act and `expert_shrink_outer` of dpre.

    Args:
        draw, pre, activation, top_k_weights, dout, bias: of `expert_act_backward`; draw may be written to.
        right: [M, r], the down projection's B^T dout; its rows are weighted.
        xa: [M, r], with lora_B [E, N, r], of the up projection.
        scaling: of yb.
        dA: [E, r, I] fp32, receives the gradient of the down projection's A; dB: [E, N, r], of the up projection's B.
        dropout: masks act in dA.
    Returns: dpre [M, N], yb [M, r] = scaling * B^T dpre, d_top_k_weights [T, top_k] fp32.
    Twin: `reference.expert_act_backward_outer`.
    """
    arch, _ = device_facts(pre.device)
    blocks, out = lookup("act_backward_outer", arch, pre.element_size(), routing.block_m), None
    if blocks and dropout is None and (kernel := in_gluon("act_backward_outer")):
        out = kernel(
            blocks,
            draw,
            pre,
            routing,
            activation,
            top_k_weights,
            right,
            xa,
            lora_B,
            scaling,
            dA,
            dB,
            dout,
            bias,
        )
    if out is None:
        dpre, act, dw = expert_act_backward(
            draw, pre, routing, activation, top_k_weights, dout=dout, bias=bias
        )
        expert_outer(right, act, routing, dA, row_weights=top_k_weights, dropout=dropout)
        out = dpre, expert_shrink_outer(dpre, lora_B.transpose(1, 2), xa, routing, scaling, dB), dw
    return out
