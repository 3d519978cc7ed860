"""One line of text that lists what an adapter adapts.

It also names experts that the kernels compute only while an adapter is at work.

`MoELoraModel.summary` returns the line, which a notebook shows as a table. Adding an adapter logs
it, and `print_trainable_parameters` prints it below PEFT's counts.
"""

import html
from collections import Counter
from collections.abc import Collection, Sequence

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..layers.layer import MoELoraLayer
from ..layers.router import MoELoraRouter

_ROUTERS = "routers"
_OTHER_LAYERS = "other layers"
_SAVED_WHOLE = "modules saved whole"


class Summary(str):
    """The line; its parts are separated by "; "."""

    def _repr_html_(self) -> str:
        """A table of one row a part, for a notebook."""
        rows = []
        for part in self.split("; "):
            name, colon, rest = part.partition(": ")
            if not colon:
                name, _, rest = part.partition(", ")
            rows.append(f"<tr><th>{html.escape(name)}</th><td>{html.escape(rest)}</td></tr>")
        return f"<table>{''.join(rows)}</table>"


def summarize(model: nn.Module, adapter_names: Collection[str]) -> Summary:
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
    parts += _off_interface(layers)
    return Summary("; ".join(parts))


def _off_interface(layers: Sequence[MoELoraLayer]) -> list[str]:
    """A sentence on the experts that the kernels compute only while an adapter is at work."""
    counts = Counter(
        type(layer.base_layer).__name__ for layer in layers if not layer.layout.decorated
    )
    return [
        f"{count} {name} are not on transformers' experts interface: the model's own code computes "
        "them while adapters are disabled or merged"
        for name, count in sorted(counts.items())
    ]


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
