"""What a format is: how it names and orders its tensors, and what its readers take."""

import re
from abc import ABC, abstractmethod
from collections import defaultdict
from typing import NamedTuple

from peft import LoraConfig

from ...files.card import CardText
from ...files.tensor_file import AdapterError, Block
from ..model import Adapter, Experts, Pair
from ..source import Slot, Source

# what PEFT puts before every path in an adapter file
PREFIX = "base_model.model."


class SlotName(NamedTuple):
    """What tells the pairs of one experts module apart.

    Attributes:
        name: as the format's keys have it.
        expert: id of the one expert the pair belongs to; None where it holds all of them.
    """

    name: str
    expert: int | None = None


# experts path -> slot name -> its keys
Slots = dict[str, dict[SlotName, Slot]]


class Read(NamedTuple):
    """What a format makes of a file's expert tensors.

    Attributes:
        format: name of the format, or of an older form of it.
        experts: experts path -> projection -> Pair.
        notes: what a user should know.
    """

    format: str
    experts: Experts
    notes: tuple[str, ...] = ()


class Format(ABC):
    """One format: reads its tensors into pairs, and writes pairs as its tensors.

    Attributes:
        name: as users write it.
        key: pattern of an expert tensor's key. Its group `path` is the experts module, `side` is A
            or B, and `slot` tells the pairs of one module apart.
        card: what a model card says of the format, and which servers read it.
        one_rank: whether its readers know one rank and one scaling for the whole adapter.
        both_projections: whether its readers want both projections of every expert.
        some_experts: whether it can hold updates of some experts only.
        every_family: whether it can describe every family that we adapt; if not, a family says
            why its adapters are not written (`Family.exports`).
        keeps_dropout: whether it keeps lora_dropout, for training on.
    """

    name: str
    key: re.Pattern[str]
    card: CardText
    one_rank = False
    both_projections = False
    some_experts = False
    every_family = False
    keeps_dropout = False

    def slots(self, source: Source) -> Slots:
        """The expert tensors of this format in a file.

        Raises:
            AdapterError: if an A stands without its B, or a B without its A.
        """
        found: dict[str, dict[SlotName, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
        for key in source.names:
            match = self.key.fullmatch(key)
            if match:
                found[match["path"]][self.slot_name(match)][match["side"]] = key
        return {
            path: {name: _both_sides(source, path, sides) for name, sides in slots.items()}
            for path, slots in found.items()
        }

    def slot_name(self, match: re.Match[str]) -> SlotName:
        return SlotName(match["slot"] or "")

    @abstractmethod
    def read(self, source: Source, slots: Slots) -> Read:
        """The updates of the experts; no tensor is loaded.

        Raises:
            AdapterError: if the tensors are not of one adapter, or not for the base model.
            RefusedError: if they can be read in two ways, or the base model has to be known.
        """

    def prepare(self, adapter: Adapter) -> Adapter:
        """The adapter in a form that this format's readers take.

        Raises:
            RefusedError: if there is none.
        """
        return adapter

    @abstractmethod
    def block(self, adapter: Adapter, path: str, projection: str, pair: Pair) -> Block:
        """The tensors of one projection of one experts module."""

    @abstractmethod
    def config(self, adapter: Adapter) -> LoraConfig:
        """What is saved as adapter_config.json."""

    def metadata(self, adapter: Adapter) -> dict[str, str]:
        """The strings in the header of the safetensors file."""
        return {"format": "pt"}

    def rename(self, adapter: Adapter, key: str) -> str:
        """A key in the base model's paths, as this format writes it."""
        return PREFIX + key


def _both_sides(source: Source, path: str, sides: dict[str, str]) -> Slot:
    for side, other in (("A", "B"), ("B", "A")):
        if side not in sides:
            raise AdapterError(
                f"{source.file.path}: {path} has {sides[other]} without its lora_{side}; the file "
                "is damaged or was filtered."
            )
    return Slot(sides["A"], sides["B"])
