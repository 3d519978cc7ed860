"""Combinations of operations, computed by one fused kernel if it supports the case.

The fused kernel reads the rows only once. If it does not support a case, it returns None and writes
nothing, and the operations run one after the other.
"""

import torch

from .activation import Activation
from .dropout import Dropout
from .operations import Operations, RankRows
from .routing import Routing


def expert_shrink_outer(
    ops: Operations,
    x: torch.Tensor,
    lora_A: torch.Tensor | None,
    right: torch.Tensor | None,
    routing: Routing,
    scaling: float,
    out: torch.Tensor | None,
    *,
    row_weights: torch.Tensor | None = None,
    gather: bool = False,
) -> torch.Tensor | None:
    """xa = `expert_shrink` of x, and out = `expert_outer` of x and right.

    Args:
        ops: the operations to compose.
        x: [M, K] rows, or [T, K] tokens with gather.
        lora_A: [E, r, K]; None if nothing is to be computed.
        right: [M, R] rows of rank r, dtype of x; read only to compute `out`.
        scaling: factor of xa, not of out.
        out: [E, K, r] fp32 (fp64 for fp64), any strides; gets zeros for an expert without rows;
            None if it is not needed.
        row_weights: [T, top_k] float, weights of the rows in the outer product; None for ones.
    Returns: xa [M, R], dtype of x; None without lora_A.
    """
    if lora_A is None:
        return None
    if out is None:
        return ops.expert_shrink(x, lora_A, routing, scaling, gather=gather)
    assert right is not None, "an outer product needs both operands"
    xa = ops.expert_shrink_outer(
        x, lora_A, right, routing, scaling, out, row_weights=row_weights, gather=gather
    )
    if xa is None:
        ops.expert_outer(x, right, routing, out, row_weights=row_weights, gather_left=gather)
        xa = ops.expert_shrink(x, lora_A, routing, scaling, gather=gather)
    return xa


def expert_act_backward_outer(
    ops: Operations,
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
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """The gradient of an activation, and the low-rank products with its rows.

    The result is the same as from `expert_act_backward`, then `expert_outer` of down_yb and act,
    which writes dA, and then `expert_shrink_outer` of dpre.

    Args:
        ops: the operations to compose.
        draw, pre, activation, top_k_weights, dout, bias: as in `expert_act_backward`; draw may be
            overwritten.
        rows: the rows of rank r, and the gradients to write.
        dropout: the mask that is applied to act in dA.
    Returns: dpre [M, N], yb [M, R] = scaling * B^T dpre (None without lora_B), and
        d_top_k_weights [T, top_k] fp32.
    """
    if rows.dA is not None and rows.dB is not None:
        found = ops.expert_act_backward_outer(
            draw,
            pre,
            routing,
            activation,
            top_k_weights,
            rows,
            dout=dout,
            bias=bias,
            dropout=dropout,
        )
        if found is not None:
            return found
    dpre, act, d_top_k_weights = ops.expert_act_backward(
        draw, pre, routing, activation, top_k_weights, dout=dout, bias=bias
    )
    if rows.dA is not None:
        assert rows.down_yb is not None, "an outer product needs both operands"
        ops.expert_outer(
            rows.down_yb, act, routing, rows.dA, row_weights=top_k_weights, dropout=dropout
        )
    del act
    lora_BT = None if rows.lora_B is None else rows.lora_B.transpose(1, 2)
    yb = expert_shrink_outer(ops, dpre, lora_BT, rows.xa, routing, rows.scaling, rows.dB)
    return dpre, yb, d_top_k_weights
