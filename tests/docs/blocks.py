"""README.md and the guides: their blocks of code, their sentences, and running the former."""

import re
import shlex
from pathlib import Path
from typing import Any

from helpers.scripts import ROOT

README = ROOT / "README.md"
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = [README, *GUIDES]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
UNITS = r"ms|us|s|GiB|MiB|GB|MB|TFLOP/s|TB/s|GB/s|times|M|x|%"
QUANTITY = re.compile(rf"(\d[\d,.]*(?: to \d[\d,.]*)? (?:{UNITS}))(?![\w/])(?! \d)")


def blocks(path: Path, language: str) -> list[str]:
    """The blocks of a language on a page, in order."""
    return [code for said, code in FENCE.findall(path.read_text("utf-8")) if said == language]


def languages(path: Path) -> set[str]:
    """The languages of all blocks on a page."""
    return {said for said, _ in FENCE.findall(path.read_text("utf-8"))}


def sentences(path: Path) -> list[str]:
    """The lines of a page without blocks of code, tables and what is between back-ticks."""
    text = FENCE.sub("", path.read_text("utf-8"))
    lines = [line for line in text.splitlines() if not line.startswith(("|", "    "))]
    return [re.sub(r"`[^`]*`", "", line) for line in lines]


def quantities(line: str) -> list[str]:
    """The numbers with a unit in a line: "2.76 ms", "7 to 12 s"."""
    return QUANTITY.findall(line)


def commands(path: Path) -> list[list[str]]:
    """The words of each command on a page; in the README they are indented lines."""
    lines = [line for block in blocks(path, "sh") for line in block.splitlines()]
    if path == README:
        text = FENCE.sub("", path.read_text("utf-8"))
        lines += re.findall(r"^    ([a-z][a-z-]+ .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def run(code: str, path: Path, names: dict[str, Any]) -> dict[str, Any]:
    """The names that a block of Python leaves behind."""
    exec(compile(code, str(path), "exec"), names)
    return names
