"""docs/troubleshooting.md quotes messages that the package has, each with its remedy."""

import ast
import re
from pathlib import Path

import pytest

import peft_moe_lora
from docs.messages import DOTS, PAGE, QUOTED, is_quoted_from

PACKAGE = Path(peft_moe_lora.__file__).parent
ENTRY = re.compile(r"^- `(.+)`\n    - Cause: .+\n    - Remedy: .+$", re.MULTILINE)

# a value in a message: in a format string of logging, and below
FORMAT = re.compile(r"%(?:[sdr]|\.\df)")
VALUE = "\0"


def text_of(node):
    """The text of a string in the source, with VALUE for each value; None for no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return FORMAT.sub(VALUE, node.value).replace("%%", "%")
    if isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else VALUE for part in node.values]
        return "".join(parts)
    return None


def texts_of_the_source():
    """Every string of the package, one line each."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found.update((text_of(node) or "").splitlines())
    return found


TEXTS = texts_of_the_source()


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_in_the_source(message):
    assert len(message.replace(DOTS, "").strip()) > 15, "it would be found anywhere"
    assert any(is_quoted_from(message, text) for text in TEXTS)


def test_every_message_has_a_cause_and_a_remedy():
    assert ENTRY.findall(PAGE) == QUOTED
    assert len(set(QUOTED)) == len(QUOTED) >= 25


def test_dots_stand_for_values():
    text = "top=\0 must be at most \0, the experts"
    assert is_quoted_from("top=... must be at most ..., the experts", text)
    assert is_quoted_from("must be at most ...", text)
    assert not is_quoted_from("top=... must be at least ...", text)
    assert not is_quoted_from("the experts ... must be at most", text)
