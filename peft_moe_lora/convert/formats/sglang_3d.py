"""SGLang's 3-D format: `<experts>.gate_up_proj|down_proj.lora_A/B.weight`, [E, r, K] and [E, N, r].

The rows of gate_up are [gate; up], also where the base's rows alternate. Like SGLang, this reads
gate and up as two tensors too, as gate_proj and up_proj or as w1 and w3 beside w2, and an A or a B
[1, ...] that all experts share. SGLang supports only the scaling lora_alpha / r. It does not load
modules that are saved whole, or q_proj and v_proj one without the other.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from peft import LoraConfig

from ...files.card import CardText
from ...files.servers import SGLANG
from ...files.tensor_file import AdapterError, Block, RefusedError
from ...files.text import quoted
from ..base import BaseModel, need_base
from ..model import Adapter, Experts, Pair
from ..serving import sglang_refuses
from ..source import Slot, Source
from ..targets import common_fields, short_names
from .format import PREFIX, Format, Read, SlotName, Slots
from .halves import TWICE_THE_RANK, Half, joined

# the names of one part of the experts; up_proj and w1 are all of gate_up in experts without a gate
_WHOLE = ("gate_up_proj",)
_GATE = ("gate_proj", "w1")
_UP = ("up_proj", "w3")
_DOWN = ("down_proj", "w2")
_UNGATED = ("up_proj", "w1")


class Sglang3d(Format):
    """A [E, r, K] and B [E, N, r] under the names of the stacked projections."""

    name = "sglang_3d"
    key = re.compile(
        r"(?P<path>.*\bexperts)\.(?P<slot>gate_up_proj|gate_proj|up_proj|down_proj|w1|w2|w3)"
        r"\.lora_(?P<side>[AB])(\.weight)?"
    )
    card = CardText(
        layout="`<experts>.gate_up_proj.lora_A/B.weight` and `down_proj`: `[E, r, K]` and "
        "`[E, N, r]`, rows of gate_up `[gate; up]`.",
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
        notes: dict[str, None] = {}
        _check_order_is_known(source)
        for path, found in slots.items():
            E = _experts(source, path, found)
            gate_up = _take_gate_up(source, path, found, E)
            down = _take(source, path, found, _DOWN, E)
            experts[path] = {}
            if gate_up:
                rows = _rows(source, path, gate_up)
                same_A = _share_A(gate_up)
                if not same_A:
                    notes[TWICE_THE_RANK] = None
                pair = joined(gate_up, rows, E, same_A)
                experts[path]["gate_up"] = source.checked(path, "gate_up", pair)
            if down:
                pair = joined(down, [slice(None)], E, same_A=True)
                experts[path]["down"] = source.checked(path, "down", pair)
        return Read(self.name, experts, tuple(notes))

    def prepare(self, adapter: Adapter) -> Adapter:
        base = need_base(
            adapter.base,
            "SGLang reads gate_up as [gate; up], so the base's row order must be known",
        )
        refusal = sglang_refuses(adapter, base)
        if refusal is not None:
            raise RefusedError(f"{refusal}.")
        for path, pairs in adapter.experts.items():
            if "gate_up" in pairs and base.experts[path].gated:
                base.gate_and_up(path)  # raises if the order is not known
        return adapter

    def block(self, adapter: Adapter, path: str, projection: str, pair: Pair) -> Block:
        base = adapter.base
        assert base is not None, "the adapter was not prepared for SGLang"

        def make() -> Iterator[torch.Tensor]:
            A, B = pair.load()
            yield A
            if projection == "gate_up" and base.interleaved[path]:
                gate, up = base.gate_and_up(path)
                yield torch.cat([B[:, gate], B[:, up]], 1)
            else:
                yield B

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


def _check_order_is_known(source: Source) -> None:
    """Refuse a file of gpt-oss without its base, whose rows of gate and up alternate."""
    name = str(source.config.get("base_model_name_or_path") or "")
    if "gpt-oss" in name.lower().replace("_", "-"):
        need_base(source.base, f"{quoted(name)} may alternate gate and up, unlike this file")


def _base_of(source: Source, path: str) -> BaseModel | None:
    """The base model, if it is known and has this experts module."""
    if source.base is None or path not in source.base.experts:
        return None
    return source.base


def _experts(source: Source, path: str, found: Mapping[SlotName, Slot]) -> int:
    """E of an experts module: the base model's, or the most that one of its tensors holds.

    Raises:
        RefusedError: if all experts share every tensor and the base model is not known.
    """
    base = _base_of(source, path)
    if base is not None:
        return base.experts[path].num_experts
    E = max(source.info(key).shape[0] for slot in found.values() for key in slot)
    if E == 1:
        need_base(source.base, f"the tensors of {path} do not show how many experts share them")
    return E


def _take_gate_up(
    source: Source, path: str, found: dict[SlotName, Slot], num_experts: int
) -> list[Half]:
    """The whole of gate_up, or gate and up, taken out of `found`; none if the file adapts neither.

    Raises:
        AdapterError: if one of gate and up is missing, or if they have different sizes.
        RefusedError: if they have different scalings.
    """
    base = _base_of(source, path)
    whole = _take(source, path, found, _WHOLE, num_experts)
    if whole and base is not None and base.interleaved[path]:
        return _halved(whole[0])
    if whole:
        return whole
    names = {name.name for name in found}
    is_gated = bool(names & set(_GATE)) and names != {"w1", "w2"}
    if base is not None:
        is_gated = base.experts[path].gated
    if not is_gated:
        return _take(source, path, found, _UNGATED, num_experts)
    halves = [
        *_take(source, path, found, _GATE, num_experts),
        *_take(source, path, found, _UP, num_experts),
    ]
    if len(halves) == 1:
        raise AdapterError(
            f"{source.file.path}: {path} has only one of gate and up, but experts with a gate need "
            "both; the adapter is for another model, or its file was filtered."
        )
    if len({(half.rank, half.in_features, half.out_features) for half in halves}) > 1:
        raise AdapterError(
            f"{source.file.path}: gate and up of {path} have different sizes; the adapter is "
            "damaged. Save it again."
        )
    if len({half.scaling for half in halves}) > 1:
        raise RefusedError(
            f"{source.file.path}: gate and up of {path} have different scalings, but a projection "
            "has one; write one scaling into adapter_config.json and fold the other into lora_B."
        )
    return halves


def _halved(whole: Half) -> list[Half]:
    """Gate and up of a gate_up whose rows are [gate; up]."""
    width = whole.out_features // 2

    def half(rows: slice) -> Half:
        def load() -> tuple[torch.Tensor, torch.Tensor]:
            A, B = whole.load()
            return A, B[:, rows]

        return whole._replace(out_features=width, load=load)

    return [half(slice(width)), half(slice(width, None))]


def _take(
    source: Source,
    path: str,
    found: dict[SlotName, Slot],
    names: tuple[str, ...],
    num_experts: int,
) -> list[Half]:
    """The part under one of its names, taken out of `found`; none if the file does not have it."""
    held = [name for name in names if SlotName(name) in found]
    if not held:
        return []
    name = f"{path}.{held[0]}"
    slot = found.pop(SlotName(held[0]))
    r = source.rank(name)
    A = source.info(slot.A).shape
    B = source.info(slot.B).shape
    counts = {1, num_experts}
    if len(A) != 3 or len(B) != 3 or (A[1], B[2]) != (r, r) or not counts.issuperset((A[0], B[0])):
        raise AdapterError(
            f"{source.file.path}: {slot.A} {list(A)} and {slot.B} {list(B)} must be A [E, r, K] "
            f"and B [E, N, r] with E={num_experts}, or 1 if all experts share it, and r={r} of "
            "adapter_config.json; the two files do not belong together."
        )

    def load() -> tuple[torch.Tensor, torch.Tensor]:
        A_of_all = source.load(slot.A).expand(num_experts, -1, -1)
        B_of_all = source.load(slot.B).expand(num_experts, -1, -1)
        return A_of_all, B_of_all

    return [Half(r, A[2], B[1], source.scaling(name), source.info(slot.A).dtype, load)]


def _rows(source: Source, path: str, halves: list[Half]) -> list[slice]:
    """The rows of gate_up's parts in the base's projection."""
    if len(halves) == 1:
        return [slice(None)]
    base = need_base(
        source.base, f"{path} has gate and up apart, and they go into the base's gate_up_proj"
    )
    return list(base.gate_and_up(path))


def _share_A(halves: list[Half]) -> bool:
    """Whether gate and up have the same A; True if there is one part."""
    if len(halves) == 1:
        return True
    gate, up = (half.load()[0] for half in halves)
    return torch.equal(gate, up)
