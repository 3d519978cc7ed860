"""PEFT's target_parameters: `<experts>.base_layer.lora_A/B.weight` and `<experts>.lora_A/B.weight`.

The first key belongs to gate_up and the second key to down. If only one projection is adapted, it
always has the second key. A [E*r, K] is expert-major; B [N, r*E] is rank-major: column j*E + e is
rank j of expert e. PEFT adapts a router as a parameter too, `<router>.weight`.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig

from ...experts.layout import PROJECTIONS
from ...files.card import CardText, loading_with_peft
from ...files.tensor_file import AdapterError, Block, RefusedError
from ...files.text import quoted
from ..base import BaseModel, need_base
from ..model import Adapter, Experts, LinearPair, Pair
from ..source import Slot, Source
from ..targets import common_fields, short_names
from .format import PREFIX, Format, Read, SlotName, Slots
from .peft_legacy import LEGACY_NAME, swapped_projections
from .peft_order import orders_of_B
from .peft_targets import drops

LAYOUT = (
    "PEFT's `target_parameters`: `<experts>.base_layer.lora_A/B.weight` is gate_up, "
    "`<experts>.lora_A/B.weight` down (or the only target). A `[E * r, K]` is expert-major, B "
    "`[N, r * E]` **rank-major**: column `j*E + e`."
)

_INNER = SlotName(".base_layer")
_OUTER = SlotName("")
# projection -> the possible names of its parameter
_PARAMETERS = {"gate_up": ("gate_up_proj", "up_proj"), "down": ("down_proj",)}


class Peft(Format):
    """A [E*r, K] expert-major, B [N, r*E] rank-major, under PEFT's keys of parameter targets."""

    name = "peft"
    key = re.compile(r"(?P<path>.*\bexperts)(?P<slot>\.base_layer)?\.lora_(?P<side>[AB])\.weight")
    card = CardText(layout=LAYOUT, loading=loading_with_peft())

    def read(self, source: Source, slots: Slots) -> Read:
        orders = orders_of_B(source)
        notes = list(orders.notes)
        experts: Experts = {}
        name = self.name
        for path, found in slots.items():
            named = _projections(source, path, found)
            swapped = swapped_projections(source, path, named)
            experts[path] = {}
            for projection, slot in named.items():
                parameter = _parameter(source.base, source.config, path, projection)
                layout = orders.of(source, parameter)
                pair = _read_pair(source, parameter, slot, layout, swapped[projection])
                experts[path][projection] = source.checked(path, projection, pair)
            if any(swapped.values()):
                name = LEGACY_NAME
        if name == LEGACY_NAME:
            notes.append(
                "in and out are swapped, as PEFT before 0.19.1 stored them; they are swapped back"
            )
        return Read(name, experts, tuple(notes))

    def prepare(self, adapter: Adapter) -> Adapter:
        dropped = drops(adapter)
        if dropped is not None:
            raise RefusedError(
                f"{dropped}; load the adapter with this package, or merge it into the base model "
                "(peft-moe-lora merge)."
            )
        return adapter

    def block(self, adapter: Adapter, path: str, projection: str, pair: Pair) -> Block:
        def make() -> Iterator[torch.Tensor]:
            A, B = pair.load()
            yield A.flatten(0, 1)
            yield B.permute(1, 2, 0).flatten(1)  # [E, N, r] -> [N, r, E] -> [N, r*E]

        key = f"{PREFIX}{path}"
        if projection == "gate_up" and len(adapter.experts[path]) == 2:
            key += _INNER.name
        ranks = pair.num_experts * pair.r
        shapes = {
            f"{key}.lora_A.weight": (ranks, pair.in_features),
            f"{key}.lora_B.weight": (pair.out_features, ranks),
        }
        return Block(shapes, pair.dtype, make)

    def config(self, adapter: Adapter) -> LoraConfig:
        parameters: dict[str, Pair | LinearPair] = {}
        for path, pairs in adapter.experts.items():
            for projection, pair in pairs.items():
                name = _parameter(adapter.base, adapter.config, path, projection, pairs)
                parameters[name] = pair
        linears = {}
        for path, layer in adapter.linears.items():
            if layer.is_router:
                parameters[f"{path}.weight"] = layer
            else:
                linears[path] = layer
        return LoraConfig(
            **common_fields(adapter, {**parameters, **linears}),
            target_modules=short_names(adapter, linears),
            target_parameters=short_names(adapter, parameters),
        )


