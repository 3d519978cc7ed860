"""`peft-moe-lora`: env, inspect, convert, merge, verify.

Exit codes: 0 done; 1 verify found a difference; 2 wrong usage; 3 an adapter or checkpoint that is damaged, unknown, or
for another model; 4 refused, because its reader would refuse it or it can be read in two ways; 5 the destination
exists. Messages go to stderr, one line that begins with "error:"; what was asked for goes to stdout.
"""

import json
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import torch

from . import __version__
from .convert.base import read_base
from .convert.convert import convert_adapter
from .convert.formats import B_LAYOUTS, DEFAULT, FORMATS
from .convert.inspect import inspect_adapter
from .convert.merge import merge_adapter
from .convert.verify import verify_adapter
from .files.tensor_file import ExistsError, RefusedError
from .functional import select_backend

try:
    import typer
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ImportError as error:
    raise SystemExit(
        f"error: the command line needs typer and rich ({error}): pip install 'peft-moe-lora[cli]'"
    ) from error

DIFFERENT, BAD, REFUSED, EXISTS = 1, 3, 4, 5

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    help="LoRA adapters on the experts of Mixture-of-Experts models: convert, verify, merge, and say what was done.",
)  # fmt: skip

Adapter = Annotated[Path, typer.Argument(help="Folder of an adapter, in any format.")]
BaseConfig = Annotated[
    str | None,
    typer.Option(help="The base model: a folder with a config.json, or a name on the hub."),
]
BLayout = Annotated[
    str, typer.Option(help=f"Order of lora_B under PEFT's keys: {', '.join(B_LAYOUTS)}.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what lies at the destination.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]


@app.command()
def env(as_json: AsJson = False) -> None:
    """Versions, GPU and the backend picked: what an issue report needs."""
    found = {
        "peft_moe_lora": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
    found |= {
        name: _version(name)
        for name in ("torch", "triton", "transformers", "peft", "accelerate", "safetensors")
    }
    cuda = torch.cuda.is_available()
    found["cuda"] = torch.version.cuda if cuda else None
    found["gpu"] = None
    if cuda:
        major, minor = torch.cuda.get_device_capability()
        found["gpu"] = (
            f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, capability {major}.{minor}"
        )
    found["backend"] = select_backend("auto", torch.device("cuda" if cuda else "cpu"))
    _print(found, as_json)


@app.command()
def inspect(
    path: Adapter,
    base_config: BaseConfig = None,
    b_layout: BLayout = "auto",
    as_json: AsJson = False,
) -> None:
    """What an adapter holds, and which formats it can be converted to. Reads headers only."""
    with _exit_codes():
        found = asdict(inspect_adapter(path, base_config, b_layout))
    _print({**found, "path": str(found["path"])}, as_json)


@app.command()
def convert(
    src: Adapter,
    dst: Annotated[Path, typer.Argument(help="Folder to write.")],
    to: Annotated[str, typer.Option(help=f"Format to write: {', '.join(FORMATS)}.")] = DEFAULT,
    base_config: BaseConfig = None,
    b_layout: BLayout = "auto",
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter in another format; per_expert, which most servers and PEFT read, by default."""
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
    what = {
        "path": str(done.path),
        "from": done.source,
        "to": done.to,
        "modules": done.modules,
        "experts": done.experts,
    }
    _print({**what, "notes": done.notes}, as_json)


@app.command()
def merge(
    adapter: Adapter,
    base: Annotated[Path, typer.Argument(help="Folder of the base model, with its safetensors.")],
    dst: Annotated[Path, typer.Argument(help="Folder to write.")],
    b_layout: BLayout = "auto",
    force: Force = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base model: a full checkpoint, written shard by shard."""
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
    base: Annotated[
        str,
        typer.Argument(help="The base model: a folder with a config.json, or a name on the hub."),
    ],
    other: Annotated[
        Path | None, typer.Argument(help="A second adapter that should be the same update.")
    ] = None,
    b_layout: BLayout = "auto",
    tolerance: Annotated[
        float | None, typer.Option(help="Largest relative error that passes.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which experts are drawn.")] = 0,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Hold an adapter against its base model, and the updates of random experts against those of a second adapter."""
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
        print(
            f"error: {found.where} differs by {found.max_error:.2e}, relative to the update",
            file=sys.stderr,
        )
        raise typer.Exit(DIFFERENT)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Errors of the package as one line on stderr and an exit code."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = (
            EXISTS
            if isinstance(error, ExistsError)
            else REFUSED
            if isinstance(error, RefusedError)
            else BAD
        )
        raise typer.Exit(code) from None


@contextmanager
def _bar(what: str, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress bar on stderr, where there is a terminal to see it."""
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
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _print(found: dict, as_json: bool) -> None:
    """A mapping as JSON, or as two columns that can be pasted anywhere."""
    if as_json:
        print(json.dumps(found))
        return
    width = max(len(name) for name in found)
    for name, value in found.items():
        for i, line in enumerate(_lines(value)):
            print(f"{'' if i else name:<{width}}  {line}")


def _lines(value) -> list[str]:
    if isinstance(value, dict):
        return [f"{name}: {entry}" for name, entry in value.items()] or ["-"]
    if isinstance(value, list | tuple):
        return [str(entry) for entry in value] or ["-"]
    return ["-" if value is None else str(value)]


if __name__ == "__main__":
    app()
