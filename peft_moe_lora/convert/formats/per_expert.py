"""2-D tensors of every expert: `<experts>.{e}.gate_proj|up_proj|down_proj.lora_A/B.weight`.

A is [r, K] and B is [N, r]. gate and up share A, and the rows of B are split between them. The
projections are named as in published checkpoints: w1, w3 and w2 in Mixtral. PEFT, vLLM and SGLang
read this format; each of them refuses some adapters that the others accept.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from peft import LoraConfig

from ...files.card import CardText, loading_with_peft
from ...files.servers import SGLANG, VLLM, Server
from ...files.tensor_file import AdapterError, Block, RefusedError
from ..base import BaseModel, need_base
from ..model import Adapter, Experts, Pair
from ..serving import sglang_refuses_experts, started, vllm_needs_mixed, vllm_refuses_experts
from ..source import Slot, Source
from ..targets import common_fields, short_names
from .format import PREFIX, Format, Read, SlotName, Slots
from .halves import TWICE_THE_RANK, Half, joined
from .peft_targets import NOT_WITH_PEFT, drops

# name of a part of a projection -> its names in files, for experts with a gate and without one
_GATED = {"gate_proj": ("gate_proj", "w1"), "up_proj": ("up_proj", "w3")}
_UNGATED = {"up_proj": ("up_proj", "w1")}
_DOWN = {"down_proj": ("down_proj", "w2")}


class PerExpert(Format):
    """A [r, K] and B [N, r] of every projection of every expert, each under its own key."""

    name = "per_expert"
    key = re.compile(
        r"(?P<path>.*\bexperts)\.(?P<expert>\d+)\.(?P<slot>gate_proj|up_proj|down_proj|w1|w2|w3)"
        r"\.lora_(?P<side>[AB])\.weight"
    )
    card = CardText(
        layout="2-D tensors of every expert, "
        "`<experts>.<e>.gate_proj|up_proj|down_proj.lora_A/B.weight` (Mixtral: w1, w3, w2): "
        "`[r, K]` and `[N, r]`; gate and up share A.",
        loading=loading_with_peft(),
        served_by=(VLLM, SGLANG),
    )
    one_rank = True
    both_projections = True

    def slot_name(self, match: re.Match[str]) -> SlotName:
        return SlotName(match["slot"], int(match["expert"]))

    def read(self, source: Source, slots: Slots) -> Read:
        base = need_base(
            source.base,
            "per-expert tensors are combined in the row order of the base model's gate_up_proj",
        )
        experts: Experts = {}
        notes: tuple[str, ...] = ()
        for path, found in slots.items():
            _check_complete(source, base, path, found)
            gate_up = _UNGATED
            if base.experts[path].gated:
                gate_up = _GATED
            experts[path] = {}
            for projection, names in (("gate_up", gate_up), ("down", _DOWN)):
                parts = _take(source, path, found, names)
                if not parts:
                    continue
                pair = _read_pair(source, base, path, parts)
                experts[path][projection] = source.checked(path, projection, pair)
                if pair.r == 2 * parts[0].rank:
                    notes = (TWICE_THE_RANK,)
        return Read(self.name, experts, notes)

    def prepare(self, adapter: Adapter) -> Adapter:
        base = need_base(
            adapter.base, "gate_up is split in the row order of the base model's gate_up_proj"
        )
        for path, pairs in adapter.experts.items():
            if "gate_up" in pairs and base.experts[path].gated:
                base.gate_and_up(path)  # raises if the order is not known
        refusals = self.refusals(adapter)
        unread = _unread_by_peft(adapter)
        if unread is not None and len(refusals) == len(self.card.served_by):
            reasons = "; ".join((*refusals.values(), unread))
            raise RefusedError(f"no program reads the result: {reasons}.")
        notes = list(refusals.values())
        if unread is not None:
            notes.append(unread)
        advice = vllm_needs_mixed(base, stacked=False)
        if advice is not None and VLLM not in refusals:
            notes.append(advice)
        return adapter.noted(*notes)

    def card_of(self, adapter: Adapter) -> CardText:
        if _unread_by_peft(adapter) is None:
            return self.card
        return replace(self.card, loading=NOT_WITH_PEFT)

    def refusals(self, adapter: Adapter) -> dict[Server, str]:
        base = _base_of(adapter)
        reasons = {
            VLLM: vllm_refuses_experts(adapter, base),
            SGLANG: sglang_refuses_experts(adapter, base),
        }
        return {server: reason for server, reason in reasons.items() if reason is not None}

    def servers(self, adapter: Adapter) -> list[Server]:
        return started(super().servers(adapter), _base_of(adapter), stacked=False)

    def block(self, adapter: Adapter, path: str, projection: str, pair: Pair) -> Block:
        base = _base_of(adapter)
        parts = _parts(base, path, projection)

        def make() -> Iterator[torch.Tensor]:
            A, B = pair.load()
            for e in range(pair.num_experts):
                for rows in parts.values():
                    yield A[e]
                    yield B[e, rows]

        shapes: dict[str, tuple[int, ...]] = {}
        for e in range(pair.num_experts):
            for part in parts:
                key = self.rename(adapter, f"{path}.{e}.{part}")
                shapes[f"{key}.lora_A.weight"] = (pair.r, pair.in_features)
                shapes[f"{key}.lora_B.weight"] = (pair.out_features // len(parts), pair.r)
        return Block(shapes, pair.dtype, make)

    def config(self, adapter: Adapter) -> LoraConfig:
        base = _base_of(adapter)
        adapted = next(iter(adapter.experts.values()))
        targets: list[str] = []
        if "gate_up" in adapted and next(iter(base.experts.values())).gated:
            targets.append(base.hub_names.gate)
        if "gate_up" in adapted:
            targets.append(base.hub_names.up)
        if "down" in adapted:
            targets.append(base.hub_names.down)
        return LoraConfig(
            **common_fields(adapter, adapter.linears),
            target_modules=[*targets, *short_names(adapter, adapter.linears)],
        )

    def rename(self, adapter: Adapter, key: str) -> str:
        return PREFIX + _base_of(adapter).hub_names.to_hub(key)


def _base_of(adapter: Adapter) -> BaseModel:
    """The base model of a prepared adapter; `PerExpert.prepare` has checked that it is known."""
    assert adapter.base is not None, "the adapter was not prepared for per-expert tensors"
    return adapter.base


def _unread_by_peft(adapter: Adapter) -> str | None:
    """What PEFT does not read of an adapter in this format; None if it reads all of it."""
    model_type = _base_of(adapter).model_type
    if _peft_reads_per_expert(model_type) is False:
        return (
            f"PEFT does not read per-expert tensors of {model_type} but ignores them; convert "
            "with --to peft for PEFT"
        )
    return drops(adapter)


def _parts(base: BaseModel, path: str, projection: str) -> dict[str, slice]:
    """Published name of each part of a projection -> its rows in the projection."""
    names = base.hub_names
    if projection == "down":
        return {names.down: slice(None)}
    if not base.experts[path].gated:
        return {names.up: slice(None)}
    gate, up = base.gate_and_up(path)
    return {names.gate: gate, names.up: up}


class _Part(NamedTuple):
    """One part of a projection: gate, up or down.

    Attributes:
        slots: the keys of every expert, in the order of the experts.
        names: its path in the file, of every expert.
        rank, scaling: of every expert.
    """

    slots: list[Slot]
    names: list[str]
    rank: int
    scaling: float


def _check_complete(
    source: Source, base: BaseModel, path: str, found: Mapping[SlotName, Slot]
) -> None:
    """Check that every part in the file is there for every expert.

    Raises:
        AdapterError: if the base model has no such module, or if experts or parts are missing.
    """
    if path not in base.experts:
        raise AdapterError(
            f"{source.file.path} adapts {path}, but {base.name} has no experts module of that "
            "name; name the base model that the adapter was trained on."
        )
    layout = base.experts[path]
    leaves = sorted({name.name for name in found})
    every = [SlotName(leaf, e) for e in range(layout.num_experts) for leaf in leaves]
    missing = [name for name in every if name not in found]
    beyond = sorted({e for _, e in found if e is not None and e >= layout.num_experts})
    halves = {name for name, others in _GATED.items() if set(others) & set(leaves)}
    wrong = ""
    if missing:
        leaf, e = missing[0]
        wrong = f"misses {leaf} of expert {e} and {len(missing) - 1} more"
    elif beyond:
        wrong = f"has experts {beyond}"
    elif layout.gated and len(halves) == 1:
        wrong = "has only one of gate_proj and up_proj"
    if wrong:
        raise AdapterError(
            f"{source.file.path}: {path} {wrong}; the model has {layout.num_experts} experts."
        )


def _take(
    source: Source,
    path: str,
    found: dict[SlotName, Slot],
    names: Mapping[str, Sequence[str]],
) -> list[_Part]:
    """The parts of a projection, taken out of `found`; none if the file does not adapt it.

    Args:
        source: the adapter.
        path: path of the experts module.
        found: its expert tensors.
        names: name of a part -> its names in files, of which a file has one.
    Raises:
        AdapterError: if a shape differs from that of expert 0.
        RefusedError: if a scaling differs from that of expert 0.
    """
    parts = []
    held = {name.name for name in found}
    for others in names.values():
        leaf = next((name for name in others if name in held), None)
        if leaf is None:
            continue
        ids = sorted(e for name, e in found if name == leaf and e is not None)
        slots = [found.pop(SlotName(leaf, e)) for e in ids]
        paths = [f"{path}.{e}.{leaf}" for e in ids]
        parts.append(_Part(slots, paths, source.rank(paths[0]), source.scaling(paths[0])))
    _check_alike(source, parts)
    return parts


def _read_pair(source: Source, base: BaseModel, path: str, parts: Sequence[_Part]) -> Pair:
    """The pair of a projection, combined from one or two parts of every expert."""
    rows: Sequence[slice] = [slice(None)]
    if len(parts) == 2:
        rows = base.gate_and_up(path)
    halves = [_half(source, part) for part in parts]
    return joined(halves, rows, base.experts[path].num_experts, _share_A(source, parts))


def _half(source: Source, part: _Part) -> Half:
    first = part.slots[0]

    def load() -> tuple[torch.Tensor, torch.Tensor]:
        A = torch.stack([source.load(slot.A) for slot in part.slots])
        B = torch.stack([source.load(slot.B) for slot in part.slots])
        return A, B

    return Half(
        rank=part.rank,
        in_features=source.info(first.A).shape[-1],
        out_features=source.info(first.B).shape[0],
        scaling=part.scaling,
        dtype=source.info(first.A).dtype,
        load=load,
    )


def _check_alike(source: Source, parts: Sequence[_Part]) -> None:
    """Check that all experts, and gate and up, have the shapes and the scaling of expert 0.

    Raises:
        AdapterError: if a shape differs.
        RefusedError: if a scaling differs.
    """
    for part in parts:
        first = parts[0].slots[0]
        r = parts[0].rank
        right = [[r, source.info(first.A).shape[-1]], [source.info(first.B).shape[0], r]]
        for slot, name in zip(part.slots, part.names, strict=True):
            shapes = [list(source.info(key).shape) for key in slot]
            if shapes != right:
                raise AdapterError(
                    f"{source.file.path}: {_described(name)} has A and B of {shapes} instead of "
                    f"{right} (r={r} of adapter_config.json, sizes of expert 0)."
                )
            if source.scaling(name) != parts[0].scaling:
                raise RefusedError(
                    f"{source.file.path}: {_described(name)} has another scaling than expert 0, "
                    "but the experts of a module must have the same scaling."
                )


def _described(name: str) -> str:
    """The path of a part of one expert, in words."""
    path, expert, leaf = name.rsplit(".", 2)
    return f"{path}, {leaf} of expert {expert}"


def _share_A(source: Source, parts: Sequence[_Part]) -> bool:
    """Whether the parts of every expert have the same A."""
    if len(parts) == 1:
        return True
    gate, up = (part.slots for part in parts)
    return all(
        torch.equal(source.load(one.A), source.load(other.A))
        for one, other in zip(gate, up, strict=True)
    )


def _peft_reads_per_expert(model_type: str) -> bool | None:
    """Whether PEFT combines a family's per-expert tensors on loading; None if not known."""
    try:
        from peft.utils.transformers_weight_conversion import (
            _MODEL_TO_CONVERSION_PATTERN,
            _MOE_FUSED_TARGETS,
        )
    except ImportError:
        return None
    return _MODEL_TO_CONVERSION_PATTERN.get(model_type) in _MOE_FUSED_TARGETS
