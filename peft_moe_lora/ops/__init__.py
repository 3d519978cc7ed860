"""Operations on rows sorted by expert: knows rows, experts, ranks and strides; never heard of PEFT
or a model.

`reference` holds the pure-PyTorch twins (also the CPU path), `kernels` the Triton ones, same names
and signatures.
"""

from .activation import Activation
from .dropout import Dropout
from .operations import Operations, RankRows
from .quantized import QuantizedWeight
from .routing import Routing

__all__ = ["Activation", "Dropout", "Operations", "QuantizedWeight", "RankRows", "Routing"]
