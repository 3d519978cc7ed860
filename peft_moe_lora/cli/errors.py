"""Errors of the package as one line on stderr and an exit code."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from .text import LONGEST_LINE

DIFFERENT = 1
BAD = 3
REFUSED = 4
EXISTS = 5


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn an error of the package into one line on stderr and an exit code."""
    try:
        yield
    except (ValueError, OSError) as error:
        print_error(error)
        raise typer.Exit(_exit_code(error)) from None


def print_error(error: Exception | str) -> None:
    """One line on stderr; text of files in it can neither control the terminal nor fill it."""
    from ..files.text import shown

    # messages of libraries have several lines
    message = " ".join(line.strip() for line in str(error).splitlines())
    print(f"error: {shown(message, LONGEST_LINE)}", file=sys.stderr)


def _exit_code(error: Exception) -> int:
    from ..files.tensor_file import ExistsError, RefusedError

    if isinstance(error, ExistsError):
        return EXISTS
    if isinstance(error, RefusedError):
        return REFUSED
    return BAD
