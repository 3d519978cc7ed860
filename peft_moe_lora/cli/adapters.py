"""The commands on files of adapters: inspect, convert, consolidate, merge, verify."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .answers import Answer, OnStep
from .options import (
    BASE_HELP,
    Adapter,
    BaseConfig,
    BLayout,
    Destination,
    Force,
    FormatName,
)

if TYPE_CHECKING:
    from ..convert.convert import Conversion


def inspect(path: Adapter, base_config: BaseConfig = None, b_layout: BLayout = "auto") -> Answer:
    """Print what an adapter holds and which formats it can be converted to; reads headers only."""
    from ..convert.inspect import inspect_adapter

    found = asdict(inspect_adapter(path, base_config, b_layout))
    found["path"] = str(found["path"])
    return Answer(found)


def convert(
    src: Adapter,
    dst: Destination,
    to: Annotated[FormatName, typer.Option(help="Format to write.")] = "per_expert",
    base_config: BaseConfig = None,
    b_layout: BLayout = "auto",
    force: Force = False,
    progress: OnStep = None,
) -> Answer:
    """Write an adapter in another format; PEFT and most servers read the default format."""
    from ..convert.convert import convert_adapter

    done = convert_adapter(
        src,
        dst,
        to=to,
        base_config=base_config,
        b_layout=b_layout,
        force=force,
        progress=progress,
    )
    return _conversion(done)


def consolidate(
    checkpoint: Annotated[
        Path,
        typer.Argument(help="Folder that a training with FSDP or DeepSpeed saved in between."),
    ],
    dst: Destination,
    config: Annotated[
        Path | None,
        typer.Option(help="An adapter_config.json, or its folder; by default the checkpoint's."),
    ] = None,
    base_config: BaseConfig = None,
    adapter_name: Annotated[
        str | None, typer.Option(help="Which adapter, if the checkpoint holds several.")
    ] = None,
    force: Force = False,
    progress: OnStep = None,
) -> Answer:
    """Write the adapter of a sharded checkpoint as an adapter; needs one process and no GPU."""
    from ..convert.consolidate import consolidate_checkpoint

    done = consolidate_checkpoint(
        checkpoint,
        dst,
        config=config,
        base_config=base_config,
        adapter_name=adapter_name,
        force=force,
        progress=progress,
    )
    return _conversion(done)


def merge(
    adapter: Adapter,
    base: Annotated[Path, typer.Argument(help="Folder of the base model, with its safetensors.")],
    dst: Destination,
    b_layout: BLayout = "auto",
    force: Force = False,
    progress: OnStep = None,
) -> Answer:
    """Merge an adapter into its base model; writes a full checkpoint, shard by shard."""
    from ..convert.merge import merge_adapter

    done = merge_adapter(adapter, base, dst, b_layout=b_layout, force=force, progress=progress)
    return Answer(
        {
            "path": str(done.path),
            "merged": done.merged,
            "tensors": done.tensors,
            "dtypes": sorted(done.rounding.dtypes),
            "rounding": done.rounding.share,
            "notes": [str(done)],
        }
    )


def verify(
    path: Adapter,
    base: Annotated[str, typer.Argument(help=BASE_HELP)],
    other: Annotated[
        Path | None, typer.Argument(help="A second adapter that should hold the same update.")
    ] = None,
    b_layout: BLayout = "auto",
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative error that passes.")
    ] = None,
    seed: Annotated[
        int, typer.Option(hidden=True, help="No effect: every expert is compared.")
    ] = 0,
    progress: OnStep = None,
) -> Answer:
    """Check that an adapter fits its base model; compare every tensor with a second adapter's."""
    from ..convert.base import read_base
    from ..convert.verify import verify_adapter
    from ..files.text import shown

    found = verify_adapter(
        path,
        read_base(base),
        other,
        b_layout=b_layout,
        tolerance=tolerance,
        seed=seed,
        progress=progress,
    )
    difference = ""
    if not found.ok:
        difference = (
            f"{shown(found.where)} differs by {found.max_error:.2e}, relative to the update; the "
            f"tolerance is {found.tolerance:g}"
        )
    return Answer({**asdict(found), "ok": found.ok}, difference)


def _conversion(done: "Conversion") -> Answer:
    return Answer(
        {
            "path": str(done.path),
            "from": done.source,
            "to": done.to,
            "modules": done.modules,
            "experts": done.experts,
            "notes": done.notes,
        }
    )
