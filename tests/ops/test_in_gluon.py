"""Kernels in Gluon: imported where Triton has the Gluon they are written in, done without, with a word, elsewhere."""

import logging
import sys

import pytest
from test_kernels import kernels  # noqa: F401

NAMES = ["linear_roles", "shrink_outer", "act_backward_outer"]


@pytest.fixture
def choice(kernels, monkeypatch):  # noqa: F811
    """The module that chooses, its imports undone."""
    from peft_moe_lora.ops.kernels.sm90 import in_gluon as choice

    for name in (*NAMES, "pieces", "rings"):
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
