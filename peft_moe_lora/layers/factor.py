"""A and B of a router, or of a linear layer in a divided model: y = x W^T in the dtype of x."""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn

from ..functional import without_autocast
from ..ops.dropout import Dropout, dropout_mask
from ..parallel.linears import Factor


def replace_factors(layer: LoraLayer, adapter_name: str, factors: Mapping[str, Factor]) -> None:
    """Replace A and B of an adapter, which PEFT has made, by factors.

    Args:
        layer: a linear LoRA layer.
        adapter_name: the adapter.
        factors: what this process uses of lora_A and lora_B, by these names; empty in a model that
            is not divided.
    """
    for name in ("lora_A", "lora_B"):
        side = getattr(layer, name)
        linear = cast(nn.Linear, side[adapter_name])
        side[adapter_name] = LoraFactor.of(linear, factors.get(name))
    dropout = layer.lora_dropout[adapter_name]
    if factors and isinstance(dropout, nn.Dropout):
        layer.lora_dropout[adapter_name] = SharedDropout(dropout.p, factors["lora_A"])


class SharedDropout(nn.Dropout):
    """Dropout with the same mask in all processes that have the same input.

    Args:
        p: probability that an element is dropped.
        factor: of lora_A; None if no other process has the same input.
    """

    def __init__(self, p: float, factor: Factor | None = None) -> None:
        super().__init__(p)
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0:
            return x
        seed = torch.randint(2**31 - 1, (1,), device=x.device)
        if self.factor is not None:
            seed = self.factor.seed(seed)
        rows = torch.arange(x.numel() // x.shape[-1], device=x.device, dtype=torch.int32)
        mask = dropout_mask(Dropout(self.p, seed), rows, x.shape[-1])
        return x * mask.to(x.dtype).view_as(x)


class LoraFactor(nn.Linear):
    """A or B, applied in the dtype of its input.

    It is a module, so that accelerate's hooks on it, which fetch its weight, still run.
    """

    factor: Factor | None

    @classmethod
    def of(cls, linear: nn.Linear, factor: Factor | None) -> "LoraFactor":
        """The values of a linear layer; in a divided model, those of the first process."""
        made = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        made.factor = factor
        made.weight = linear.weight
        if factor is not None:
            values = linear.weight.detach()
            factor.share.agree(values)
            made.weight = factor.share.whole(values)
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.factor is None:
            return _Linear.apply(x, self.weight.to(x.dtype))
        weight = self.factor.of(self.weight)
        y = _Linear.apply(self.factor.entered(x), weight.to(x.dtype))
        return self.factor.left(y)


class _Linear(torch.autograd.Function):
    """x W^T without autocast, in backward too, wherever `backward()` is called."""

    @staticmethod
    def forward(
        # autograd's context accepts any attribute, but its class declares none
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        with without_autocast(x.device.type):
            return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        with without_autocast(x.device.type):
            rows = dy.reshape(-1, dy.shape[-1])
            return dy @ weight, rows.mT @ x.reshape(-1, x.shape[-1])
