"""2-D tensors of every expert: `<experts>.{e}.gate_proj|up_proj|down_proj.lora_A/B.weight`.

A is [r, K] and B is [N, r]. gate and up share A, and the rows of B are split between them. The
projections are named as in published checkpoints: w1, w3 and w2 in Mixtral. PEFT, vLLM and SGLang
read this format; each of them refuses some adapters that the others accept.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

import torch
from peft import LoraConfig

from ...experts.families import VLLM_3D
from ...files.card import CardText, loading_with_peft
from ...files.servers import SGLANG, VLLM
from ...files.tensor_file import AdapterError, Block, RefusedError
from ..base import BaseModel, need_base
from ..model import Adapter, Experts, Pair
from ..source import Slot, Source
from ..targets import common_fields, short_names
from .format import PREFIX, Format, Read, SlotName, Slots
from .sglang_3d import query_without_value

# names in published checkpoints -> names in transformers
_LEAVES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


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
        leaf = match["slot"]
        return SlotName(_LEAVES.get(leaf, leaf), int(match["expert"]))

    def read(self, source: Source, slots: Slots) -> Read:
        base = need_base(
            source.base,
            "per-expert tensors are combined in the row order of the base model's gate_up_proj",
        )
        experts: Experts = {}
        notes: tuple[str, ...] = ()
        for path, found in slots.items():
            leaves = _check_complete(source, base, path, found)
            experts[path] = {}
            if "up_proj" in leaves:
                parts = ["up_proj"]
                if base.experts[path].gated:
                    parts = ["gate_proj", "up_proj"]
                pair = _read_pair(source, base, path, found, parts)
                experts[path]["gate_up"] = source.checked(path, "gate_up", pair)
                if pair.r == 2 * source.rank(f"{path}.0.gate_proj"):
                    notes = ("gate and up have different A: combined exactly, at twice the rank",)
            if "down_proj" in leaves:
                pair = _read_pair(source, base, path, found, ["down_proj"])
                experts[path]["down"] = source.checked(path, "down", pair)
        return Read(self.name, experts, notes)

    def prepare(self, adapter: Adapter) -> Adapter:
        base = need_base(
            adapter.base, "gate_up is split in the row order of the base model's gate_up_proj"
        )
        for path, pairs in adapter.experts.items():
            if "gate_up" in pairs and base.experts[path].gated:
                base.gate_and_up(path)  # raises if the order is not known
        return adapter.noted(*_refused_elsewhere(adapter, base))

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


def _parts(base: BaseModel, path: str, projection: str) -> dict[str, slice]:
    """Published name of each part of a projection -> its rows in the projection."""
    names = base.hub_names
    if projection == "down":
        return {names.down: slice(None)}
    if not base.experts[path].gated:
        return {names.up: slice(None)}
    gate, up = base.gate_and_up(path)
    return {names.gate: gate, names.up: up}


def _check_complete(
    source: Source, base: BaseModel, path: str, found: Mapping[SlotName, Slot]
) -> set[str]:
    """Check that every projection in the file is there for every expert; return their names.

    Raises:
        AdapterError: if the base model has no such module, or if experts or projections are
            missing.
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
    wrong = ""
    if missing:
        leaf, e = missing[0]
        wrong = f"misses {leaf} of expert {e} and {len(missing) - 1} more"
    elif beyond:
        wrong = f"has experts {beyond}"
    elif layout.gated and ("gate_proj" in leaves) != ("up_proj" in leaves):
        wrong = "has only one of gate_proj and up_proj"
    if wrong:
        raise AdapterError(
            f"{source.file.path}: {path} {wrong}; the model has {layout.num_experts} experts."
        )
    return set(leaves)


