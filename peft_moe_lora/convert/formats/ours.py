"""Our own format: `<experts>.lora_A.<projection>` [r*E, K] and `lora_B` [N, r*E].

Both are expert-major: rows e*r up to (e + 1)*r of A, and columns e*r up to (e + 1)*r of B, belong
to expert e. A module has one rank and one scaling. If the file holds only some experts, E in these
shapes is the number of these experts, and adapter_config.json lists them in expert_indices.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ...config import MoELoraConfig
from ...experts.layout import EVERY_PROJECTION, PROJECTIONS
from ...files.adapter_file import METADATA_KEY, Trained, described, described_module
from ...files.card import OUR_CARD
from ...files.patterns import one_or_by_path
from ...files.tensor_file import AdapterError, Block
from ..model import Adapter, Experts, Pair
from ..source import Slot, Source
from ..targets import common_fields, short_names
from .format import PREFIX, Format, Read, SlotName, Slots


class Ours(Format):
    """A [r*E, K], B [N, r*E], both expert-major; read by this package's tuner only."""

    name = "moe_lora"
    key = re.compile(r"(?P<path>.+)\.lora_(?P<side>[AB])\.(?P<slot>gate_up|down|linear)")
    card = OUR_CARD
    some_experts = True
    every_family = True
    keeps_dropout = True

    def read(self, source: Source, slots: Slots) -> Read:
        experts: Experts = {}
        for path, found in slots.items():
            experts[path] = {}
            for projection in EVERY_PROJECTION:
                slot = found.pop(SlotName(projection), None)
                if slot is not None:
                    pair = _read_pair(source, path, slot)
                    experts[path][projection] = source.checked(path, projection, pair)
        return Read(self.name, experts)

    def prepare(self, adapter: Adapter) -> Adapter:
        """Give each module one rank and one scaling."""
        experts: Experts = {}
        padded = False
        for path, pairs in adapter.experts.items():
            ranks = {pair.r for pair in pairs.values()}
            padded |= len(ranks) > 1
            r = max(ranks)
            scaling = next(iter(pairs.values())).scaling
            experts[path] = {
                name: pair.padded(r).scaled_to(scaling) for name, pair in pairs.items()
            }
        adapter = replace(adapter, experts=experts)
        if padded:
            adapter = adapter.noted(
                "lower ranks are padded with zeros: the projections of a module have one rank"
            )
        return adapter

    def block(self, adapter: Adapter, path: str, projection: str, pair: Pair) -> Block:
        def make() -> Iterator[torch.Tensor]:
            A, B = pair.load()
            if pair.chosen is not None:
                A = A[list(pair.chosen)]
                B = B[list(pair.chosen)]
            yield A.flatten(0, 1)
            yield B.permute(1, 0, 2).flatten(1)

        ranks = pair.r * len(pair.experts)
        shapes = {
            f"{PREFIX}{path}.lora_A.{projection}": (ranks, pair.in_features),
            f"{PREFIX}{path}.lora_B.{projection}": (pair.out_features, ranks),
        }
        return Block(shapes, pair.dtype, make)

    def config(self, adapter: Adapter) -> MoELoraConfig:
        modules = {path: next(iter(pairs.values())) for path, pairs in adapter.experts.items()}
        expert_indices = None
        if any(pair.chosen is not None for pair in modules.values()):
            expert_indices = {path: list(pair.experts) for path, pair in modules.items()}
        return MoELoraConfig(
            **common_fields(adapter, {**modules, **adapter.linears}),
            target_modules=short_names(adapter, [*modules, *adapter.linears]),
            target_projections=_targeted(adapter.experts),
            lora_dropout=adapter.config.get("lora_dropout") or 0.0,
            expert_indices=expert_indices,
        )

    def metadata(self, adapter: Adapter) -> dict[str, str]:
        modules = {path: _described(pairs) for path, pairs in adapter.experts.items()}
        routers = [path for path, layer in adapter.linears.items() if layer.is_router]
        trained = {
            f"{path}.{name}": Trained(pair.r, pair.scaling)
            for path, pairs in adapter.experts.items()
            for name, pair in pairs.items()
        }
        for path, layer in adapter.linears.items():
            trained[path] = Trained(layer.r, layer.scaling)
        description = json.dumps(described(modules, routers, trained), sort_keys=True)
        return {"format": "pt", METADATA_KEY: description}


def _targeted(experts: Experts) -> list[str] | dict[str, list[str]]:
    """The target_projections of modules with these projections."""
    adapted = {}
    for path, pairs in experts.items():
        names = [name for name in PROJECTIONS if name in pairs]
        # a module that is a single projection ignores them
        if names:
            adapted[path] = names
    return one_or_by_path(adapted, list(PROJECTIONS))


def _described(pairs: dict[str, Pair]) -> dict[str, Any]:
    """The metadata of one experts module."""
    first = next(iter(pairs.values()))
    said = described_module(first.num_experts, first.chosen)
    for name, pair in pairs.items():
        said[name] = {
            "r": pair.r,
            "in_features": pair.in_features,
            "out_features": pair.out_features,
        }
    return said


def _read_pair(source: Source, path: str, slot: Slot) -> Pair:
    r = source.rank(path)
    held, K, N = source.stacked_sizes(slot, r)
    chosen = source.chosen(path)
    num_experts = held
    if chosen is not None:
        num_experts = _experts_in_all(source, path, held, chosen)
    return Pair(
        num_experts=num_experts,
        r=r,
        in_features=K,
        out_features=N,
        scaling=source.scaling(path),
        dtype=source.info(slot.A).dtype,
        load=_loader(source, slot, (held, r), num_experts, chosen),
        chosen=chosen,
    )


def _experts_in_all(source: Source, path: str, held: int, chosen: tuple[int, ...]) -> int:
    """E of a module whose file holds only some experts; checks them against expert_indices."""
    E = source.num_experts(path, chosen)
    if held != len(chosen) or chosen[-1] >= E:
        raise AdapterError(
            f"{source.file.path} holds {held} experts of {path}, which has {E} experts, but "
            f"expert_indices of adapter_config.json names {list(chosen)}. The two files do not "
            "belong together."
        )
    return E


def _loader(
    source: Source,
    slot: Slot,
    sizes: tuple[int, int],
    num_experts: int,
    chosen: tuple[int, ...] | None,
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A function that loads A [E, r, K] and B [E, N, r]; sizes = (experts in the file, r)."""

    def load() -> tuple[torch.Tensor, torch.Tensor]:
        A = source.load(slot.A).unflatten(0, sizes)
        B = source.load(slot.B).unflatten(1, sizes).permute(1, 0, 2)
        if chosen is None:
            return A, B
        return _among_all(A, num_experts, chosen), _among_all(B, num_experts, chosen)

    return load


def _among_all(held: torch.Tensor, num_experts: int, chosen: tuple[int, ...]) -> torch.Tensor:
    """[E, ...] with the chosen experts' values, and zeros for the other experts."""
    zeros = held.new_zeros(num_experts, *held.shape[1:])
    return zeros.index_copy_(0, torch.tensor(chosen), held)
