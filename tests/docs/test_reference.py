"""The reference leaves nothing out: every parameter and every field has its line."""

import dataclasses
import inspect
import re
from importlib import import_module

import pytest

from site_pages import ROOT

API = ROOT / "docs" / "site" / "api"


def shown():
    """Every object of the reference, by its path."""
    found = {}
    for page in API.glob("*.md"):
        for path in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE):
            module, _, name = path.rpartition(".")
            found[path] = getattr(import_module(module), name)
    return found


SHOWN = shown()
FUNCTIONS = [path for path, it in SHOWN.items() if inspect.isfunction(it)]
RECORDS = [
    path for path, it in SHOWN.items() if dataclasses.is_dataclass(it) or hasattr(it, "_fields")
]


def described(documented, sections):
    """Names that have a line in a section of a docstring."""
    text = inspect.getdoc(documented) or ""
    names = set()
    for section in re.findall(rf"^(?:{sections}):\n((?: .*\n?|\n)+)", text, re.MULTILINE):
        for line in re.findall(r"^ {4}(\w+(?:, \w+)*): ", section, re.MULTILINE):
            names.update(line.split(", "))
    return names


@pytest.mark.parametrize("path", FUNCTIONS)
def test_every_parameter_is_described(path):
    function = SHOWN[path]
    assert set(inspect.signature(function).parameters) == described(function, "Args")


@pytest.mark.parametrize("path", RECORDS)
def test_every_field_is_described(path):
    record = SHOWN[path]
    fields = {name for name in record.__annotations__ if not name.startswith("_")}
    assert fields <= described(record, "Attributes|Args")


@pytest.mark.parametrize("path", SHOWN)
def test_every_name_has_a_docstring(path):
    it = SHOWN[path]
    assert isinstance(it, tuple) or inspect.getdoc(it)


def test_a_missing_line_is_noticed():
    def function(a, b):
        """Nothing.

        Args:
            a: a number.
                b: a line of a.
        Returns: c: nothing.
        """

    assert described(function, "Args") == {"a"}
