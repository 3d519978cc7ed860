"""Kernels in Gluon are imported where Triton has the Gluon that they are written in.

Elsewhere a log line says that they are missing.
"""

import ast
import logging
import sys
from pathlib import Path

import pytest

NAMES = ["linear_roles", "shrink_outer", "act_backward_outer"]

SHARED = [
    "act_backward_outer_quarter",
    "linear_roles_load",
    "linear_roles_store",
    "linear_roles_tile",
    "pieces",
    "pipeline",
    "sum_panels",
]


@pytest.fixture
def choice(kernels, monkeypatch):
    """The module that chooses, as before it imported anything."""
    from peft_moe_lora.ops.kernels.sm90 import in_gluon as choice

    for name in (*NAMES, *SHARED):
        monkeypatch.delitem(sys.modules, f"peft_moe_lora.ops.kernels.sm90.{name}", raising=False)
    choice.in_gluon.cache_clear()
    yield choice
    choice.in_gluon.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_this_triton_has_the_gluon_they_are_written_in(choice, caplog, name):
    assert choice.in_gluon(name).__name__ == name
    assert not caplog.records


@pytest.mark.parametrize("name", NAMES)
def test_without_that_gluon_one_line_says_so(choice, monkeypatch, caplog, name):
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon.language.nvidia.hopper", None)
    with caplog.at_level(logging.WARNING, logger=choice.__name__):
        assert choice.in_gluon(name) is None
        assert choice.in_gluon(name) is None
    (record,) = caplog.records
    assert f"without {name}" in record.getMessage()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_gluon_lacks_is_named(choice, monkeypatch, caplog, name):
    from triton.experimental.gluon.language.nvidia.hopper import mbarrier

    monkeypatch.delattr(mbarrier, "expect")
    with caplog.at_level(logging.WARNING, logger=choice.__name__):
        assert choice.in_gluon(name) is None
    assert "hopper.mbarrier has no expect" in caplog.text


def test_a_parameter_that_gluon_lacks_is_named(choice, monkeypatch, caplog):
    from triton.experimental.gluon import language

    # as in Triton 3.5
    monkeypatch.setattr(language, "warp_specialize", lambda default_args, default_partition: None)
    with caplog.at_level(logging.WARNING, logger=choice.__name__):
        assert choice.in_gluon("linear_roles") is None
    assert "language.warp_specialize has no functions_and_args" in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_of_ours_is_raised(choice, monkeypatch, name):
    from peft_moe_lora.ops.kernels.launching import launch

    monkeypatch.delattr(launch, "facts")
    with pytest.raises(ImportError, match="facts"):
        choice.in_gluon(name)
    with pytest.raises(ImportError, match="no_such_file"):
        choice.in_gluon("no_such_file")
    with pytest.raises(AttributeError, match="pieces"):
        choice.in_gluon("pieces")


def names_of_gluon(path):
    """{(module, name)} of Gluon that a file imports or reads from a module it imported."""
    modules, names = {}, set()
    nodes = list(ast.walk(ast.parse(path.read_text())))
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("triton.experiment"):
            for alias in node.names:
                names.add((node.module, alias.name))
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in modules:
                names.add((modules[node.value.id], node.attr))
    return names


def test_all_that_the_kernels_use_of_gluon_is_asked_for(choice):
    used = set().union(*map(names_of_gluon, Path(choice.__file__).parent.glob("*.py")))
    # modules themselves are checked by importing them
    used = {(module, name) for module, name in used if f"{module}.{name}" not in choice.NEEDED}
    needed = {
        (module, spelling)
        for module, names in choice.NEEDED.items()
        for name in names.split()
        for spelling in name.split("|")
        if f"{module}.{spelling}" not in choice.NEEDED
    }
    assert needed == used
