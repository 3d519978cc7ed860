"""The interface of a format: how it names and orders its tensors, and what its readers accept."""

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig

from ...files.adapter_file import WEIGHTS_NAME
from ...files.card import CardText
from ...files.servers import Server
from ...files.tensor_file import AdapterError, Block, Progress, Tensors, write_tensors
from ..model import Adapter, Experts, LinearPair, Pair
from ..source import Slot, Source

# the prefix that PEFT adds to every path in an adapter file
PREFIX = "base_model.model."


class SlotName(NamedTuple):
    """Identifies a pair (an A and its B) within one experts module.

    Attributes:
        name: the projection's name in the format's keys.
        expert: id of the one expert that the pair belongs to; None if the pair holds all experts.
    """

    name: str
    expert: int | None = None


# path of an experts module -> name of a pair -> the keys of its A and B
Slots = dict[str, dict[SlotName, Slot]]


class Read(NamedTuple):
    """The result of reading a file's expert tensors.

    Attributes:
        format: name of the format, or of an older version of it.
        experts: experts path -> projection -> Pair.
        notes: what a user should know.
    """

    format: str
    experts: Experts
    notes: tuple[str, ...] = ()


class Opened(NamedTuple):
    """A folder in the files of another program than PEFT.

    Attributes:
        format: name of the format.
        file: its tensors, under names and in shapes of a format in PEFT's files.
        as_pefts: function of the configuration's path and its contents. It returns the same as
            fields of PEFT, or raises if these cannot say it.
    """

    format: str
    file: Tensors
    as_pefts: Callable[[Path, dict[str, Any]], dict[str, Any]]


