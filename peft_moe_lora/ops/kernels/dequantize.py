"""out[j] = W[first + j]: quantized experts decoded into dense weights."""

from collections.abc import Callable

import torch

from ..quantized import Codes4bit, Codes8bit, QuantizedWeight
from .codes.dequantize_4bit import dequantize_4bit
from .codes.dequantize_8bit import dequantize_8bit

# the kernel that decodes each class of quantized weight
KERNELS: dict[type[QuantizedWeight], Callable[..., torch.Tensor]] = {
    Codes4bit: dequantize_4bit,
    Codes8bit: dequantize_8bit,
}


def dequantize(
    weight: QuantizedWeight, expert_offsets: torch.Tensor, first: int, out: torch.Tensor
) -> torch.Tensor:
    """Decode the experts `first` up to `first + count`, except experts without rows.

    Args:
        weight: quantized weight of E experts.
        expert_offsets: [E + 1] int32; expert e has no rows if offsets[e] == offsets[e + 1].
        first: the expert that is written to out[0].
        out: [count, R, C] contiguous, dtype of the weight, in the order in which the weight is
            stored. Where an expert has no rows, nothing is written.
    Returns: out.
    Twin: `reference.dequantize`.
    """
    run = KERNELS[type(weight)]
    return run(weight, expert_offsets, first, out)
