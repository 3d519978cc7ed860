"""A function that finds something, as a command that prints it."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .errors import DIFFERENT, exit_codes, print_error
from .options import AsJson, Quiet
from .own_lines import own_lines
from .text import print_found

# called with steps done and steps in total; None where no bar is shown
OnStep = Callable[[int, int], None] | None


@dataclass(frozen=True)
class Answer:
    """What a command found.

    Attributes:
        found: names and values, as JSON holds them.
        difference: what a check found to be wrong; empty if nothing is.
    """

    found: Mapping[str, Any]
    difference: str = ""


def answers(find: Callable[..., Answer], progress: str = "") -> Callable[..., None]:
    """A command with the parameters of a function, which prints what the function returns.

    Every command gets `--json` and the exit codes of the command line. One with a progress bar gets
    `--quiet`, and its function is given `progress`, an `OnStep`.

    Args:
        find: its parameters, `progress` aside, are the arguments and options of the command.
        progress: the word before the bar; empty for a command without one.
    """

    @wraps(find)
    def command(as_json: bool, quiet: bool = True, **given: Any) -> None:
        with own_lines(), exit_codes(), _bar(progress, quiet) as on_step:
            if progress:
                given["progress"] = on_step
            answer = find(**given)
        print_found(answer.found, as_json)
        if answer.difference:
            print_error(answer.difference)
            raise typer.Exit(DIFFERENT)

    own = [p for p in signature(find).parameters.values() if p.name != "progress"]
    if progress:
        own.append(_flag("quiet", Quiet))
    own.append(_flag("as_json", AsJson))
    # typer reads a command's parameters from here
    command.__signature__ = signature(find).replace(parameters=own)  # type: ignore[attr-defined]
    return command


def _flag(name: str, annotation: object) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=False, annotation=annotation)


@contextmanager
def _bar(what: str, quiet: bool) -> Iterator[OnStep]:
    """A progress bar on stderr, if that is a terminal.

    Args:
        what: the word before the bar.
        quiet: whether to show no bar.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)

        def on_step(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield on_step
