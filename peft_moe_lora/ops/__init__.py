"""Operations on rows sorted by expert.

They know rows, experts, ranks and strides, but nothing about PEFT or models. `kernels` holds the
Triton kernels. `reference` holds their twins in plain PyTorch, with the same names and signatures;
the twins are also the CPU path.
"""

from .activation import Activation
from .dropout import Dropout
from .operations import BatchShape, Operations, RankRows
from .quantized import QuantizedWeight
from .routing import Routing, table_memory

__all__ = [
    "Activation",
    "BatchShape",
    "Dropout",
    "Operations",
    "QuantizedWeight",
    "RankRows",
    "Routing",
    "table_memory",
]
