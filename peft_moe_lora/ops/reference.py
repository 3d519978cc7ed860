"""The operations in plain PyTorch: the twins of the kernels, which also run without Triton.

`operations` documents the arguments and the results.
"""

from collections.abc import Callable
from typing import Any

import torch

from .activation import Activation, wide
from .dropout import Dropout, dropout_mask
from .grouped import grouped_addmm_, grouped_mm, grouped_outer
from .operations import RankRows
from .quantized import QuantizedWeight
from .ranks import as_stored_rank, check_columns, of_rank
from .routing import Routing

__all__ = [
    "add_low_rank",
    "combine",
    "combine_backward",
    "dequantize",
    "expert_act_backward",
    "expert_act_backward_outer",
    "expert_linear",
    "expert_linear_act",
    "expert_outer",
    "expert_shrink",
    "expert_shrink_outer",
    "fast_widths",
    "one_expert",
    "replayed",
    "route",
    "transpose_columns",
    "with_tiles",
    "zero_unrouted",
]


def replayed(function: Callable[..., tuple], *arguments: Any) -> tuple:
    """Run function(*arguments), which composes operations; nothing is recorded."""
    return function(*arguments)


def route(
    top_k_index: torch.Tensor, num_experts: int, table: torch.Tensor | None = None
) -> Routing:
    """A stable counting sort of the slots by expert, without a table of tiles."""
    ids = top_k_index.reshape(-1)
    ids = torch.where((ids < 0) | (ids >= num_experts), num_experts, ids)
    sorted_ids, order = torch.sort(ids, stable=True)
    expert_offsets = torch.searchsorted(
        sorted_ids, torch.arange(num_experts + 1, device=ids.device), out_int32=True
    )
    rows = torch.arange(ids.shape[0], dtype=torch.int32, device=ids.device)
    slot_row = torch.empty_like(rows)
    slot_row[order] = torch.where(sorted_ids < num_experts, rows, -1)
    row_slot = order.to(torch.int32)
    return Routing(
        expert_offsets,
        row_slot // max(top_k_index.shape[1], 1),
        row_slot,
        slot_row,
        top_k_index.shape[1],
    )


def one_expert(rows: torch.Tensor) -> Routing:
    """The routing of rows that are all of one expert, in their order."""
    M = rows.shape[0]
    order = torch.arange(M, dtype=torch.int32, device=rows.device)
    offsets = torch.tensor([0, M], dtype=torch.int32, device=rows.device)
    return Routing(offsets, order, order, order, 1)


def with_tiles(routing: Routing) -> Routing:
    """The routing itself, because these operations need no table of tiles."""
    return routing


def dequantize(
    weight: QuantizedWeight, expert_offsets: torch.Tensor, first: int, out: torch.Tensor
) -> torch.Tensor:
    """out[j] = W[first + j], in its stored order, for the experts that have rows."""
    for e in (expert_offsets[1:] > expert_offsets[:-1]).nonzero()[:, 0].tolist():
        if first <= e < first + out.shape[0]:
            out[e - first] = weight.decode(e, 1)[0]
    return out


