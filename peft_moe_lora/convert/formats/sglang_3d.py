"""SGLang's 3-D format: `<experts>.gate_up_proj|down_proj.lora_A/B.weight`, [E, r, K] and [E, N, r].

SGLang supports only the scaling lora_alpha / r, and reads gate_up as [gate; up]. It does not load
modules that are saved whole, or q_proj and v_proj one without the other.
"""

import re
from collections.abc import Callable, Iterator

import torch
from peft import LoraConfig

from ...files.card import CardText
from ...files.servers import SGLANG
from ...files.tensor_file import AdapterError, Block, RefusedError
from ..base import need_base
from ..model import Adapter, Experts, Pair
from ..serving import sglang_refuses_stacks
from ..source import Slot, Source
from ..targets import common_fields, short_names
from .format import PREFIX, Format, Read, SlotName, Slots

# name in a key -> projection
_PROJECTIONS = {"gate_up_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down"}


class Sglang3d(Format):
    """A [E, r, K] and B [E, N, r] under the names of the stacked projections."""

    name = "sglang_3d"
    key = re.compile(
        r"(?P<path>.*\bexperts)\.(?P<slot>gate_up_proj|up_proj|down_proj)"
        r"\.lora_(?P<side>[AB])(\.weight)?"
    )
    card = CardText(
        layout="`<experts>.gate_up_proj.lora_A/B.weight` and `down_proj`: `[E, r, K]` and "
        "`[E, N, r]`.",
        loading=(
            "SGLang alone reads this format; `peft-moe-lora convert ADAPTER OUT --to peft` makes "
            "one for PEFT.",
        ),
        served_by=(SGLANG,),
    )
    one_rank = True
    both_projections = True

    def read(self, source: Source, slots: Slots) -> Read:
        experts: Experts = {}
        for path, found in slots.items():
            experts[path] = {}
            for leaf, projection in _PROJECTIONS.items():
                # gate_up_proj and up_proj are one projection: only one of them is read
                if projection in experts[path]:
                    continue
                slot = found.pop(SlotName(leaf), None)
                if slot is not None:
                    pair = _read_pair(source, f"{path}.{leaf}", slot)
                    experts[path][projection] = source.checked(path, projection, pair)
        return Read(self.name, experts)

    def prepare(self, adapter: Adapter) -> Adapter:
        base = need_base(
            adapter.base,
            "SGLang reads gate_up as [gate; up], so the base's row order must be known",
        )
        refusal = sglang_refuses_stacks(adapter, base)
        if refusal is not None:
            raise RefusedError(f"{refusal}.")
        return adapter

    def block(self, adapter: Adapter, path: str, projection: str, pair: Pair) -> Block:
        def make() -> Iterator[torch.Tensor]:
            yield from pair.load()

        key = f"{PREFIX}{path}.{projection}_proj"
        shapes = {
            f"{key}.lora_A.weight": (pair.num_experts, pair.r, pair.in_features),
            f"{key}.lora_B.weight": (pair.num_experts, pair.out_features, pair.r),
        }
        return Block(shapes, pair.dtype, make)

    def config(self, adapter: Adapter) -> LoraConfig:
        return LoraConfig(
            **common_fields(adapter, adapter.linears),
            target_modules=["gate_up_proj", "down_proj", *short_names(adapter, adapter.linears)],
        )


def _read_pair(source: Source, name: str, slot: Slot) -> Pair:
    """The pair of a projection whose path in the file is `name`."""
    r = source.rank(name)
    A = source.info(slot.A).shape
    B = source.info(slot.B).shape
    if len(A) != 3 or len(B) != 3 or (A[0], A[1]) != (B[0], r) or B[2] != r:
        raise AdapterError(
            f"{source.file.path}: {slot.A} {list(A)} and {slot.B} {list(B)} must be A [E, r, K] "
            f"and B [E, N, r] with r={r} of adapter_config.json; the two files do not belong "
            "together."
        )
    return Pair(
        num_experts=A[0],
        r=r,
        in_features=A[2],
        out_features=B[1],
        scaling=source.scaling(name),
        dtype=source.info(slot.A).dtype,
        load=_loader(source, slot),
    )


def _loader(source: Source, slot: Slot) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    return lambda: (source.load(slot.A), source.load(slot.B))