def _projections(source: Source, path: str, slots: dict[SlotName, Slot]) -> dict[str, Slot]:
    """Projection -> its keys, taken out of `slots`; the outer keys if only one is adapted."""
    if len(slots) == 2:
        return {"gate_up": slots.pop(_INNER), "down": slots.pop(_OUTER)}
    if _OUTER not in slots:
        raise AdapterError(
            f"{source.file.path}: {path} has base_layer.lora_A but not lora_A; the file is damaged."
        )
    slot = slots.pop(_OUTER)
    targets = source.config.get("target_parameters") or []
    last_names = {target.split(".")[-1] for target in targets}
    possible = {name for name, names in _PARAMETERS.items() if last_names & set(names)}
    if len(possible) != 1 and source.base is not None and path in source.base.experts:
        possible = _projections_of_shape(source.base, path, source, slot)
    if len(possible) != 1:
        raise RefusedError(
            f"{source.file.path}: {path} has one adapted projection, and neither "
            f"target_parameters={quoted(targets)} nor the shapes show whether it is gate_up or "
            "down; write the parameter's name into target_parameters of its adapter_config.json."
        )
    return {possible.pop(): slot}


def _projections_of_shape(base: BaseModel, path: str, source: Source, slot: Slot) -> set[str]:
    """The projections of the base model that A and B fit, in and out swapped or not."""
    shapes = (source.info(slot.A).shape[1], source.info(slot.B).shape[0])
    fitting = set()
    for name in PROJECTIONS:
        projection = base.experts[path].projection(name)
        right = (projection.in_features, projection.out_features)
        if shapes in (right, right[::-1]):
            fitting.add(name)
    return fitting


def _parameter(
    base: BaseModel | None,
    config: Mapping[str, Any],
    path: str,
    projection: str,
    pairs: Mapping[str, Pair] | None = None,
) -> str:
    """The path of the parameter that a projection adapts.

    The name of the parameter comes from the base model. If that is not known, it comes from
    target_parameters. Otherwise the sizes of gate_up and down in `pairs` show whether there is a
    gate.

    Raises:
        AdapterError: if the sizes in `pairs` fit neither experts with a gate nor without one.
        RefusedError: if `pairs` is given but holds only gate_up, so that its sizes show nothing.
    """
    return f"{path}.{_parameter_name(base, config, path, projection, pairs)}"


def _parameter_name(
    base: BaseModel | None,
    config: Mapping[str, Any],
    path: str,
    projection: str,
    pairs: Mapping[str, Pair] | None,
) -> str:
    if projection == "down":
        return "down_proj"
    if base is not None and path in base.experts:
        return base.experts[path].gate_up.weight
    targets = {target.split(".")[-1] for target in config.get("target_parameters") or ()}
    named = targets & set(_PARAMETERS["gate_up"])
    if len(named) == 1:
        return named.pop()
    if pairs is None:
        return "gate_up_proj"
    if "down" not in pairs:
        need_base(base, "only the base model says whether the parameter is gate_up_proj or up_proj")
        return "gate_up_proj"
    out_features = pairs["gate_up"].out_features
    width = pairs["down"].in_features
    if out_features == 2 * width:
        return "gate_up_proj"
    if out_features == width:
        return "up_proj"
    raise AdapterError(
        f"{path}: gate_up has {out_features} out-features and down {width} in-features; gate_up "
        "must have as many (without a gate) or twice as many. The adapter is damaged; save it "
        "again."
    )


def _read_pair(source: Source, parameter: str, slot: Slot, layout: str, swapped: bool) -> Pair:
    """The pair of a parameter; `layout` is the order of B in the file."""
    r = source.rank(parameter)
    E, in_features, out_features = source.stacked_sizes(slot, r)
    if swapped:
        in_features, out_features = out_features, in_features
    return Pair(
        num_experts=E,
        r=r,
        in_features=in_features,
        out_features=out_features,
        scaling=source.scaling(parameter),
        dtype=source.info(slot.A).dtype,
        load=_loader(source, slot, (E, r), layout, swapped),
    )


def _loader(
    source: Source, slot: Slot, expert_sizes: tuple[int, int], layout: str, swapped: bool
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A function that loads A [E, r, K] and B [E, N, r]; expert_sizes = (E, r)."""
    E, r = expert_sizes

    def load() -> tuple[torch.Tensor, torch.Tensor]:
        A = source.load(slot.A).unflatten(0, (E, r))  # [E, r, in]
        B = source.load(slot.B)
        if layout == "rank_major":
            B = B.unflatten(1, (r, E)).permute(2, 0, 1)  # [E, out, r]
        else:
            B = B.unflatten(1, (E, r)).permute(1, 0, 2)
        if swapped:
            # PEFT 0.18 builds the delta as [in, out]: (B A)^T = A^T B^T
            return B.mT, A.mT
        return A, B

    return load
