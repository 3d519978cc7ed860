"""The order of lora_B's columns under PEFT's keys: rank-major, or expert-major as Unsloth wrote it.

Rank-major: column j*E + e is rank j of expert e. Expert-major: columns e*r up to (e + 1)*r are
B[e]. Both have the shape [N, r*E]. Unsloth writes its order into adapter_config.json, for the whole
file or for each parameter.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...files.tensor_file import AdapterError, RefusedError
from ...files.text import quoted
from ..source import Source

# the values of b_layout: the orders of lora_B under PEFT's keys
B_LAYOUTS = ("auto", "rank_major", "expert_major")

# fields of adapter_config.json: the order of the whole file, and Unsloth's note on each parameter
MARKER = "lora_B_layout"
PER_PARAMETER = "unsloth_fused_expert_lora"

_MEANINGS = {
    "rank_major": "rank_major",
    "expert_major": "expert_major",
    # Unsloth's word for the same
    "grouped_by_expert": "expert_major",
}


@dataclass(frozen=True)
class Orders:
    """The order of each parameter's B.

    Attributes:
        default: the order of parameters that are not named; None if it is not known.
        named: last name of a parameter -> its order.
        notes: where the orders come from.
    """

    default: str | None
    named: Mapping[str, str]
    notes: tuple[str, ...] = ()

    def of(self, source: Source, parameter: str) -> str:
        """The order of the parameter at a path.

        Raises:
            RefusedError: if the file names the order of other parameters only.
        """
        order = self.named.get(parameter.rpartition(".")[2], self.default)
        if order is None:
            raise RefusedError(
                f"{source.file.path}: {PER_PARAMETER} of adapter_config.json has no order of "
                f"lora_B for {parameter}; give it as b_layout (--b-layout rank_major or "
                "expert_major)."
            )
        return order


def orders_of_B(source: Source) -> Orders:
    """The orders of B in a file. They are PEFT's, unless another program wrote the file.

    Raises:
        AdapterError: if the caller names an order that does not exist.
        RefusedError: if the file may be in either order, or if it names an unknown order.
    """
    if source.b_layout not in B_LAYOUTS:
        raise AdapterError(f"b_layout must be one of {B_LAYOUTS}, got {source.b_layout!r}.")
    if source.b_layout != "auto":
        note = f"B was read as {source.b_layout}, as given by b_layout"
        return Orders(source.b_layout, {}, (note,))
    mapping = source.config.get("auto_mapping")
    if not isinstance(mapping, dict):
        mapping = {}
    for config in (source.config, mapping):
        orders = _written_orders(source, config)
        if orders is not None:
            return orders
    base_name = source.config.get("base_model_name_or_path") or ""
    if mapping.get("unsloth_fixed") or "unsloth" in base_name.lower():
        raise RefusedError(
            f"{source.file.path} looks like an adapter of Unsloth and does not say how its lora_B "
            "is ordered. Releases before September 2026 trained it expert-major and later releases "
            "rank-major, with the same shapes. Give the order as b_layout (--b-layout expert_major "
            "or rank_major)."
        )
    return Orders("rank_major", {})


def _written_orders(source: Source, config: Mapping[str, Any]) -> Orders | None:
    """The orders that a configuration names; None if it names none."""
    named = {
        name: _meaning(source, f"{PER_PARAMETER}, {quoted(name)}", word)
        for name, word in _noted_words(config.get(PER_PARAMETER)).items()
    }
    default = None
    said = set(named.values())
    if config.get(MARKER) is not None:
        default = _meaning(source, MARKER, config[MARKER])
        said.add(default)
    if not said:
        return None
    note = f"B was read as {' and '.join(sorted(said))}, as given by adapter_config.json"
    return Orders(default, named, (note,))


def _noted_words(note: object) -> dict[str, object]:
    """Last name of a parameter -> its order, in the words of Unsloth's note."""
    if not isinstance(note, dict) or not isinstance(note.get("parameters"), dict):
        return {}
    words = {}
    for name, entry in note["parameters"].items():
        words[name] = entry
        if isinstance(entry, dict):
            words[name] = entry.get(MARKER)
    return words


def _meaning(source: Source, field: str, word: object) -> str:
    if isinstance(word, str) and word in _MEANINGS:
        return _MEANINGS[word]
    raise RefusedError(
        f"{source.file.path}: adapter_config.json has {field}={quoted(word)}, which is not known; "
        "give the order of B as b_layout (--b-layout rank_major or expert_major)."
    )
