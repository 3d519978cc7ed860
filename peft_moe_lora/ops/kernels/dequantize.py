"""W[e] of the experts that have rows, from what is stored of it: whichever format that is."""

import torch

from ..quantized import Codes4bit, QuantizedWeight
from .codes.dequantize_4bit import dequantize_4bit
from .codes.dequantize_8bit import dequantize_8bit


def dequantize(
    weight: QuantizedWeight, expert_offsets: torch.Tensor, first: int, out: torch.Tensor
) -> torch.Tensor:
    """Decode experts first up to first + count, those that have rows; the others' places stay as they are.

    Args:
        weight: of E experts.
        expert_offsets: [E + 1] int32; an expert whose offset is its successor's has no rows.
        first: the expert that comes to lie at out[0].
        out: [count, R, C] contiguous, in the order in which the weight is stored.
    Returns: out.
    Twin: `reference.dequantize`.
    """
    run = dequantize_4bit if isinstance(weight, Codes4bit) else dequantize_8bit
    return run(weight, expert_offsets, first, out)
