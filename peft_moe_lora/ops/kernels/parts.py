"""A product with a quantized weight in parts: decode some experts, multiply their rows, repeat.

If the product decodes the weight itself (`product_4bit`), all experts are one part.

The scratch buffer for decoded experts is an ordinary tensor that is freed after the call. PyTorch's
allocator reuses memory in stream order, also inside a CUDA graph, so all layers share one buffer.
"""

from collections.abc import Iterator

import torch

from ..quantized import QuantizedWeight
from ..routing import Routing
from .codes.product_4bit import decodes_in_kernel
from .dequantize import dequantize
from .launching.table import ceil_div
from .routing import part_tables

# largest scratch buffer in bytes, unless one expert alone is larger; it adds to peak memory
SCRATCH_BYTES = 128 * 2**20


def parts(
    weight: torch.Tensor | QuantizedWeight, routing: Routing
) -> Iterator[tuple[slice, torch.Tensor | QuantizedWeight, Routing]]:
    """The parts of a product, in order: (experts, their weight [count, N, K], their routing).

    The weight of a part is overwritten when the next part is requested.

    Args:
        weight: [E, N, K]. A dense weight is a single part, and so is one that the product decodes.
        routing: with tiles.
    """
    if isinstance(weight, torch.Tensor) or decodes_in_kernel(weight, routing.block_m):
        yield slice(None), weight, routing
        return
    E, R, C = weight.stored_shape
    fitting = max(1, SCRATCH_BYTES // (R * C * weight.dtype.itemsize))
    # parts of about equal size; otherwise the last part could have a single expert
    count = ceil_div(E, ceil_div(E, fitting))
    scratch = torch.empty(count, R, C, dtype=weight.dtype, device=weight.device)
    for part, first in zip(part_tables(routing, count), range(0, E, count), strict=True):
        dense = dequantize(weight, routing.expert_offsets, first, scratch[: E - first])
        yield slice(first, first + count), weight.oriented(dense), part


def of_experts(t: torch.Tensor | None, experts: slice) -> torch.Tensor | None:
    """t[experts] of an argument [E, ...] that may be None; t itself for all experts."""
    if t is None or experts == slice(None):
        return t
    return t[experts]
