"""y[m] = W[e] x[row] + bias[e] + mask * (B[e] xa[m]), and act[m] = activation(y[m]).

row = row_token[m] where x is gathered, else m.

A product is computed by one of three kernels: `sm90.linear_roles`, `linear_ordered` for rows in
expert order, or `linear_general`, which supports every case.
"""

import torch

from ..activation import Activation
from ..dropout import Dropout
from ..quantized import QuantizedWeight
from ..routing import Routing
from .linear_general import linear_general
from .linear_ordered import linear_ordered
from .parts import of_experts, parts
from .routing import with_tiles
from .sm90.by_roles import by_roles
from .tiles.product import Product


def expert_linear(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    routing: Routing,
    *,
    bias: torch.Tensor | None = None,
    xa: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    gather: bool = False,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """y[m] = W[e] x[m] + bias[e] + drop(B[e] xa[m]).

    Args:
        x: [M, K] rows, or [T, K] tokens with gather; bf16, fp16 or fp32.
        weight: [E, N, K], quantized or in the dtype of x. Any strides; fast if the stride of N or
            of K is 1.
        bias: [E, N].
        xa: [M, R] rows of rank r, dtype of x.
        lora_B: [E, N, r], any strides and float dtype; given with xa.
        gather: whether row m reads token row_token[m].
        dropout: masks the low-rank term of the output. Backward uses it for the gradient of an
            input on which forward applied dropout.
    Returns: [M, N], dtype of x.
    Twin: `reference.expert_linear`.
    """
    routing = with_tiles(routing)
    M = routing.num_rows
    N = weight.shape[1]
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    if y.numel() > 0:
        _multiply(Product(x, weight, routing, bias, xa, lora_B, gather, dropout, y=y))
    return y


def expert_linear_act(
    x: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    routing: Routing,
    activation: Activation,
    *,
    bias: torch.Tensor | None = None,
    xa: torch.Tensor | None = None,
    lora_B: torch.Tensor | None = None,
    gather: bool = False,
    keep_pre: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """pre = `expert_linear`, act = activation(pre).

    Args:
        x: [M, K] rows, or [T, K] tokens with gather; bf16, fp16 or fp32.
        weight: [E, N, K], quantized or in the dtype of x. Any strides; fast if the stride of N or
            of K is 1.
        bias: [E, N].
        xa: [M, R] rows of rank r, dtype of x.
        lora_B: [E, N, r], any strides and float dtype; given with xa.
        gather: whether row m reads token row_token[m].
        keep_pre: whether pre is wanted; if not, it is not written to memory.
    Returns: pre [M, N], or None without keep_pre, and act [M, I]; dtype of x.
    Twin: `reference.expert_linear_act`.
    """
    routing = with_tiles(routing)
    M = routing.num_rows
    N = weight.shape[1]
    pre = torch.empty(M, N, dtype=x.dtype, device=x.device) if keep_pre else None
    act = torch.empty(M, activation.width(N), dtype=x.dtype, device=x.device)
    if M > 0:
        inputs = x, weight, routing, bias, xa, lora_B, gather
        _multiply(Product(*inputs, activation=activation, y=pre, act=act))
    return pre, act


def _multiply(product: Product) -> None:
    """Write the outputs, part by part if the weight is decoded in parts."""
    for experts, weight, routing in parts(product.weight, product.routing):
        part = product
        if weight is not product.weight:
            part = product._replace(
                weight=weight,
                routing=routing,
                bias=of_experts(product.bias, experts),
                lora_B=of_experts(product.lora_B, experts),
            )
        _multiply_part(part)


def _multiply_part(product: Product) -> None:
    """Write the outputs by the first kernel that can."""
    if isinstance(product.weight, torch.Tensor) and (by_roles(product) or linear_ordered(product)):
        return
    linear_general(product)
