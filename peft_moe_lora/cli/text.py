"""What a command found, as JSON, as a table on a terminal, or as lines in a pipe."""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

# what is printed as text: characters of a line, and lines of a value
LONGEST_LINE = 2000
MOST_LINES = 100


def print_found(found: Mapping[str, Any], as_json: bool) -> None:
    """Print a mapping of names to values on stdout."""
    if as_json:
        print(json.dumps(found))
    # rich takes a pipe for a terminal where FORCE_COLOR is set, as in notebooks
    elif sys.stdout.isatty():
        Console().print(_table(found))
    else:
        # nothing is wrapped or padded where a program reads
        width = max(len(name) for name in found)
        for label, line in _rows(found):
            print(f"{label:<{width}}  {line}")


def _table(found: Mapping[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, line in _rows(found):
        # a Text is printed as it stands: brackets of a name are no markup
        table.add_row(Text(label), Text(line))
    return table


def _rows(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, printable line) of each line; only a value's first line has its name."""
    from ..files.text import shown

    for name, value in found.items():
        label = name
        for line in _lines(value):
            yield label, shown(line, LONGEST_LINE)
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
