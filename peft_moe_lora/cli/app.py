"""The commands of `peft-moe-lora`, in the order of its help."""

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from .adapters import consolidate, convert, inspect, merge, verify
from .answers import answers
from .environment import env
from .planning import plan
from .run import run

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="LoRA adapters on the experts of Mixture-of-Experts models: plan a training; inspect, "
    "convert, consolidate, merge and verify adapters; run a program on these kernels.",
)

app.command()(answers(env))
app.command()(answers(plan))
app.command()(answers(inspect))
app.command()(answers(convert, progress="converting"))
app.command()(answers(consolidate, progress="consolidating"))
app.command()(answers(merge, progress="merging"))
app.command()(answers(verify, progress="verifying"))
app.command()(run)


def main() -> None:
    """Run the command line, as `peft-moe-lora` however it was started."""
    app(prog_name="peft-moe-lora")


def _print_version(asked: bool) -> None:
    if asked:
        print(_version())
        raise typer.Exit


def _version() -> str:
    """That of the installed package, which is there at once; else of a checkout that is not."""
    try:
        return version("peft-moe-lora")
    except PackageNotFoundError:
        from .. import __version__

        return __version__


@app.callback()
def _options(
    _asked: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """The options before a command's name."""
