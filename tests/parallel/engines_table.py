"""The table of engines in docs/scale.md, made from the marks of the tests.

    python tests/parallel/engines_table.py

A test says with `@pytest.mark.engine(engine, operation, verdict)` what it proves.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parents[1]
DOCS = Path(__file__).parents[2] / "docs" / "scale.md"
BEGIN, END = "<!-- made by tests/parallel/engines_table.py -->\n", "<!-- end -->\n"

ENGINES = (
    "DDP",
    "nn.DataParallel",
    "FSDP2",
    "FSDP2 with CPU offload",
    "HSDP",
    "Expert parallelism, all_reduce",
    "Expert parallelism, all_to_all",
    "Expert parallelism over FSDP2",
    "Tensor parallelism",
    "DeepSpeed ZeRO-2",
    "DeepSpeed ZeRO-3",
    "Trainer with FSDP2",
    "Trainer with DeepSpeed ZeRO-2",
    "Trainer with DeepSpeed ZeRO-3",
    "FSDP1",
)
OPERATIONS = (
    "attach first",
    "attach afterwards",
    "train",
    "save",
    "load",
    "merge, unmerge",
    "resume",
    "statistics",
    "torch.compile",
    "quantized experts",
)
VERDICTS = ("exact", "works", "refused: ")


class Mark(NamedTuple):
    """What a test proves: on this engine, this operation comes out like that."""

    engine: str
    operation: str
    verdict: str


def marks() -> list[Mark]:
    """The marks of all tests, in the order of files and lines."""
    return [mark for path in sorted(TESTS.rglob("test_*.py")) for mark in _marks_of(path)]


def _marks_of(path: Path) -> list[Mark]:
    calls = [
        node
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.engine"
    ]
    calls.sort(key=lambda call: call.lineno)
    return [Mark(*map(ast.literal_eval, call.args)) for call in calls]


def table(found: list[Mark]) -> str:
    """The table as Markdown: a row for each engine, a column for each operation."""
    cells: dict[tuple[str, str], list[str]] = {}
    for mark in found:
        said = cells.setdefault((mark.engine, mark.operation), [])
        if mark.verdict not in said:
            said.append(mark.verdict)
    lines = [_line(["engine", *OPERATIONS]), _line(["---"] * (1 + len(OPERATIONS)))]
    for engine in ENGINES:
        row = ["; ".join(cells.get((engine, operation), [])) for operation in OPERATIONS]
        if any(row):
            lines.append(_line([engine, *row]))
    return "".join(lines)


def _line(cells: list[str]) -> str:
    # an empty cell has one space
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells) + "\n"


def written() -> str:
    """The table in docs/scale.md."""
    text = DOCS.read_text("utf-8")
    match = re.search(f"{re.escape(BEGIN)}(.*?){re.escape(END)}", text, re.DOTALL)
    assert match, f"{DOCS} has no lines {BEGIN!r} and {END!r}"
    return match[1]


if __name__ == "__main__":
    old, new = (f"{BEGIN}{text}{END}" for text in (written(), table(marks())))
    DOCS.write_text(DOCS.read_text("utf-8").replace(old, new), "utf-8")