class Format(ABC):
    """One format: reads its tensors into pairs, and writes pairs as its tensors.

    Attributes:
        name: the format's name, as users write it.
        key: pattern of an expert tensor's key. The group `path` is the experts module, `side` is A
            or B, and `slot` is the name of the pair within the module.
        card: the text about the format in a model card, and the servers that read it.
        one_rank: whether its readers support only one rank and one scaling for the whole adapter.
        both_projections: whether its readers need both projections of every expert.
        some_experts: whether it can hold updates of only some experts.
        every_family: whether it can describe every family that this package adapts. If not,
            `Family.exports` gives the reason why a family's adapters cannot be written.
        keeps_dropout: whether it keeps lora_dropout, for further training.
        weights_name: name of the file with the tensors.
    """

    name: str
    key: re.Pattern[str]
    card: CardText
    one_rank = False
    both_projections = False
    some_experts = False
    every_family = False
    keeps_dropout = False
    weights_name = WEIGHTS_NAME

    def opened(self, folder: Path) -> Opened | None:
        """The adapter in a folder, if it is in files of this format that PEFT does not have."""
        return None

    def slots(self, source: Source) -> Slots:
        """The expert tensors of this format in a file.

        Raises:
            AdapterError: if an A has no B, if a B has no A, or if a tensor has two names.
        """
        found: dict[str, dict[SlotName, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
        for key in source.names:
            match = self.key.fullmatch(key)
            if not match:
                continue
            sides = found[match["path"]][self.slot_name(match)]
            if match["side"] in sides:
                raise AdapterError(
                    f"{source.file.path}: {source.names[key]} and "
                    f"{source.names[sides[match['side']]]} are the same tensor under two names; "
                    "keep one of them."
                )
            sides[match["side"]] = key
        return {
            path: {name: _both_sides(source, path, sides) for name, sides in slots.items()}
            for path, slots in found.items()
        }

    def slot_name(self, match: re.Match[str]) -> SlotName:
        return SlotName(match["slot"] or "")

    @abstractmethod
    def read(self, source: Source, slots: Slots) -> Read:
        """The updates of the experts; no tensor is loaded.

        Args:
            source: the adapter.
            slots: the expert tensors. What is read is taken out; what is left is an error.
        Raises:
            AdapterError: if the tensors do not belong together or do not fit the base model.
            RefusedError: if they can be read in two ways, or if the base model is needed but not
                known.
        """

    def card_of(self, adapter: Adapter) -> CardText:
        """The text about this format in the card of a prepared adapter."""
        return self.card

    def prepare(self, adapter: Adapter) -> Adapter:
        """The adapter in a form that this format's readers accept.

        Raises:
            RefusedError: if there is no such form.
        """
        return adapter

    def refusals(self, adapter: Adapter) -> dict[Server, str]:
        """The servers of the format's card that refuse or misread an adapter, and why."""
        return {}

    def servers(self, adapter: Adapter) -> list[Server]:
        """The servers that read a prepared adapter, as they are started for it."""
        refused = self.refusals(adapter)
        return [server for server in self.card.served_by if server not in refused]

    @abstractmethod
    def block(self, adapter: Adapter, path: str, projection: str, pair: Pair) -> Block:
        """The tensors of one projection of one experts module."""

    @abstractmethod
    def config(self, adapter: Adapter) -> LoraConfig:
        """The configuration that is saved as adapter_config.json."""

    def write(
        self,
        adapter: Adapter,
        folder: Path,
        blocks: Iterable[Block],
        progress: Progress | None = None,
    ) -> None:
        """Write the tensors into a folder."""
        write_tensors(folder / self.weights_name, blocks, self.metadata(adapter), progress)

    def save_config(self, adapter: Adapter, folder: Path) -> dict[str, Any]:
        """Write adapter_config.json, and return its fields of PEFT."""
        config = self.config(adapter)
        config.save_pretrained(str(folder))
        return config.to_dict()

    def metadata(self, adapter: Adapter) -> dict[str, str]:
        """The strings in the header of the safetensors file."""
        return {"format": "pt"}

    def rename(self, adapter: Adapter, key: str) -> str:
        """The name that this format writes for a LoRA tensor's key with the base model's path."""
        return PREFIX + key

    def stored_A(self, adapter: Adapter, pair: LinearPair, A: torch.Tensor) -> torch.Tensor:
        """A [r, K] of an ordinary layer as this format stores it; on the meta device too."""
        return A

    def stored_B(self, adapter: Adapter, pair: LinearPair, B: torch.Tensor) -> torch.Tensor:
        """B [N, r] of an ordinary layer as this format stores it; on the meta device too."""
        return B

    def saved_key(self, adapter: Adapter, name: str) -> str:
        """The name for a tensor of the base model that the adapter replaces.

        PEFT alone reads such tensors, so the paths are those of transformers. PEFT wraps an adapted
        layer, whose own tensors are then in base_layer.
        """
        path, _, last = name.rpartition(".")
        if path in adapter.tokens:
            path += ".token_adapter.base_layer"
        elif path in adapter.linears:
            path += ".base_layer"
        return f"{PREFIX}{path}.{last}"

    def original_key(self, name: str) -> str:
        """The name for a copy of a tensor of the base model, beside the one that replaces it."""
        path, _, last = name.rpartition(".")
        return f"{PREFIX}{path}.original_module.{last}"

    def tokens_key(self, path: str) -> str:
        """The name for the rows of an embedding that the adapter replaces."""
        return f"{PREFIX}{path}.token_adapter.trainable_tokens_delta"


def _both_sides(source: Source, path: str, sides: dict[str, str]) -> Slot:
    for side, other in (("A", "B"), ("B", "A")):
        if side not in sides:
            raise AdapterError(
                f"{source.file.path}: {path} has {sides[other]} but not its lora_{side}; the file "
                "is damaged or was filtered."
            )
    return Slot(sides["A"], sides["B"])


def stacked_parts(pair: Pair, parts: dict[str, slice]) -> Block:
    """`<name>.lora_a` [E, r, K] and `<name>.lora_b` [E, rows, r] of each part of a projection.

    Args:
        pair: the pair of the projection.
        parts: {name: the out-features of the part}; parts are equally large and share A.
    """

    def make() -> Iterator[torch.Tensor]:
        A, B = pair.load()
        for rows in parts.values():
            yield A
            yield B[:, rows]

    rows_of_part = pair.out_features // len(parts)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in parts:
        shapes[f"{name}.lora_a"] = (pair.num_experts, pair.r, pair.in_features)
        shapes[f"{name}.lora_b"] = (pair.num_experts, rows_of_part, pair.r)
    return Block(shapes, pair.dtype, make)
