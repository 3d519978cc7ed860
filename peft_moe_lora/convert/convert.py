"""Converts adapters from one format into another; no weight of the base model is loaded.

If the readers of a format would refuse an adapter, it is refused here before anything is written.
Only the tensors that are being converted are in memory: one projection of one experts module at a
time.
"""

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..experts.families import ONE_EACH
from ..experts.layout import PROJECTIONS
from ..files.card import write_card
from ..files.folders import SIDE_FILES, new_folder, own_files
from ..files.tensor_file import (
    AdapterError,
    Block,
    FilePath,
    Progress,
    RefusedError,
)
from .base import BaseConfig
from .fit import fill_in, make_uniform
from .formats import FORMATS, LEGACY_NAME, WRITABLE, Format
from .model import Adapter, LinearPair, pad, rescale
from .reading import open_adapter, read_paths

# 64 MiB; tokenizers have up to 40 MB. These files are copied, and the README is read whole
_LARGEST_SIDE_FILE = 2**26


@dataclass(frozen=True)
class Conversion:
    """What a conversion did.

    Attributes:
        source: name of the format that was read.
        to: name of the format that was written.
        path: the folder that was written.
        modules: number of experts modules.
        experts: number of experts with an update, in all modules together.
        notes: sentences on what was changed and what a user should know.
    """

    source: str
    to: str
    path: Path
    modules: int
    experts: int
    notes: tuple[str, ...]


