"""What the package knows of a format is in the format's own file; no other file compares names."""

import ast
from pathlib import Path

import pytest

import peft_moe_lora
from convert.adapters import UPDATE_READERS
from peft_moe_lora.convert.formats import DEFAULT_FORMAT, FORMATS, READERS

PACKAGE = Path(peft_moe_lora.__file__).parent
OTHERS = [
    path
    for folder in ("convert", "files", "cli")
    for path in sorted((PACKAGE / folder).rglob("*.py"))
    if path.parent.name != "formats"
]


def names_decided_by(node):
    """The strings that a comparison or the keys of a table hold."""
    parts = []
    if isinstance(node, ast.Compare):
        parts = [node.left, *node.comparators]
    elif isinstance(node, ast.Dict):
        parts = [key for key in node.keys if key is not None]
    return {
        leaf.value for part in parts for leaf in ast.walk(part) if isinstance(leaf, ast.Constant)
    }


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_other_file_decides_by_a_formats_name(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    decided = [set(FORMATS) & names_decided_by(node) for node in ast.walk(tree)]
    assert not any(decided)


def test_a_decision_by_name_would_be_found():
    tree = ast.parse('if to in ("peft", "vllm_3d"):\n    texts = {"moe_lora": 1}')
    found = set().union(*(names_decided_by(node) for node in ast.walk(tree)))
    assert found == {"peft", "vllm_3d", "moe_lora"}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_says_all_that_is_asked_of_it(name):
    form = FORMATS[name]
    assert form.name == name
    assert form.key.groupindex.keys() >= {"path", "side", "slot"}
    assert form.card.layout
    assert form.card.loading


def test_every_format_has_a_file_of_its_own():
    files = [type(form).__module__ for form in FORMATS.values()]
    assert len(set(files)) == len(files)


def test_tests_have_a_reader_of_every_format_but_ours():
    assert set(UPDATE_READERS) == set(FORMATS) - {"moe_lora"}


def test_every_reader_is_a_format_and_the_default_is_one():
    assert set(READERS) <= set(FORMATS.values())
    assert DEFAULT_FORMAT in FORMATS
