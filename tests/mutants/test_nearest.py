"""The table of nearest tests names tests and modules that are there, and leaves no module out."""

from pathlib import Path

import pytest

import peft_moe_lora
from mutants.nearest import NEAREST, nearest_to

TESTS = Path(__file__).parents[1]
PACKAGE = Path(peft_moe_lora.__file__).parent
# a break of a kernel needs a GPU; the files at the top are doors
MODULES = [
    path.relative_to(PACKAGE) for path in PACKAGE.rglob("*/*.py") if "kernels" not in path.parts
]


@pytest.mark.parametrize("row", NEAREST)
def test_a_row_names_what_is_there(row):
    assert (PACKAGE / row).exists()
    for name in NEAREST[row]:
        path, _, test = name.partition("::")
        assert (TESTS / path).exists()
        if test:
            assert f"def {test}(" in (TESTS / path).read_text(encoding="utf-8")


def test_every_module_has_tests():
    assert MODULES
    for module in MODULES:
        assert nearest_to(module)
