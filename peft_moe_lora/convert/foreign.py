"""What other programs name otherwise than the formats do, or write in a form of their own.

Their exports have names that a format knows, with these exceptions: a tensor that all experts
share may stand beside tensors of each expert, and a part that experts do not have may be empty.
`looks_like` knows the names of their own checkpoints.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch

from ..files.tensor_file import AdapterError, TensorInfo, Tensors


class _Program(NamedTuple):
    """A program, a pattern of the names in its own checkpoints, and its way to export."""

    name: str
    pattern: re.Pattern[str]
    export: str


_PROGRAMS = (
    _Program(
        "Megatron-Bridge",
        re.compile(r"\.adapter\.linear_(?:in|out)\.weight$"),
        "export it with AutoBridge.export_adapter_ckpt",
    ),
    _Program(
        "NeMo Automodel",
        re.compile(r"\.lora_(?:gate_and_up|down)_[AB]$"),
        "let its checkpointer write the adapter, which then has tensors of each expert",
    ),
    _Program(
        "prime-rl",
        re.compile(r"\.w[123]_lora_[AB](?:\.\d+)?$"),
        "save it with save_adapter_separately, which writes tensors of each expert",
    ),
)


# <experts>.<part>.lora_A.weight of all experts, and <experts>.<e>.<part>.lora_A.weight of one
_OF_ALL = re.compile(
    r"(?P<experts>.*\bexperts)\.(?P<part>gate_proj|up_proj|down_proj|w1|w2|w3)"
    r"\.lora_(?P<side>[AB])\.weight"
)
_OF_ONE = re.compile(_OF_ALL.pattern.replace(r"\.(?P<part>", r"\.(?P<expert>\d+)\.(?P<part>"))
_OTHER_SIDE = {"A": "B", "B": "A"}


def in_known_form(file: Tensors) -> Tensors:
    """The tensors of a file as a format knows them; the file itself if there is nothing to do.

    Left out is an empty w3, which Tinker writes for experts without a gate. A tensor [1, ...] of
    all experts becomes one of each expert if its other side is there for each, as Megatron-Bridge
    and SGLang's shared-outer layout have it.

    Raises:
        AdapterError: if a tensor is there for all experts and for one of them too.
    """
    stored = {name: name for name in file.tensors}
    tensors = dict(file.tensors)
    for name in _placeholders(file):
        del stored[name], tensors[name]
    for name, experts in _shared(file).items():
        info = tensors.pop(name)
        del stored[name]
        for e in experts:
            own = _OF_ALL.sub(rf"\g<experts>.{e}.\g<part>.lora_\g<side>.weight", name)
            if own in tensors:
                raise AdapterError(
                    f"{file.path} has {name} of all experts and {own} too; keep one of them."
                )
            tensors[own] = replace(info, shape=info.shape[1:])
            stored[own] = name
    if tensors.keys() == file.tensors.keys():
        return file
    return _View(file, tensors, stored)


class _View:
    """Tensors of a file under other names, some of them without a leading dimension of 1.

    Args:
        file: the file.
        tensors: name -> dtype and shape.
        stored: name -> name in the file.
    """

    def __init__(
        self, file: Tensors, tensors: dict[str, TensorInfo], stored: dict[str, str]
    ) -> None:
        self.path = file.path
        self.metadata = file.metadata
        self.tensors = tensors
        self._file = file
        self._stored = stored

    def load(self, name: str) -> torch.Tensor:
        return self._file.load(self._stored[name]).reshape(self.tensors[name].shape)


def _placeholders(file: Tensors) -> list[str]:
    """The names of A and B of a w3 that are both empty."""
    empty = set()
    for name, info in file.tensors.items():
        match = _OF_ALL.fullmatch(name)
        if match is not None and match["part"] == "w3" and 0 in info.shape:
            empty.add(name)
    return [name for name in empty if _with_other_side(name) in empty]


def _shared(file: Tensors) -> dict[str, list[str]]:
    """Name of a tensor that all experts share -> the experts that have the other side."""
    others: dict[str, list[str]] = {}
    for name in file.tensors:
        match = _OF_ONE.fullmatch(name)
        if match is not None:
            side = _OTHER_SIDE[match["side"]]
            shared = f"{match['experts']}.{match['part']}.lora_{side}.weight"
            others.setdefault(shared, []).append(match["expert"])
    return {
        name: others[name]
        for name, info in file.tensors.items()
        if name in others and len(info.shape) == 3 and info.shape[0] == 1
    }


def _with_other_side(name: str) -> str:
    match = _OF_ALL.fullmatch(name)
    assert match is not None, f"{name} is no tensor of experts"
    return f"{match['experts']}.{match['part']}.lora_{_OTHER_SIDE[match['side']]}.weight"


def looks_like(names: Iterable[str]) -> str:
    """A sentence on whose checkpoint has these names, with a space before it; else nothing.

    Args:
        names: the names of the tensors in a file.
    """
    for name in names:
        for program in _PROGRAMS:
            if program.pattern.search(name):
                return f" It looks like a checkpoint of {program.name} itself: {program.export}."
    return ""
