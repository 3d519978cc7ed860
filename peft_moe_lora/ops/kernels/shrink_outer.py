"""xa[m] = scaling * A[e] x[row], and out[e, k, j] = sum over the rows m of e of w[m] * x[row, k] *
right[m, j].
"""

import torch

from ..ranks import check_columns
from ..routing import Routing
from .launching.table import chunk_block_m, device_facts, lookup
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
    """`expert_shrink` of x, and `expert_outer` of x and right, by one kernel that reads x once.

    Args:
        x: [M, K] rows, or [T, K] tokens with gather; bf16, fp16 or fp32.
        lora_A: [E, r, K], any strides and float dtype; the kernel casts its tiles to the dtype of
            x, and no cast copy is made.
        right: [M, R] rows of rank r, dtype of x.
        scaling: applies to xa, not to out.
        out: [E, K, r] fp32, any strides; every element is written. An expert without rows gets
            zeros.
        row_weights: [T, top_k] float, for the outer product; None for ones.
    Returns: xa [M, R], dtype of x; None if no kernel supports this call, and then nothing is
        written.
    Twin: `composed.expert_shrink_outer` with the operations of `reference`.
    """
    check_columns(right, lora_A.shape[1])
    arch, multiprocessors = device_facts(x.device)
    block_m = min(routing.block_m, chunk_block_m(routing.num_rows, routing.num_experts))
    blocks = lookup("shrink_outer", arch, x.element_size(), block_m)
    # a program has one chunk. With fewer programs than two for three multiprocessors, the two
    # operations take less time
    if not blocks or 3 * num_chunks(routing, blocks) < 2 * multiprocessors:
        return None
    kernel = in_gluon("shrink_outer")
    if kernel is None:
        return None
    return kernel(blocks, x, lora_A, right, routing, scaling, out, row_weights, gather)


def num_chunks(routing: Routing, blocks: dict) -> int:
    """An estimate of the number of chunks that does not depend on the routing."""
    at_least = min(routing.num_experts, routing.num_rows)
    return max(at_least, routing.num_rows // (blocks["ROWS"] + blocks["TAIL"]))
