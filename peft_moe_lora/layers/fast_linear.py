"""y = W x + scaling * B (A drop(x)): PEFT's layers on linear layers, with a faster forward.

PEFT copies x to the dtype of A and B, fp32, and multiplies in fp32. Here the products are computed
in the dtype of the activations, by `functional.updated_linear`. All else is PEFT's: parameters and
their names, files, merging, quantized base layers. Where a layer does more than the formula, PEFT's
own forward runs: DoRA and other variants, a bias on B, `adapter_names`, hooks on A and B, A and B
that are no plain tensors.
"""

from typing import Any, cast

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook

from ..experts.hooks import is_hooked
from ..functional import (
    FrozenLinear,
    LinearUpdate,
    is_autocast_enabled,
    updated_linear,
    without_autocast_of,
)
from .merging import check_may_unmerge
from .parts import active_adapters, children, is_plain, weight_and_bias

# of x; complex gradients would need conjugates
_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


class FastForward(nn.Module):
    """The forward, for subclasses of PEFT's layers.

    Attributes:
        fast: adapter -> whether its configuration asks for this forward.
    """

    fast: dict[str, bool]
    base_layer: nn.Module
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_dropout: nn.ModuleDict
    lora_variant: dict[str, Any]
    scaling: dict[str, float]
    disable_adapters: bool
    merged: bool
    merged_adapters: list[str]
    _disable_adapters: bool
    cast_input_dtype_enabled: bool

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        updates = None
        if not args and not kwargs:
            updates = self._updates(x)
        if not updates:
            if self.disable_adapters and self.merged:
                check_may_unmerge(cast(BaseTunerLayer, self))
            return super().forward(x, *args, **kwargs)
        dtype = _dtype_of_products(x)
        y: FrozenLinear | torch.Tensor | None = self._frozen(dtype)
        if y is None:
            y = self.base_layer(x)
            if type(y) is not torch.Tensor:
                return super().forward(x)
        for update in updates:
            y = updated_linear(x, y, update, dtype)
        assert isinstance(y, torch.Tensor), "there is at least one update"
        return y

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """As PEFT computes it, in the dtype of A and B within autocast too."""
        with without_autocast_of(self):
            return cast(Any, super()).get_delta_weight(adapter)

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT deletes it."""
        cast(Any, super()).delete_adapter(adapter_name)
        self.fast.pop(adapter_name, None)

    def _updates(self, x: torch.Tensor) -> list[LinearUpdate] | None:
        """The updates of the active adapters; None where PEFT's forward must run."""
        if self._disable_adapters or self.merged_adapters or not self.cast_input_dtype_enabled:
            return None
        if x.dtype not in _DTYPES or not is_plain(x) or _is_watched():
            return None
        factors_A = children(self, "lora_A")
        factors_B = children(self, "lora_B")
        dropouts = children(self, "lora_dropout")
        updates = []
        for name in active_adapters(self):
            if name not in factors_A:
                continue
            if not self.fast.get(name, False) or name in self.lora_variant:
                return None
            lora_A = _factor(factors_A[name])
            lora_B = _factor(factors_B[name])
            p = _dropout_of(dropouts[name])
            scaling = self.scaling[name]
            if lora_A is None or lora_B is None or p is None:
                return None
            if not isinstance(scaling, float | int):
                return None
            updates.append(LinearUpdate(lora_A, lora_B, float(scaling), p))
        return updates

    def _frozen(self, dtype: torch.dtype) -> FrozenLinear | None:
        """The base layer; None if it must be called, or if it is trained."""
        layer: Any = self._modules["base_layer"]
        if not _runs_as(layer, nn.Linear):
            return None
        weight, bias = weight_and_bias(layer)
        for tensor in (weight, bias):
            if tensor is None:
                continue
            if not is_plain(tensor) or tensor.dtype != dtype or tensor.requires_grad:
                return None
        return FrozenLinear(weight, bias)


class Linear(FastForward, lora.Linear):
    """`peft.tuners.lora.Linear`."""


def choose_forward(layer: nn.Module, adapter_name: str, fast: bool) -> None:
    """Choose the forward of an adapter's layer.

    Args:
        layer: a layer that PEFT has made or changed for the adapter. If its class is one of PEFT's
            for linear layers, it becomes the subclass with `FastForward` for the first adapter that
            asks for it.
        adapter_name: the adapter.
        fast: whether the adapter asks for it.
    """
    kind = _fast_class(type(layer))
    if fast and kind is not None:
        layer.__class__ = kind
    if isinstance(layer, FastForward):
        if "fast" not in vars(layer):
            layer.fast = {}
        layer.fast[adapter_name] = fast


def _fast_class(own: type[nn.Module]) -> type[nn.Module] | None:
    """The subclass of one of PEFT's classes with `FastForward`; None if there is none."""
    if own is lora.Linear:
        return Linear
    if own.__module__ == "peft.tuners.lora.bnb":
        # imported only here: it imports bitsandbytes, as PEFT has done by now
        from .fast_linear_bnb import SUBCLASSES

        return SUBCLASSES.get(own)
    return None


def _dtype_of_products(x: torch.Tensor) -> torch.dtype:
    """The dtype in which autocast, or PyTorch without it, multiplies x by a weight of its dtype."""
    dtype = x.dtype
    if is_autocast_enabled(x) and dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return dtype


def _factor(module: Any) -> Any:
    """A or B, a plain tensor; None if the module is more than a product with it."""
    if not _runs_as(module, nn.Linear):
        return None
    weight, bias = weight_and_bias(module)
    if bias is not None or not is_plain(weight):
        return None
    return weight


def _runs_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of a module is the forward of a class, and nothing more."""
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    return not is_hooked(module)


def _dropout_of(module: Any) -> float | None:
    """The probability with which a dropout layer drops now; None if it does anything else."""
    if _runs_as(module, nn.Identity):
        return 0.0
    if not _runs_as(module, nn.Dropout) or module.p == 1:
        return None
    if not module.training:
        return 0.0
    return float(module.p)


def _is_watched() -> bool:
    """Whether something watches modules or operations, and would not see what happens in a step.

    These are hooks on all modules, torch.func, forward-mode differentiation and torch.jit.trace.
    """
    if torch.compiler.is_compiling():
        return False
    if _has_any_global_hook() or torch._C._are_functorch_transforms_active():
        return True
    return torch._C._is_tracing() or forward_ad._current_level >= 0
