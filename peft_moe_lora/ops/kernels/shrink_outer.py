"""xa[m] = scaling * A[e] x[row], and out[e, k, j] = sum over the rows m of e of w[m] * x[row, k] * right[m, j]."""

import torch

from ..routing import Routing
from .launching.table import device_facts, lookup
from .outer import expert_outer
from .shrink import expert_shrink
from .sm90.in_gluon import in_gluon


def chunks_of(routing: Routing, blocks: dict) -> int:
    """About how many chunks there are, whatever the routing."""
    return max(
        min(routing.num_experts, routing.num_rows),
        routing.num_rows // (blocks["ROWS"] + blocks["TAIL"]),
    )


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
) -> torch.Tensor:
    """`expert_shrink` of x, and `expert_outer` of x and right: in one reading of x where there is a kernel for it.

    Args:
        x: [M, K] rows, or [T, K] tokens with gather; bf16, fp16 or fp32.
        lora_A: [E, r, K], any strides and float dtype; cast to the dtype of x tile by tile, never copied.
        right: [M, r], dtype of x.
        scaling: of xa, not of out.
        out: [E, K, r] fp32, any strides; every element is written, zeros for an expert without rows.
        row_weights: [T, top_k] float, of the outer product; None for ones.
    Returns: xa [M, r], dtype of x.
    Twin: `reference.expert_shrink_outer`.
    """
    arch, multiprocessors = device_facts(x.device)
    blocks, xa = lookup("shrink_outer", arch, x.element_size(), routing.block_m), None
    # with fewer programs, of a chunk each, than two for three multiprocessors the two operations take less
    if (
        blocks
        and 3 * chunks_of(routing, blocks) >= 2 * multiprocessors
        and (kernel := in_gluon("shrink_outer"))
    ):
        xa = kernel(blocks, x, lora_A, right, routing, scaling, out, row_weights, gather)
    if xa is None:
        expert_outer(x, right, routing, out, row_weights=row_weights, gather_left=gather)
        xa = expert_shrink(x, lora_A, routing, scaling, gather=gather)
    return xa
