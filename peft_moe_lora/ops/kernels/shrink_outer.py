"""xa[m] = scaling * A[e] x[row], and out[e, k, j] = sum over the rows m of e of w[m] * x[row, k] *
right[m, j].
"""

import torch

from ..routing import Routing
from .launching.table import device_facts, lookup
from .sm90.in_gluon import in_gluon


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
    """`expert_shrink` of x, and `expert_outer` of x and right, in one reading of x.

    Args:
        x: [M, K] rows, or [T, K] tokens with gather; bf16, fp16 or fp32.
        lora_A: [E, r, K], any strides and float dtype; cast to the dtype of x tile by tile, never
            copied.
        right: [M, r], dtype of x.
        scaling: of xa, not of out.
        out: [E, K, r] fp32, any strides; every element is written, zeros for an expert without
            rows.
        row_weights: [T, top_k] float, of the outer product; None for ones.
    Returns: xa [M, r], dtype of x; None where no kernel does this here, and then nothing is
        written.
    Twin: `composed.expert_shrink_outer` with the operations of `reference`.
    """
    arch, multiprocessors = device_facts(x.device)
    blocks = lookup("shrink_outer", arch, x.element_size(), routing.block_m)
    # a program has one chunk: with fewer programs than this the two operations take less time
    if not blocks or 3 * num_chunks(routing, blocks) < 2 * multiprocessors:
        return None
    kernel = in_gluon("shrink_outer")
    if kernel is None:
        return None
    return kernel(blocks, x, lora_A, right, routing, scaling, out, row_weights, gather)


def num_chunks(routing: Routing, blocks: dict) -> int:
    """About how many chunks there are, whatever the routing."""
    at_least = min(routing.num_experts, routing.num_rows)
    return max(at_least, routing.num_rows // (blocks["ROWS"] + blocks["TAIL"]))
