"""The table of readers in docs/serving.md, made from `verdicts.py`.

python tests/readers/readers_table.py
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from readers.verdicts import IGNORED, MISREAD_MIXED, MIXED, READERS, Reader

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
BEGIN, END = "<!-- made by tests/readers/readers_table.py -->\n", "<!-- end -->\n"

_WORDS = {
    MIXED: "exact with the flag",
    IGNORED: "ignored without an error",
    MISREAD_MIXED: "misread with the flag",
}


def tables() -> str:
    """Every reader's table as Markdown, below a line with its release."""
    return "".join(line + "\n" for reader in READERS for line in _lines(reader))


def _lines(reader: Reader) -> Iterator[str]:
    formats = list(dict.fromkeys(to for row in reader.rows.values() for to in row.formats))
    columns = ["architecture", *(f"`{to}`" for to in formats), "attention", "routers"]
    release = f"{reader.name} {reader.version}"
    if reader.package != reader.name.lower():
        release = f"{reader.name}, with {reader.package} {reader.version}"
    yield f"{release}, {reader.date}:"
    yield ""
    yield _line(columns)
    yield _line(["---"] * len(columns))
    for architecture, row in reader.rows.items():
        cells = [_cell(row.formats.get(to, "")) for to in formats]
        yield _line([f"`{architecture}`", *cells, _cell(row.attention), _cell(row.router)])
    yield ""


def _cell(verdict: str) -> str:
    if verdict.startswith("refused: "):
        return f"refused (`{verdict.removeprefix('refused: ')}`)"
    return _WORDS.get(verdict, verdict)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def written() -> str:
    """The tables in docs/serving.md."""
    text = DOCS.read_text("utf-8")
    match = re.search(f"{re.escape(BEGIN)}(.*?){re.escape(END)}", text, re.DOTALL)
    assert match, f"{DOCS} has no lines {BEGIN!r} and {END!r}"
    return match[1]


if __name__ == "__main__":
    old = f"{BEGIN}{written()}{END}"
    new = f"{BEGIN}{tables()}{END}"
    DOCS.write_text(DOCS.read_text("utf-8").replace(old, new), "utf-8")
