"""A product on the host: what it reads, and what it writes.

y[m] = W[e] x[row] + bias[e] + drop(B[e] xa[m]), and with an activation act[m] = activation(y[m]).
row = row_token[m] where x is gathered, else m.
"""

from typing import NamedTuple

import torch

from ...activation import Activation
from ...dropout import Dropout
from ...quantized import QuantizedWeight
from ...ranks import stored_rank
from ...routing import Routing


class Product(NamedTuple):
    """The arguments of `expert_linear` and `expert_linear_act`, and their outputs.

    Attributes:
        x: [M, K] rows in expert order, or [T, K] tokens with gather.
        weight: [E, N, K].
        routing: with tiles; the rows of its tiles are written.
        bias: [E, N] or None.
        xa: [M, R] rows of rank r, or None. lora_B: [E, N, r], given with xa.
        dropout: masks the low-rank term; not with an activation.
        y: [M, N], dtype of x, contiguous; None if only act is wanted.
        act: [M, I], like y; None without an activation.
    """

    x: torch.Tensor
    weight: torch.Tensor | QuantizedWeight
    routing: Routing
    bias: torch.Tensor | None = None
    xa: torch.Tensor | None = None
    lora_B: torch.Tensor | None = None
    gather: bool = False
    dropout: Dropout | None = None
    activation: Activation | None = None
    y: torch.Tensor | None = None
    act: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """r; 0 without a low-rank term.

        Raises:
            AssertionError: if xa and lora_B are not of one rank.
        """
        if self.xa is None or self.lora_B is None:
            return 0
        r = self.lora_B.shape[2]
        columns = self.xa.shape[1]
        assert columns == stored_rank(r), f"B of rank {r} and rows of {columns} columns"
        return r

    @property
    def halves(self) -> int:
        """2 if y has a gate half and an up half, else 1."""
        if self.activation is None:
            return 1
        return self.activation.halves
