"""logits = x W^T + scaling * (x A^T) B^T, for modules that multiply by a weight in a forward of their own.

A router of transformers v5 holds a bare [E, H] weight and goes from hidden states to experts in one forward. That
forward runs as it is; the one product by its weight is caught on the way and gets the low-rank term added.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import nn
from torch.overrides import TorchFunctionMode

from ..experts.routers import linear_features

_PRODUCTS = frozenset(
    {
        F.linear,
        torch.mm,
        torch.matmul,
        torch.Tensor.mm,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
    }
)
# what a forward may do to its weight before the product: another dtype, or the transpose
_VIEWS = frozenset(
    {
        torch.Tensor.type,
        torch.Tensor.to,
        torch.Tensor.float,
        torch.Tensor.double,
        torch.Tensor.half,
        torch.Tensor.bfloat16,
        torch.Tensor.t,
        torch.Tensor.T.__get__,
        torch.Tensor.mT.__get__,
        torch.t,
    }
)


class UnsupportedRouter(ValueError):
    """A module with a weight of its own, but whose forward does not multiply by it once."""


class MoELoraRouter(lora.Linear):
    """PEFT's linear LoRA layer around a module that is no linear layer: a router.

    Its parameters, their names, initialisation, dropout, scaling and merging are PEFT's:
    `lora_A.<adapter>.weight` [r, H] and `lora_B.<adapter>.weight` [E, r].
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return linear_features(module)

    def update_layer(self, adapter_name: str, *args, **kwargs) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        # set for models whose linear layers are stored [K, N]; a router's weight is [E, H]
        self.fan_in_fan_out = False
        for side in (self.lora_A, self.lora_B):
            side[adapter_name] = _Factor.of(side[adapter_name])

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # where accelerate offloads the weight, it is brought to this device for every forward
        hook = getattr(self.base_layer, "_hf_hook", None)
        if device is None and self.base_layer.weight.is_meta and hook is not None:
            device = hook.execution_device
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)

    def forward(self, *args, **kwargs):
        """The router's own forward, with the active adapters' low-rank terms in its logits.

        Raises:
            UnsupportedRouter: if that forward multiplies by its weight not at all or several times.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        if (
            self.disable_adapters
            or self.merged
            or not any(name in self.lora_A for name in self.active_adapters)
        ):
            return self.base_layer(*args, **kwargs)
        product = _ProductOf(self.base_layer, self._low_rank)
        with product:
            out = self.base_layer(*args, **kwargs)
        if product.count != 1:
            raise UnsupportedRouter(
                f"{type(self.base_layer).__name__}.forward multiplies by its weight {product.count} times where a "
                "LoRA needs one product; take it out of target_modules, or train it whole with modules_to_save."
            )
        return out

    def _low_rank(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """logits + scaling * (x A^T) B^T of every active adapter, in the dtype of the logits.

        Args:
            x: [..., H] float, what the router multiplied by its weight.
            logits: [..., E] float, the product.
        """
        # a second product, not W + B A: W may be a shard and A and B not
        x = x.to(logits.dtype)
        for name in self.active_adapters:
            if name in self.lora_A:
                xa = self.lora_A[name](self.lora_dropout[name](x))
                logits = logits + self.lora_B[name](xa) * self.scaling[name]
        return logits


class _Factor(nn.Linear):
    """A or B, applied in the dtype of what it is given; a module, so that hooks which bring its weight still run."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "_Factor":
        factor = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        factor.weight = linear.weight
        return factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class _ProductOf(TorchFunctionMode):
    """While entered, whatever is multiplied by a module's weight goes through a function on its way out.

    Args:
        module: its `weight` is looked at when a product is made, so hooks may replace it before.
        change: called as change(x, product), gives what the forward sees in place of the product.
    """

    def __init__(
        self, module: nn.Module, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ):
        super().__init__()
        self.module, self.change = module, change
        self.count = 0
        self._seen: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _VIEWS and self._is_weight(args[0]):
            self._seen.append(out)
        elif func in _PRODUCTS:
            x, weight = (*args, *kwargs.values())[:2]
            if self._is_weight(weight):
                self.count += 1
                return self.change(x, out)
        return out

    def _is_weight(self, tensor) -> bool:
        return tensor is self.module.weight or any(tensor is seen for seen in self._seen)
