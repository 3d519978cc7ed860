"""One line of text that lists what an adapter adapts, and counts of parameters.

`MoELoraModel.summary` returns the line. Adding an adapter logs it, and
`print_trainable_parameters` prints it below PEFT's counts.
"""

import math
import weakref
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..experts.decoding import parametrizations
from ..experts.layout import is_experts
from ..experts.stored import UnsupportedExperts, stored_weight
from .layer import MoELoraLayer
from .router import MoELoraRouter

_ROUTERS = "routers"
_OTHER_LAYERS = "other layers"
_SAVED_WHOLE = "modules saved whole"


def summarize(model: nn.Module, adapter_names: Collection[str]) -> str:
    """The line for some adapters: experts, routers, other layers and modules saved whole."""
    layers: list[MoELoraLayer] = []
    others: dict[str, Counter[str]] = {
        kind: Counter() for kind in (_ROUTERS, _OTHER_LAYERS, _SAVED_WHOLE)
    }
    for path, module in model.named_modules():
        if _adapters_on(module).isdisjoint(adapter_names):
            continue
        if isinstance(module, MoELoraLayer):
            layers.append(module)
        else:
            others[_kind(module)][_short_name(path)] += 1
    parts = [_summarize_experts(layers, adapter_names)]
    for kind, counts in others.items():
        if counts:
            listed = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
            parts.append(f"{counts.total()} {kind}: {listed}")
    return "; ".join(parts)


def _adapters_on(module: nn.Module) -> set[str]:
    """The adapters that have parameters in this module."""
    if not isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
        return set()
    names: set[str] = set()
    for part in module.adapter_layer_names:
        names.update(getattr(module, part, ()))
    return names


def _kind(module: nn.Module) -> str:
    if isinstance(module, ModulesToSaveWrapper):
        return _SAVED_WHOLE
    if isinstance(module, MoELoraRouter):
        return _ROUTERS
    return _OTHER_LAYERS


def _short_name(path: str) -> str:
    """The last two names of a path, without the numbers of layers: "self_attn.q_proj"."""
    names = [name for name in path.split(".") if not name.isdigit()]
    return ".".join(names[-2:])


def _summarize_experts(layers: Sequence[MoELoraLayer], adapter_names: Collection[str]) -> str:
    adapted_experts = 0
    adapted_projections = 0
    for layer in layers:
        pairs = {
            (projection, expert)
            for name in adapter_names
            for projection in layer.adapted_projections(name)
            for expert in layer.experts_of(name)
        }
        adapted_projections += len(pairs)
        adapted_experts += len({expert for _, expert in pairs})
    all_experts = sum(layer.layout.num_experts for layer in layers)
    number = f"{adapted_experts:,}"
    if adapted_experts != all_experts:
        number += f" of {all_experts:,}"
    return (
        f"{len(layers)} experts modules, {number} experts, "
        f"{adapted_projections:,} projections adapted"
    )


def _beyond_parameters(model: nn.Module) -> int:
    """The weights of quantized experts that are more than the elements of their parameters.

    An element of a parameter holds two 4-bit codes.
    """
    more = 0
    for module in model.modules():
        if not is_experts(module):
            continue
        for name in getattr(module, "parametrizations", ()):
            # weights in other forms are counted as they are
            with suppress(UnsupportedExperts):
                weight = stored_weight(module, name)
                more += math.prod(weight.shape) - parametrizations(module, name).original.numel()
    return more


class CountWithQuantized:
    """`get_nb_trainable_parameters` of one PeftModel, which counts weights, not stored elements.

    PEFT does so for linear layers in 4 bits. `get_model_status` calls it too.
    """

    def __init__(self, peft_model: PeftModel) -> None:
        self.peft_model = peft_model

    def __call__(self) -> tuple[int, int]:
        trainable, total = type(self.peft_model).get_nb_trainable_parameters(self.peft_model)
        return trainable, total + _beyond_parameters(self.peft_model)


class PrintWithSummary:
    """`print_trainable_parameters` of one PeftModel, with the summary on a second line."""

    def __init__(self, peft_model: PeftModel) -> None:
        self.peft_model = peft_model

    def __call__(self) -> None:
        type(self.peft_model).print_trainable_parameters(self.peft_model)
        # PEFT does not annotate which tuner this is
        tuner: Any = self.peft_model.base_model
        print(tuner.summary())


def install_around(tuner: nn.Module) -> None:
    """Replace two methods of the PeftModel that will contain a tuner, by the classes above.

    A tuner has no reference to its PeftModel. So a global hook of torch waits until the tuner is
    registered as a submodule of a PeftModel.
    """
    waiting = weakref.ref(tuner)

    def on_registration(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if isinstance(parent, PeftModel) and child is waiting():
            # only this instance is changed; other PeftModels keep PEFT's methods
            peft_model: Any = parent
            peft_model.get_nb_trainable_parameters = CountWithQuantized(parent)
            peft_model.print_trainable_parameters = PrintWithSummary(parent)
            handle.remove()

    handle = register_module_module_registration_hook(on_registration)
    # inject_adapter_in_model creates no PeftModel and drops the tuner; the hook then ends too
    weakref.finalize(tuner, handle.remove)
