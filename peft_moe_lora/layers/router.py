"""logits = x W^T + scaling * (x A^T) B^T, for routers.

A router of transformers v5 multiplies by its [E, H] weight inside its own forward, which takes
hidden states and returns the chosen experts. This forward runs unchanged. Inside it, the product of
x and the weight is intercepted, and the low-rank term is added to the product.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import nn
from torch.overrides import TorchFunctionMode

from ..experts.routers import linear_features
from ..functional import without_autocast_of
from ..parallel import zero
from ..parallel.linears import Factor
from ..parallel.sharding import placed
from .checked import still_unchecked
from .factor import replace_factors
from .merging import check_may_unmerge

_PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {
        F.linear,
        torch.mm,
        torch.matmul,
        torch.Tensor.mm,
        torch.Tensor.matmul,
        torch.Tensor.__matmul__,
    }
)
# `T` and `mT` are properties: a TorchFunctionMode is called with their getters
_Tensor: Any = torch.Tensor
# what a forward may do to the weight before the product: change its dtype or transpose it
_VIEWS: frozenset[Callable[..., Any]] = frozenset(
    {
        torch.Tensor.type,
        torch.Tensor.to,
        torch.Tensor.float,
        torch.Tensor.double,
        torch.Tensor.half,
        torch.Tensor.bfloat16,
        torch.Tensor.t,
        _Tensor.T.__get__,
        _Tensor.mT.__get__,
        torch.t,
    }
)


class UnsupportedRouter(ValueError):
    """A module is targeted as a router, but its forward does not use its weight in one product."""


class MoELoraRouter(lora.Linear):
    """PEFT's linear LoRA layer around a router, whose forward does more than a linear layer's.

    It has PEFT's parameters, `lora_A.<adapter>.weight` [r, H] and `lora_B.<adapter>.weight` [E, r].
    Their initialisation, dropout, scaling and merging are PEFT's too.
    """

    def __init__(
        self, *args: Any, factors: Mapping[str, Factor] | None = None, **kwargs: Any
    ) -> None:
        # read by `update_layer`, which the constructor calls
        self.factors = factors or {}
        super().__init__(*args, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        features = linear_features(module)
        assert features is not None, "only routers are wrapped"
        return features

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        # the option is for models that store linear layers as [K, N]; a router's weight is [E, H]
        self.fan_in_fan_out = False
        replace_factors(self, adapter_name, self.factors)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT merges; every process must call this if the weight is sharded."""
        super().merge(still_unchecked(self, safe_merge, adapter_names), adapter_names)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """[E, H] update of the router's weight, placed as the weight is; without autocast."""
        weight = cast(nn.Parameter, self.base_layer.weight)
        with without_autocast_of(self):
            return placed(super().get_delta_weight(adapter), weight)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the router's own forward, and add the active adapters' low-rank terms to its logits.

        Raises:
            UnsupportedRouter: if the forward does not multiply by its weight exactly once, or does
                it where nothing can be differentiated.
        """
        if self.disable_adapters and self.merged:
            check_may_unmerge(self)
            self.unmerge()
        active = any(name in self.lora_A for name in self.active_adapters)
        if self.disable_adapters or self.merged or not active:
            return self.base_layer(*args, **kwargs)
        product = _ProductOf(self.base_layer, self._add_low_rank)
        with zero.linear_of_torch(), product:
            out = self.base_layer(*args, **kwargs)
        if product.undifferentiable:
            raise UnsupportedRouter(
                f"{type(self.base_layer).__name__}.forward multiplies by its weight inside an "
                "autograd function, so its LoRA would get no gradient; take the router out of "
                "target_modules."
            )
        if product.count != 1:
            raise UnsupportedRouter(
                f"{type(self.base_layer).__name__}.forward multiplies by its weight "
                f"{product.count} times, but a LoRA needs exactly one product; take the module out "
                "of target_modules, or train it whole with modules_to_save."
            )
        return out

    def _add_low_rank(self, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """logits + scaling * (x A^T) B^T of every active adapter.

        Args:
            x: [..., H] float, what the router multiplied by its weight.
            logits: [..., E] float, the product.
        Returns: [..., E], dtype of logits.
        """
        zero.check_gradients_arrive([*self.lora_A.parameters(), *self.lora_B.parameters()], x)
        # a second product, not W + B A: W may be sharded while A and B are whole
        x = x.to(logits.dtype)
        for name in self.active_adapters:
            if name in self.lora_A:
                xa = self.lora_A[name](self.lora_dropout[name](x))
                logits = logits + self.lora_B[name](xa) * self.scaling[name]
        return logits


class _ProductOf(TorchFunctionMode):
    """While this mode is active, a function changes every product of a tensor and a weight.

    Args:
        module: the module that owns the weight. The attribute `weight` is read again for every
            product, because hooks may replace it.
        change: called as change(x, product); its result replaces the product.
    """

    def __init__(
        self, module: nn.Module, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> None:
        super().__init__()
        self.module = module
        self.change = change
        self.count = 0
        self.grad_enabled = torch.is_grad_enabled()
        # whether a product ran without gradients although they were enabled around it
        self.undifferentiable = False
        # the results of casting and transposing the weight so far
        self._seen: list[torch.Tensor] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _VIEWS and self._is_weight(args[0]):
            self._seen.append(out)
        elif func in _PRODUCTS:
            x, weight = (*args, *kwargs.values())[:2]
            if self._is_weight(weight):
                self.count += 1
                if self.grad_enabled and not torch.is_grad_enabled():
                    self.undifferentiable = True
                return self.change(x, out)
        return out

    def _is_weight(self, tensor: object) -> bool:
        return tensor is self.module.weight or any(tensor is seen for seen in self._seen)
