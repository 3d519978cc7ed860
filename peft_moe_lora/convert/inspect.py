"""Describes what an adapter holds and which formats it can be converted to, from headers only."""

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from ..experts.layout import EVERY_PROJECTION
from ..files.tensor_file import FilePath, RefusedError
from .base import BaseConfig
from .convert import prepare
from .formats import WRITABLE, Format
from .model import Adapter
from .reading import open_adapter


@dataclass(frozen=True)
class Inspection:
    """What an adapter's files hold.

    Attributes:
        path: folder of the adapter.
        format: name of its format.
        base_model: base_model_name_or_path of its configuration.
        modules: number of experts modules.
        num_experts: the values of E in these modules, ascending.
        adapted: number of experts with an update, in all modules together.
        projections: names of the adapted projections.
        ranks: rank -> number of projections and ordinary layers with this rank.
        scalings: scaling -> number of projections and ordinary layers with this scaling.
        dtypes: name of a dtype -> number of LoRA tensors with this dtype.
        linears: last name of ordinary layers -> number of layers with LoRA.
        carried: keys of tensors that are not LoRA: saved whole, or rows of tokens.
        parameters: number of LoRA parameters.
        readers: format -> "ok", or the reason why its readers would refuse the adapter.
        notes: what a user should know.
    """

    path: Path
    format: str
    base_model: str | None
    modules: int
    num_experts: tuple[int, ...]
    adapted: int
    projections: tuple[str, ...]
    ranks: dict[int, int]
    scalings: dict[float, int]
    dtypes: dict[str, int]
    linears: dict[str, int]
    carried: tuple[str, ...]
    parameters: int
    readers: dict[str, str]
    notes: tuple[str, ...]


def inspect_adapter(
    path: FilePath, base_config: BaseConfig | None = None, b_layout: str = "auto"
) -> Inspection:
    """Describe what an adapter holds and which formats it can be converted to, from headers only.

    Args:
        path: folder of the adapter.
        base_config: as in `convert_adapter`.
        b_layout: as in `convert_adapter`.
    Raises:
        AdapterError, RefusedError: as in `convert_adapter`.
    """
    adapter = open_adapter(path, base_config, b_layout)
    layers = adapter.layers()
    adapted = {name for pairs in adapter.experts.values() for name in pairs}
    lora = [info for name, info in adapter.file.tensors.items() if ".lora_" in name]
    return Inspection(
        path=Path(path),
        format=adapter.format,
        base_model=adapter.config.get("base_model_name_or_path"),
        modules=len(adapter.experts),
        num_experts=tuple(sorted({pair.num_experts for pair in adapter.pairs()})),
        adapted=adapter.adapted_experts(),
        projections=tuple(name for name in EVERY_PROJECTION if name in adapted),
        ranks=dict(Counter(layer.r for layer in layers)),
        scalings=dict(Counter(layer.scaling for layer in layers)),
        dtypes=dict(Counter(str(info.dtype).removeprefix("torch.") for info in lora)),
        linears=dict(Counter(path.rpartition(".")[2] for path in adapter.linears)),
        carried=tuple(adapter.without_lora()),
        parameters=sum(math.prod(info.shape) for info in lora),
        readers={name: _answer(adapter, form) for name, form in WRITABLE.items()},
        notes=adapter.notes,
    )


def _answer(adapter: Adapter, form: Format) -> str:
    """For one format: "ok" with the notes of a conversion, or the reason why it is refused."""
    try:
        prepared = prepare(replace(adapter, notes=()), form)
    except RefusedError as error:
        return str(error)
    return "; ".join(("ok", *prepared.notes))
