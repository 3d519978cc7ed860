"""Operations on rows sorted by expert: knows rows, experts, ranks and strides; never heard of PEFT or a model.

`reference` holds the pure-PyTorch twins (also the CPU path), `kernels` the Triton ones, same names and signatures.
"""

from .activation import Activation
from .quantized import QuantizedWeight
from .routing import Dropout, Routing

__all__ = ["Activation", "Dropout", "QuantizedWeight", "Routing"]
