"""A and B of a router, or of a linear layer in a divided model: y = x W^T in the dtype of x."""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import nn

from ..functional import without_autocast
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
