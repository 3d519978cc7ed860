"""Stores quantized projections in an experts module, makes them dense again, merges into them.

A quantized projection is a parametrized parameter (torch.nn.utils.parametrize). The parameter holds
the codes, which are the quantized values. The parametrization, `Decoding`, holds everything else.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..ops.quantize import FORMATS, quantize_like
from ..ops.quantized import Codes4bit, QuantizedWeight

# {(bases, names of the parametrized projections): the class}
_shared_classes: dict[tuple[tuple[type, ...], frozenset[str]], type[nn.Module]] = {}


class Decoding(nn.Module):
    """The parametrization of a quantized projection: reading the projection gives dense weights.

    Adapted layers do not read it this way. They call `weight`, and decode only the experts that
    they need.

    Args:
        weight: the quantized weight. Its first tensor becomes the parameter of the experts module.
            The others become buffers of this module, so that they are moved and saved with it.
    """

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        _, *others = weight.tensors()
        self.count = len(others)
        for i, tensor in enumerate(others):
            self.register_buffer(f"part{i}", tensor)
        # the same weight without its tensors
        self.facts = weight.with_tensors([torch.empty(0)] * (self.count + 1))

    def _apply(
        self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> "Decoding":
        """Move the scales but never cast them: a cast changes the dtype of the decoded weights."""
        before = [self._part(i) for i in range(self.count)]
        super()._apply(fn, recurse)
        for i, tensor in enumerate(before):
            moved = self._part(i)
            if moved.dtype != tensor.dtype:
                self.facts = replace(self.facts, dtype=moved.dtype)
                self._buffers[f"part{i}"] = tensor.to(moved.device)
        return self

    def weight(self, codes: torch.Tensor) -> QuantizedWeight:
        """The quantized weight, made of the parameter `codes` and the buffers of this module."""
        others = [self._part(i) for i in range(self.count)]
        return self.facts.with_tensors([codes, *others])

    @torch.no_grad()
    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Decode the dense stack; its dimensions have the order of the stored parameter."""
        return self.weight(codes).dense()

    def _part(self, i: int) -> torch.Tensor:
        return getattr(self, f"part{i}")


def parametrizations(module: nn.Module, name: str) -> parametrize.ParametrizationList:
    """The parametrizations of a parametrized projection."""
    lists = cast(nn.ModuleDict, module.parametrizations)
    return cast(parametrize.ParametrizationList, lists[name])


def decoders(module: nn.Module) -> list[nn.Module]:
    """The submodules of an experts module that hold its quantized projections."""
    lists = module._modules.get("parametrizations")
    if lists is None:
        return []
    return list(lists.modules())


def store(module: nn.Module, name: str, weight: QuantizedWeight) -> None:
    """Replace a projection, dense or in the same format, by a quantized weight.

    Args:
        module: an experts module, changed in place.
        name: name of the projection's parameter.
        weight: the quantized weight.
    """
    codes, *_ = weight.tensors()
    if not parametrize.is_parametrized(module, name):
        module.register_parameter(name, nn.Parameter(codes, requires_grad=False))
        _take_own_class(module)
        parametrize.register_parametrization(module, name, Decoding(weight), unsafe=True)
        _share_class(module)
        return
    listed = parametrizations(module, name)
    if isinstance(listed[0], Decoding):
        listed[0] = Decoding(weight).train(module.training)
    else:
        assert isinstance(weight, Codes4bit), "bitsandbytes' parametrization is of a 4-bit format"
        _into_bitsandbytes(cast(Any, listed[0]).quant_state, weight)
    listed.original.data = codes.view(listed.original.shape)


def unstore(module: nn.Module, name: str, dense: torch.Tensor) -> None:
    """Replace a quantized, parametrized projection by a dense parameter.

    Args:
        module: an experts module, changed in place.
        name: name of the projection's parameter.
        dense: the dense weight.
    """
    _take_own_class(module)
    parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    module.register_parameter(name, nn.Parameter(dense, requires_grad=False))


def _share_class(module: nn.Module) -> None:
    """Give a module the class of all modules of its kind with the same projections parametrized.

    torch makes a class for each module, and a graph of torch.compile holds for modules of one
    class. So layers that are compiled one by one would each be compiled for itself.
    """
    cls = type(module)
    names = frozenset(cast(nn.ModuleDict, module.parametrizations))
    module.__class__ = _shared_classes.setdefault((cls.__bases__, names), cls)


def _take_own_class(module: nn.Module) -> None:
    """Give a parametrized module a class of its own.

    torch adds a projection's property to the class of a module, and deletes it there. Modules that
    share the class, copies among them, would get or lose it too.
    """
    if not parametrize.is_parametrized(module):
        return
    cls = type(module)
    contents = {key: value for key, value in vars(cls).items() if key != "__dict__"}
    module.__class__ = type(cls.__name__, cls.__bases__, contents)


def check_is_written(weight: QuantizedWeight) -> None:
    """Check that something can be merged into a quantized weight.

    Raises:
        ValueError: if this package can only read the format.
    """
    if weight.format not in FORMATS:
        raise ValueError(
            f"merging into {weight.format} experts is not supported, because weights can be read "
            f"but not written in {weight.format}; load the base model unquantized, or merge into "
            "its unquantized checkpoint with merge_adapter."
        )


def requantized(
    weight: QuantizedWeight, delta: Callable[[int], torch.Tensor]
) -> tuple[QuantizedWeight, float]:
    """Quantize W + delta in the format of W.

    Args:
        weight: W, [E, N, K], quantized.
        delta: called with an expert's id; returns its [N, K] update, fp32 or fp64.
    Returns: the quantized sum and its relative error. The error is the norm of the difference from
        the exact sum, divided by the norm of the updates; 0 if the updates are zero.
    Raises:
        ValueError: if this package can only read the format, or if a sum is not finite.
    """
    check_is_written(weight)
    dense = weight.dense()
    update = 0.0
    for e in range(dense.shape[0]):
        change = delta(e)
        dense[e] += change
        update += torch.linalg.vector_norm(change).item() ** 2
    merged = quantize_like(weight, dense)
    # two dense stacks must not be in memory at once
    del dense
    error = 0.0
    for e in range(weight.shape[0]):
        exact = weight[e] + delta(e)
        error += torch.linalg.vector_norm(merged[e] - exact).item() ** 2
    if not update:
        return merged, 0.0
    return merged, (error / update) ** 0.5


# bitsandbytes' QuantState is not typed, and bitsandbytes need not be installed
def _into_bitsandbytes(state: Any, weight: Codes4bit) -> None:
    state.absmax = weight.scales
    state.offset = weight.offset
    if state.nested:
        state.state2.absmax = weight.nested_scales
        state.state2.code = weight.nested_code
