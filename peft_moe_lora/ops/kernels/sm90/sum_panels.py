"""The second kernel of `act_backward_outer`; it adds the partial sums of all panels:

yb[m] = scaling * sum over the panels of partial_yb[:, m]
dw[m] = sum over the panels' halves of partial_dw[:, m], + <bias[e], dout[t]>
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...routing import Routing
from ..launching.launch import facts, launch
from ..launching.table import ceil_div, power_of_2
from ..operands import Bias, Operand
from ..tiles.bias import bias_times_dout

# columns of act in a half of a panel
HALF_PANEL = 64
# rows of a program
BLOCK_M = 64


class _Sizes(NamedTuple):
    """Experts, columns of the bias, columns of yb, and halves of panels."""

    E: Any
    H: Any
    r: Any
    halves: Any


class _Tile(NamedTuple):
    """Constants of the kernel.

    Attributes:
        M, H: rows of a program, and columns of the bias that are read at a time.
        R, E_PADDED: r and E, padded to powers of two.
    """

    M: Any
    H: Any
    R: Any
    E_PADDED: Any


@triton.jit(do_not_specialize=["M"])
def _sum_panels_kernel(
    partial_yb_ptr, partial_dw_ptr, bias, dout, row_token_ptr, row_slot_ptr, expert_offsets_ptr,
    yb_ptr, dw_ptr, M, sizes, scaling, TILE,
):  # fmt: skip
    """Grid [M / TILE.M]. dw of a sentinel's row is 0."""
    rows = tl.program_id(0) * TILE.M + tl.arange(0, TILE.M)
    offs_r = tl.arange(0, TILE.R)
    c = tl.arange(0, 2)
    routed = rows < tl.load(expert_offsets_ptr + sizes.E)
    slots = tl.load(row_slot_ptr + rows, mask=rows < M, other=0)
    mask = routed[:, None] & (offs_r < sizes.r)[None, :]
    yb_offsets = rows.to(tl.int64)[:, None] * sizes.r + offs_r[None, :]
    dw_offsets = c.to(tl.int64)[:, None] * M + rows[None, :]
    yb = tl.zeros((TILE.M, TILE.R), dtype=tl.float32)
    dw = tl.zeros((2, TILE.M), dtype=tl.float32)
    for half in tl.range(0, sizes.halves, 2, loop_unroll_factor=4):
        first = tl.cast(half, tl.int64) * M
        yb += tl.load(partial_yb_ptr + first // 2 * sizes.r + yb_offsets, mask=mask, other=0.0)
        mask_dw = (half + c < sizes.halves)[:, None] & routed[None, :]
        dw += tl.load(partial_dw_ptr + first + dw_offsets, mask=mask_dw, other=0.0)
    tl.store(yb_ptr + yb_offsets, (yb * scaling).to(yb_ptr.dtype.element_ty), mask=mask)
    dw = tl.sum(dw, axis=0)
    if bias.ptr is not None:
        dw += bias_times_dout(
            bias, dout, row_token_ptr, expert_offsets_ptr, rows, routed, sizes.E, sizes.H,
            TILE.E_PADDED, TILE.H,
        )  # fmt: skip
    tl.store(dw_ptr + slots, dw, mask=rows < M)


def sum_panels(
    partial_yb: torch.Tensor,
    partial_dw: torch.Tensor,
    routing: Routing,
    scaling: float,
    dout: torch.Tensor | None,
    bias: torch.Tensor | None,
    I: int,  # noqa: E741
    yb: torch.Tensor,
    dw: torch.Tensor,
) -> None:
    """Add the partial sums of all panels and write yb and dw.

    Args:
        partial_yb: [panels, M, r] fp32, contiguous; sums over the columns of one panel.
        partial_dw: [2 * panels, M] fp32, contiguous; sums over the columns of half a panel. If the
            last panel has only its first half, the last row is not read.
        dout: [T, H], or None; read only if there is a bias.
        bias: [E, H], the bias of the down projection, or None.
        I: columns of act.
        yb: [M, R], contiguous, receives scaling times the sums.
        dw: [T, top_k] fp32, contiguous, receives the gradient of the routing weights.
    """
    M, r = yb.shape
    E = routing.num_experts
    H = 0
    if bias is None:
        dout = None
    else:
        H = bias.shape[1]
    halves = I // HALF_PANEL

    def arguments() -> tuple[tuple, tuple, dict]:
        tile = _Tile(M=BLOCK_M, H=64, R=power_of_2(r), E_PADDED=power_of_2(E))
        operands = (
            partial_yb, partial_dw, Bias.of(bias), Operand.of(dout), routing.row_token,
            routing.row_slot, routing.expert_offsets, yb, dw,
        )  # fmt: skip
        return operands, (_Sizes(E, H, r, halves), scaling), {"TILE": tile}

    key = "sum_panels", facts(yb, bias, dout), E, H, I, r, scaling
    tensors = (
        partial_yb, partial_dw, bias, dout, routing.row_token, routing.row_slot,
        routing.expert_offsets, yb, dw,
    )  # fmt: skip
    launch(key, _sum_panels_kernel, (ceil_div(M, BLOCK_M), 1, 1), tensors, arguments, (M,))