def convert_adapter(
    src: FilePath,
    dst: FilePath,
    *,
    to: str,
    base_config: BaseConfig | None = None,
    b_layout: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write an adapter in another format.

    Args:
        src: folder of an adapter; its format is found from the names of its tensors.
        dst: folder to write. It appears only after everything is written.
        to: name of the format to write: moe_lora, peft, per_expert, vllm_3d, sglang_3d,
            mlx or gguf.
        base_config: the base model: a folder, a config, or a name on the hub; by default the base
            model that the adapter names, if it is a local folder. The adapter's shapes are compared
            with it, and it is needed to split gate from up.
        b_layout: order of lora_B under PEFT's keys: "auto", "rank_major" (PEFT) or "expert_major"
            (old Unsloth).
        force: replace `dst` if it is an earlier output, and holds nothing that is read.
        progress: called with (blocks written, total blocks).
    Returns: what was done, with notes.
    Raises:
        AdapterError: if the adapter is damaged, unknown, or for another model.
        RefusedError: if the format's readers would refuse or misread the result, or if the adapter
            can be read in two ways.
        ExistsError: if `dst` exists and may not be replaced.
    """
    if to not in WRITABLE:
        raise RefusedError(
            f"to={to!r} is not a format that can be written; choose one of {', '.join(WRITABLE)} "
            f"({LEGACY_NAME} is read only)."
        )
    form = WRITABLE[to]
    adapter = prepare(open_adapter(src, base_config, b_layout), form)
    copied = _side_files(src)
    with new_folder(dst, force, read_paths(src, adapter), copied) as folder:
        write_adapter(adapter, form, folder, copied, progress)
    return Conversion(
        source=adapter.format,
        to=to,
        path=Path(dst),
        modules=len(adapter.experts),
        experts=adapter.adapted_experts(),
        notes=adapter.notes,
    )


def _side_files(folder: FilePath) -> list[Path]:
    """The tokenizer's files and the README in an adapter's folder.

    Raises:
        AdapterError: if one of them is larger than such files are, or is not a file.
    """
    found = own_files(folder, lambda name: name.startswith(SIDE_FILES))
    for file in found:
        size = file.stat().st_size
        if size > _LARGEST_SIDE_FILE:
            raise AdapterError(
                f"{file} has {size} bytes, but a file beside an adapter has at most "
                f"{_LARGEST_SIDE_FILE}; move it away, or save it again."
            )
    return found


def prepare(adapter: Adapter, form: Format) -> Adapter:
    """The adapter in the form that the readers of a format accept.

    Raises:
        RefusedError: if there is no such form.
    """
    if not form.every_family:
        _refuse_families_without_export(adapter, form)
    adapter = form.prepare(adapter)
    if form.both_projections:
        adapter = fill_in(adapter, PROJECTIONS, form.name)
    if form.one_rank:
        adapter = make_uniform(adapter, form.name)
    return adapter.noted(*_serving_notes(adapter, form), *_losses(adapter, form))


def _refuse_families_without_export(adapter: Adapter, form: Format) -> None:
    """Raise for an adapter on a family that only our own format can describe."""
    for path, pairs in adapter.experts.items():
        family = None
        if adapter.base is not None:
            family = adapter.base.experts[path].family
        why = None
        if family is not None:
            why = family.exports
        elif "linear" in pairs:
            why = ONE_EACH
        if why:
            raise RefusedError(
                f"{path} cannot be written as {form.name}: {why}; merge it into its model instead."
            )


def _serving_notes(adapter: Adapter, form: Format) -> Iterator[str]:
    """Notes on the maximum rank to serve with, for servers that accept only some values."""
    for server in form.servers(adapter):
        rank = server.allocated(adapter.config["r"])
        if server.ranks and rank is not None:
            yield f"{server.name}: serve with --max-lora-rank {rank}"


def _losses(adapter: Adapter, form: Format) -> Iterator[str]:
    """Notes on what a format cannot express, and what is written instead."""
    if not form.some_experts and any(pair.chosen is not None for pair in adapter.pairs()):
        able = ", ".join(other.name for other in FORMATS.values() if other.some_experts)
        yield f"experts without an adapter are written as zeros: only {able} can leave them out"
    if not form.keeps_dropout and adapter.config.get("lora_dropout"):
        yield "lora_dropout is written as 0: it has no effect after training"


def write_adapter(
    adapter: Adapter,
    form: Format,
    folder: Path,
    copied: Iterable[Path] = (),
    progress: Progress | None = None,
) -> None:
    """Write a prepared adapter into an empty folder.

    The folder gets the weights, the configuration, the model card, and copies of the files
    `copied`: the tokenizer's files and the README in the source adapter's folder.
    """
    blocks = _blocks(adapter, form)
    form.write(adapter, folder, blocks, progress)
    config = form.save_config(adapter, folder)
    for file in copied:
        shutil.copyfile(file, folder / file.name)
    write_card(folder, form.card_of(adapter), config, adapter.notes, form.servers(adapter))


def _blocks(adapter: Adapter, form: Format) -> Iterator[Block]:
    """Everything to write: the experts, the LoRA of ordinary layers, and what is not LoRA."""
    for path, pairs in adapter.experts.items():
        for projection, pair in pairs.items():
            yield form.block(adapter, path, projection, pair)
    for linear in adapter.linears.values():
        yield _linear_block(adapter, form, linear, linear.A)
        yield _linear_block(adapter, form, linear, linear.B)
    for name, key in adapter.saved.items():
        yield _copied_block(adapter, key, form.saved_key(adapter, name))
    for name, key in adapter.originals.items():
        yield _copied_block(adapter, key, form.original_key(name))
    for path, rows in adapter.tokens.items():
        yield _copied_block(adapter, rows.key, form.tokens_key(path))


def _linear_block(adapter: Adapter, form: Format, linear: LinearPair, key: str) -> Block:
    """A [r, K] or B [N, r] of an ordinary layer, padded to its rank; B is rescaled."""
    name = adapter.names[key]
    info = adapter.file.tensors[name]

    def stored(tensor: torch.Tensor) -> torch.Tensor:
        if key == linear.A:
            return form.stored_A(adapter, linear, pad(tensor, 0, linear.r))
        B = rescale(tensor, linear.factor)
        return form.stored_B(adapter, linear, pad(B, 1, linear.r))

    shape = stored(torch.empty(info.shape, dtype=info.dtype, device="meta")).shape
    written = {form.rename(adapter, key): tuple(shape)}
    return Block(written, info.dtype, lambda: [stored(adapter.file.load(name))])


def _copied_block(adapter: Adapter, key: str, written: str) -> Block:
    """A tensor that is written unchanged, under the key `written`."""
    name = adapter.names[key]
    info = adapter.file.tensors[name]
    return Block({written: info.shape}, info.dtype, lambda: [adapter.file.load(name)])
