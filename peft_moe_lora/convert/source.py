"""An adapter's two files before its format is known: the tensors and the configuration."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from ..files.adapter_file import read_description
from ..files.patterns import value_of
from ..files.scaling import scaling_of
from ..files.tensor_file import AdapterError, TensorInfo, Tensors
from ..files.text import shown
from .base import BaseModel, need_base
from .model import Pair


class Slot(NamedTuple):
    """The keys of one A and its B."""

    A: str
    B: str


# more experts in a module than any known model has; without the base model, a file is not believed
# to be a part of more, because a format without chosen experts holds zeros for all the others
MOST_EXPERTS = 2048


@dataclass(frozen=True)
class Source:
    """The files of an adapter, and the facts of its base model.

    Attributes:
        file: the file with its tensors.
        config: the contents of its adapter_config.json.
        names: key -> name in the file; a key has no PEFT prefix and uses the base model's paths.
        paths: path of a module in the base model -> its path in the file, where these differ.
        base: facts of the base model; None if it is not known.
        b_layout: the order of lora_B, as the caller gave it; see `convert_adapter`.
    """

    file: Tensors
    config: dict[str, Any]
    names: dict[str, str]
    paths: dict[str, str]
    base: BaseModel | None
    b_layout: str = "auto"

    def info(self, key: str) -> TensorInfo:
        return self.file.tensors[self.names[key]]

    def load(self, key: str) -> torch.Tensor:
        return self.file.load(self.names[key])

    @cached_property
    def description(self) -> dict[str, Any]:
        """The description in the metadata of our own format; {} for files of other programs."""
        return read_description(str(self.file.path), self.file.metadata)

    def rank(self, path: str) -> int:
        return self._value("rank_pattern", path, self.config["r"])

    def scaling(self, path: str) -> float:
        """lora_alpha / r of a layer, or lora_alpha / sqrt(r) with rsLoRA."""
        alpha = self._value("alpha_pattern", path, self.config["lora_alpha"])
        return scaling_of(alpha, self.rank(path), self.config["use_rslora"])

    def _value(self, pattern: str, path: str, default: Any) -> Any:
        return value_of(self.config[pattern], self.path_in_file(path), default)

    def path_in_file(self, path: str) -> str:
        """The path, in the file, of a module or parameter; the configuration's patterns match it.

        Args:
            path: its path in the base model.
        """
        head = path
        while head:
            if head in self.paths:
                return self.paths[head] + path[len(head) :]
            head = head.rpartition(".")[0]
        return path

    def chosen(self, path: str) -> tuple[int, ...] | None:
        """Ascending ids of the experts of a module that have an update; None for all."""
        indices = self.config.get("expert_indices")
        if indices is None:
            return None
        return tuple(value_of(indices, self.path_in_file(path), ()))

    def num_experts(self, path: str, chosen: tuple[int, ...]) -> int:
        """E of a module whose tensors hold only the chosen experts.

        Raises:
            AdapterError: if the base model is not known and the metadata give an E that no model
                has.
            RefusedError: if neither the base model nor the metadata give E.
        """
        described = self.description.get("experts", {}).get(path, {})
        if self.base is None and "num_experts" in described:
            E = described["num_experts"]
            if E > MOST_EXPERTS:
                raise AdapterError(
                    f"{self.file.path}: its metadata give {shown(path)} {E} experts, of which the "
                    f"file holds {len(chosen)}; without the base model this must be at most "
                    f"{MOST_EXPERTS}. Name the base model (base_config, --base-config)."
                )
            return E
        base = need_base(
            self.base,
            f"{self.file.path} holds only some experts of {path}, and the number of all experts "
            "of the module is not known",
        )
        if path in base.experts:
            return base.experts[path].num_experts
        return len(chosen)

    def checked(self, path: str, projection: str, pair: Pair) -> Pair:
        """Check a pair's sizes against the base model, if that is known, and return the pair.

        Raises:
            AdapterError: if the base model has no such experts module, or if its sizes differ.
        """
        if self.base is None:
            return pair
        layout = self.base.experts.get(path)
        if layout is None:
            raise AdapterError(
                f"{self.file.path} adapts {path}, but {self.base.name} has no experts module of "
                f"that name; its first one is {next(iter(self.base.experts))}. Name the base model "
                "that the adapter was trained on."
            )
        known = layout.projection(projection)
        sizes = (pair.num_experts, pair.in_features, pair.out_features)
        if sizes != (layout.num_experts, known.in_features, known.out_features):
            raise AdapterError(
                f"{self.file.path}: {path}, {projection} is for {pair.num_experts} experts of "
                f"{pair.in_features} -> {pair.out_features} features, but {self.base.name} has "
                f"{layout.num_experts} experts of {known.in_features} -> {known.out_features}. "
                "Name the base model that the adapter was trained on."
            )
        return pair

    def stacked_sizes(self, slot: Slot, r: int) -> tuple[int, int, int]:
        """(E, in, out) of A [E*r, in] and B [out, E*r].

        Raises:
            AdapterError: if the tensors do not have such shapes.
        """
        A = self.info(slot.A).shape
        B = self.info(slot.B).shape
        if len(A) != 2 or len(B) != 2 or A[0] % r or A[0] == 0 or A[0] != B[1]:
            raise AdapterError(
                f"{self.file.path}: {slot.A} {list(A)} and {slot.B} {list(B)} must be A [E*r, K] "
                f"and B [N, E*r] with r={r} of adapter_config.json; the two files do not belong "
                "together."
            )
        return A[0] // r, A[1], B[0]