def _read_pair(
    source: Source,
    base: BaseModel,
    path: str,
    found: Mapping[SlotName, Slot],
    parts: Sequence[str],
) -> Pair:
    """The pair of a projection, combined from one or two parts of every expert.

    If gate and up share A, the rows of B_gate and B_up become the rows of one B. If they do not, A
    is [A_gate; A_up] with twice the rank, and in B the rows of gate are zero in the columns of
    A_up, and the rows of up are zero in the columns of A_gate.
    """
    E = base.experts[path].num_experts
    r = source.rank(f"{path}.0.{parts[0]}")
    first = found[SlotName(parts[0], 0)]
    K = source.info(first.A).shape[-1]
    width = source.info(first.B).shape[0]
    _check_alike(source, path, found, parts, r)
    rows: Sequence[slice] = [slice(None)]
    if len(parts) == 2:
        rows = base.gate_and_up(path)
    rank = r
    ranks = [slice(0, r)] * len(parts)
    if not _share_A(source, found, parts, E):
        rank = 2 * r
        ranks = [slice(0, r), slice(r, 2 * r)]
    dtype = source.info(first.A).dtype

    def load() -> tuple[torch.Tensor, torch.Tensor]:
        A = torch.empty(E, rank, K, dtype=dtype)
        B = torch.zeros(E, width * len(parts), rank, dtype=dtype)
        for e in range(E):
            for part, part_rows, part_ranks in zip(parts, rows, ranks, strict=True):
                slot = found[SlotName(part, e)]
                A[e, part_ranks] = source.load(slot.A)
                B[e, part_rows, part_ranks] = source.load(slot.B)
        return A, B

    return Pair(
        num_experts=E,
        r=rank,
        in_features=K,
        out_features=width * len(parts),
        scaling=source.scaling(f"{path}.0.{parts[0]}"),
        dtype=dtype,
        load=load,
    )


def _check_alike(
    source: Source,
    path: str,
    found: Mapping[SlotName, Slot],
    parts: Sequence[str],
    r: int,
) -> None:
    """Check that all experts have the shapes and the scaling of expert 0.

    Raises:
        AdapterError: if a shape differs.
        RefusedError: if a scaling differs.
    """
    first = found[SlotName(parts[0], 0)]
    scaling = source.scaling(f"{path}.0.{parts[0]}")
    right = [[r, source.info(first.A).shape[-1]], [source.info(first.B).shape[0], r]]
    for (leaf, e), slot in found.items():
        if leaf not in parts:
            continue
        shapes = [list(source.info(key).shape) for key in slot]
        if shapes != right:
            raise AdapterError(
                f"{source.file.path}: {path}, {leaf} of expert {e} has A and B of {shapes} "
                f"instead of {right} (r={r} of adapter_config.json, sizes of expert 0)."
            )
        if source.scaling(f"{path}.{e}.{leaf}") != scaling:
            raise RefusedError(
                f"{source.file.path}: {path}, {leaf} of expert {e} has another scaling than expert "
                "0, but the experts of a module must have the same scaling."
            )


def _share_A(
    source: Source, found: Mapping[SlotName, Slot], parts: Sequence[str], num_experts: int
) -> bool:
    """Whether the parts of every expert have the same A."""
    if len(parts) == 1:
        return True
    for e in range(num_experts):
        gate, up = (source.load(found[SlotName(part, e)].A) for part in parts)
        if not torch.equal(gate, up):
            return False
    return True


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


def _refused_elsewhere(adapter: Adapter, base: BaseModel) -> Iterator[str]:
    """Notes on what one of the format's readers would refuse or ignore."""
    if _peft_reads_per_expert(base.model_type) is False:
        yield (
            f"PEFT does not read per-expert tensors of {base.model_type} but ignores them; convert "
            "with --to peft for PEFT"
        )
    if base.model_type in VLLM_3D:
        yield (
            f"vLLM reads {base.model_type} in 3-D: convert to vllm_3d, or serve with "
            "--enable-mixed-moe-lora-format and is_3d_lora_weight false"
        )
    if adapter.carried:
        yield (
            f"vLLM and SGLang refuse adapters with modules_to_save ({adapter.carried[0]}); PEFT "
            "loads them"
        )
    if VLLM.allocated(max(layer.r for layer in adapter.layers())) is None:
        yield f"vLLM takes ranks up to {VLLM.ranks[-1]}"
    lonely = query_without_value(adapter.linears)
    if lonely is not None:
        yield f"SGLang does not load q_proj without v_proj ({lonely})"
