"""`peft-moe-lora`: env, inspect, convert, consolidate, merge, verify.

Exit codes:
    0  done
    1  verify found a difference
    2  wrong usage
    3  an adapter or checkpoint is damaged, unknown, or made for another model
    4  refused: the target program would not read the result, or the adapter is ambiguous
    5  the destination exists

Results go to stdout. An error goes to stderr, as one line that begins with "error:".
"""

import json
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import torch

from . import __version__
from .convert.base import read_base
from .convert.consolidate import consolidate_checkpoint
from .convert.convert import Conversion, convert_adapter
from .convert.formats import B_LAYOUTS, DEFAULT_FORMAT, FORMATS
from .convert.inspect import inspect_adapter
from .convert.merge import merge_adapter
from .convert.verify import verify_adapter
from .files.tensor_file import ExistsError, RefusedError
from .files.text import shown
from .functional import select_backend

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ImportError as error:
    raise SystemExit(
        f"error: the command line needs typer and rich ({error}): pip install 'peft-moe-lora[cli]'"
    ) from error

DIFFERENT = 1
BAD = 3
REFUSED = 4
EXISTS = 5

# what is printed as text: characters of a line, and lines of a value
LONGEST_LINE = 2000
MOST_LINES = 100

# packages whose versions `env` prints
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "safetensors")

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="LoRA adapters on the experts of Mixture-of-Experts models: inspect, convert, "
    "consolidate, merge and verify them.",
)

BASE_HELP = "The base model: a folder with a config.json, or a name on the hub."
Adapter = Annotated[Path, typer.Argument(help="Folder of an adapter, in any format.")]
BaseConfig = Annotated[str | None, typer.Option(help=BASE_HELP)]
BLayout = Annotated[
    str, typer.Option(help=f"Order of lora_B under PEFT's keys: {', '.join(B_LAYOUTS)}.")
]
Destination = Annotated[Path, typer.Argument(help="Folder to write.")]
Force = Annotated[
    bool, typer.Option("--force", help="Replace the destination if it is an earlier output.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


@app.command()
def env(as_json: AsJson = False) -> None:
    """Print the versions, the GPU and the backend in use, for bug reports."""
    found: dict[str, str | None] = {
        "peft_moe_lora": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    for name in PACKAGES:
        found[name] = _version(name)
    found |= {"cuda": None, "gpu": None}
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda")
        major, minor = torch.cuda.get_device_capability()
        gpus = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
        found["cuda"] = torch.version.cuda
        found["gpu"] = f"{gpus}, capability {major}.{minor}"
    found["backend"] = select_backend("auto", device)
    _print(found, as_json)


@app.command()
def inspect(
    path: Adapter,
    base_config: BaseConfig = None,
    b_layout: BLayout = "auto",
    as_json: AsJson = False,
) -> None:
    """Print what an adapter holds and which formats it can be converted to; reads headers only."""
    with _exit_codes():
        found = asdict(inspect_adapter(path, base_config, b_layout))
    found["path"] = str(found["path"])
    _print(found, as_json)


@app.command()
def convert(
    src: Adapter,
    dst: Destination,
    to: Annotated[
        str, typer.Option(help=f"Format to write: {', '.join(FORMATS)}.")
    ] = DEFAULT_FORMAT,
    base_config: BaseConfig = None,
    b_layout: BLayout = "auto",
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in another format; PEFT and most servers read the default format."""
    with _exit_codes(), _bar("converting", quiet) as progress:
        done = convert_adapter(
            src,
            dst,
            to=to,
            base_config=base_config,
            b_layout=b_layout,
            force=force,
            progress=progress,
        )
    _print_conversion(done, as_json)


@app.command()
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
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write the adapter of a sharded checkpoint as an adapter; needs one process and no GPU."""
    with _exit_codes(), _bar("consolidating", quiet) as progress:
        done = consolidate_checkpoint(
            checkpoint,
            dst,
            config=config,
            base_config=base_config,
            adapter_name=adapter_name,
            force=force,
            progress=progress,
        )
    _print_conversion(done, as_json)


@app.command()
def merge(
    adapter: Adapter,
    base: Annotated[Path, typer.Argument(help="Folder of the base model, with its safetensors.")],
    dst: Destination,
    b_layout: BLayout = "auto",
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base model; writes a full checkpoint, shard by shard."""
    with _exit_codes(), _bar("merging", quiet) as progress:
        done = merge_adapter(adapter, base, dst, b_layout=b_layout, force=force, progress=progress)
    _print(
        {
            "path": str(done.path),
            "merged": done.merged,
            "tensors": done.tensors,
            "dtypes": sorted(done.rounding.dtypes),
            "rounding": done.rounding.share,
            "notes": [str(done)],
        },
        as_json,
    )


@app.command()
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
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Check that an adapter fits its base model; compare every tensor with a second adapter's."""
    with _exit_codes(), _bar("verifying", quiet) as progress:
        found = verify_adapter(
            path,
            read_base(base),
            other,
            b_layout=b_layout,
            tolerance=tolerance,
            seed=seed,
            progress=progress,
        )
    _print({**asdict(found), "ok": found.ok}, as_json)
    if not found.ok:
        _print_error(
            f"{shown(found.where)} differs by {found.max_error:.2e}, relative to the update; the "
            f"tolerance is {found.tolerance:g}"
        )
        raise typer.Exit(DIFFERENT)


def _print_conversion(done: Conversion, as_json: bool) -> None:
    _print(
        {
            "path": str(done.path),
            "from": done.source,
            "to": done.to,
            "modules": done.modules,
            "experts": done.experts,
            "notes": done.notes,
        },
        as_json,
    )


def _version(name: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn errors of the package into one line on stderr and an exit code."""
    try:
        yield
    except (ValueError, OSError) as error:
        _print_error(error)
        raise typer.Exit(_exit_code(error)) from None


def _print_error(error: Exception | str) -> None:
    """One line on stderr; text of files in it can neither control the terminal nor fill it."""
    # messages of libraries have several lines
    message = " ".join(line.strip() for line in str(error).splitlines())
    print(f"error: {shown(message, LONGEST_LINE)}", file=sys.stderr)


def _exit_code(error: Exception) -> int:
    if isinstance(error, ExistsError):
        return EXISTS
    if isinstance(error, RefusedError):
        return REFUSED
    return BAD


@contextmanager
def _bar(what: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr, if that is a terminal.

    Args:
        what: the word before the bar.
        quiet: whether to show no bar.
    Yields: a function that takes (steps done, steps in total); None if no bar is shown.
    """
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield progress


def _print(found: Mapping[str, Any], as_json: bool) -> None:
    """Print a mapping as JSON, or as two columns of plain text."""
    if as_json:
        print(json.dumps(found))
        return
    width = max(len(name) for name in found)
    for name, value in found.items():
        # only the first line begins with the name
        label = name
        for line in _lines(value):
            print(f"{label:<{width}}  {shown(line, LONGEST_LINE)}")
            label = ""


def _lines(value: object) -> list[str]:
    """The lines of text that show a value; "-" if the value is empty."""
    lines = [str(value)]
    if isinstance(value, dict):
        lines = [f"{name}: {entry}" for name, entry in value.items()]
    elif isinstance(value, list | tuple):
        lines = [str(entry) for entry in value]
    elif value is None:
        lines = []
    if len(lines) > MOST_LINES:
        further = len(lines) - MOST_LINES
        lines = [*lines[:MOST_LINES], f"and {further} more (--json prints all)"]
    return lines or ["-"]


if __name__ == "__main__":
    app()
