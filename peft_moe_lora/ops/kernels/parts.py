"""A product with a quantized weight, in parts: some experts are decoded, their rows multiplied, then the next.

Tiles of few rows decode 4-bit codes for themselves (`codes_4bit`): then all experts are one part, and nothing is kept.

The scratch is a tensor of its call, freed behind it: torch's allocator gives every layer the same memory, in the order
of its stream and inside a CUDA graph too.
"""

from collections.abc import Iterator

import torch

from ..quantized import QuantizedWeight
from ..routing import Routing
from .codes.codes_4bit import decodes_in_kernel
from .dequantize import dequantize
from .launching.table import ceil_div
from .routing import part_tables

# of decoded experts at once, or one expert where it alone is larger: the bound of what decoding adds to the peak
SCRATCH_BYTES = 128 * 2**20


def parts(weight: torch.Tensor | QuantizedWeight, routing: Routing) -> Iterator[tuple]:
    """(experts, their weight [count, N, K], their routing), in turn; a weight is good until the next.

    Args:
        weight: [E, N, K]; a dense one is a single part, as is one whose products decode it for themselves.
        routing: with tiles.
    """
    if isinstance(weight, torch.Tensor) or decodes_in_kernel(weight, routing.block_m):
        yield slice(None), weight, routing
        return
    E, R, C = weight.stored_shape
    fitting = max(1, SCRATCH_BYTES // (R * C * weight.dtype.itemsize))
    # parts of one size: the last is not left with one expert
    count = ceil_div(E, ceil_div(E, fitting))
    scratch = torch.empty(count, R, C, dtype=weight.dtype, device=weight.device)
    for part, first in zip(part_tables(routing, count), range(0, E, count), strict=True):
        dense = dequantize(weight, routing.expert_offsets, first, scratch[: E - first])
        yield slice(first, first + count), weight.oriented(dense), part


def of_experts(t: torch.Tensor | None, experts: slice) -> torch.Tensor | None:
    """What of an argument [E, ...] that may be absent belongs to some experts."""
    return t if t is None or experts == slice(None) else t[experts]