def expert_shrink(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    routing: Routing,
    scaling: float,
    *,
    gather: bool = False,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """xa[m] = scaling * A[e] drop(x[m]).  Returns: [M, R] rows of rank r, dtype of x."""
    x = _dropped(_rows(x, routing, gather), routing, dropout)
    A = lora_A.to(x.dtype).transpose(1, 2)  # [E, K, r]
    return as_stored_rank(grouped_mm(x, A, routing.expert_offsets).mul_(scaling))


def expert_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    routing: Routing,
    *,
    bias: torch.Tensor | None = None,
    xa: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    gather: bool = False,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """y[m] = W[e] x[m] + bias[e] + drop(B[e] xa[m])."""
    y = grouped_mm(_rows(x, routing, gather), weight.transpose(1, 2), routing.expert_offsets)
    if bias is not None:
        y += bias[_row_expert(routing)]
    if xa is not None and lora_B is not None:
        B = lora_B.to(xa.dtype).transpose(1, 2)  # [E, r, N]
        xa = of_rank(xa, lora_B.shape[2])
        if dropout is None:
            grouped_addmm_(y, xa, B, routing.expert_offsets)
        else:
            y += _dropped(grouped_mm(xa, B, routing.expert_offsets), routing, dropout)
    return y


def expert_linear_act(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    routing: Routing,
    activation: Activation,
    *,
    bias: torch.Tensor | None = None,
    xa: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    gather: bool = False,
    keep_pre: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """pre = `expert_linear`, act = activation(pre).

    Returns: pre [M, N], None without keep_pre; act [M, I].
    """
    pre = expert_linear(x, weight, routing, bias=bias, xa=xa, lora_B=lora_B, gather=gather)
    act = activation(pre)
    return pre if keep_pre else None, act


def expert_act_backward(
    draw: torch.Tensor,
    pre: torch.Tensor,
    routing: Routing,
    activation: Activation,
    top_k_weights: torch.Tensor,
    *,
    dout: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of the pre-activation and of the routing weights, from the gradient of act."""
    act = activation(pre)
    w = top_k_weights.reshape(-1)[routing.row_slot.long()].to(draw.dtype)
    dpre = activation.backward(pre, w[:, None] * draw)
    dw = (wide(act) * wide(draw)).sum(-1)
    if bias is not None and dout is not None:
        dw += (wide(bias[_row_expert(routing)]) * wide(_rows(dout, routing, gather=True))).sum(-1)
    return dpre, act, _slots(dw, routing)


def combine(
    y: torch.Tensor,
    routing: Routing,
    top_k_weights: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """out[t] = sum over the token's slots of top_k_weights[t, slot] * y[row of the slot]."""
    # a sentinel's row may hold NaN, so it is masked and not multiplied by zero
    rows = wide(y[routing.slot_row.clamp(min=0).long()]).masked_fill(
        (routing.slot_row < 0)[:, None], 0.0
    )
    rows = rows.view(routing.num_tokens, routing.top_k, y.shape[1])
    if top_k_weights is not None:
        rows = rows * top_k_weights.to(rows.dtype)[:, :, None]
    return rows.sum(1).to(dtype or y.dtype)


def combine_backward(
    dout: torch.Tensor,
    y: torch.Tensor,
    routing: Routing,
    top_k_weights: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dy[m] = w[slot] * dout[t], d_top_k_weights[slot] = <y[m], dout[t]>."""
    rows = wide(_rows(dout, routing, gather=True))
    w = top_k_weights.reshape(-1)[routing.row_slot.long()].to(rows.dtype)
    return (w[:, None] * rows).to(y.dtype), _slots((wide(y) * rows).sum(-1), routing)


def fast_widths(widths: tuple[int, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """The widths themselves: products in plain PyTorch take any."""
    return widths


def add_low_rank(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
    y: torch.Tensor | None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Write y + xa B^T to `out`, and return xa = scaling * x A^T: [T, R] rows of rank r."""
    xa = (x @ lora_A.to(x.dtype).mT).mul_(scaling)
    B = lora_B.to(x.dtype).mT
    if y is None:
        torch.mm(xa, B, out=out)
    else:
        torch.addmm(y, xa, B, out=out)
    return as_stored_rank(xa)


def transpose_columns(matrix: torch.Tensor, a: int, dtype: torch.dtype) -> torch.Tensor:
    """Every row [a * b] as a matrix [a, b], transposed."""
    return matrix.unflatten(1, (a, -1)).transpose(1, 2).flatten(1).to(dtype)


def zero_unrouted(rows: torch.Tensor, routing: Routing) -> torch.Tensor:
    """rows[m] = 0, in place, for the rows of sentinels."""
    m = torch.arange(routing.num_rows, device=rows.device)
    return rows.masked_fill_((m >= routing.expert_offsets[-1])[:, None], 0.0)


def expert_outer(
    left: torch.Tensor,
    right: torch.Tensor,
    routing: Routing,
    out: torch.Tensor,
    *,
    row_weights: torch.Tensor | None = None,
    gather_left: bool = False,
    gather_right: bool = False,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """out[e, p, q] = sum over the rows m of e of w[slot] * left[m, p] * drop(right)[m, q]."""
    left = _rows(left, routing, gather_left)
    right = _dropped(_rows(right, routing, gather_right), routing, dropout)
    if row_weights is not None:
        left = left * row_weights.reshape(-1)[routing.row_slot.long()].to(left.dtype)[:, None]
    check_columns(left, out.shape[1])
    check_columns(right, out.shape[2])
    # the columns past a rank are zeros, and have no sums in out
    left = left[:, : out.shape[1]]
    right = right[:, : out.shape[2]]
    return grouped_outer(left, right, routing.expert_offsets, out)


def expert_shrink_outer(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    right: torch.Tensor,
    routing: Routing,
    scaling: float,
    out: torch.Tensor,
    *,
    row_weights: torch.Tensor | None = None,
    gather: bool = False,
) -> torch.Tensor | None:
    """Always None: `composed.expert_shrink_outer` then runs the two operations."""
    return None


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
    """Always None: `composed.expert_act_backward_outer` is the twin of the kernel."""
    return None


def _dropped(x: torch.Tensor, routing: Routing, dropout: Dropout | None) -> torch.Tensor:
    if dropout is None:
        return x
    mask = dropout_mask(dropout, routing.row_slot, x.shape[1])
    return (x * mask).to(x.dtype)


def _rows(x: torch.Tensor, routing: Routing, gather: bool) -> torch.Tensor:
    return x[routing.row_token.long()] if gather else x


def _row_expert(routing: Routing) -> torch.Tensor:
    """[M] int64 expert of each row.

    A sentinel's row gets the last expert, so that indexing stays in bounds.
    """
    rows = torch.arange(routing.num_rows, dtype=torch.int32, device=routing.row_slot.device)
    expert = torch.searchsorted(routing.expert_offsets, rows, right=True) - 1
    return expert.clamp(max=routing.num_experts - 1)


def _slots(values: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Reorder values of the rows, [M], to the order of the slots, [T, top_k]; 0 for sentinels."""
    by_slot = values[routing.slot_row.clamp(min=0).long()].masked_fill(routing.slot_row < 0, 0.0)
    return by_slot.view(routing.num_tokens, routing.top_k)
