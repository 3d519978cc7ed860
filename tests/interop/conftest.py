"""Counts the experts modules that this package computes, and leaves no test with PEFT changed."""

import pytest
from peft.tuners.lora.layer import ParamWrapper

from peft_moe_lora import apply_to_peft
from peft_moe_lora.interop import apply, wrappers


@pytest.fixture(autouse=True)
def _peft_as_it_was():
    own = ParamWrapper.forward
    apply.log_once.cache_clear()
    yield
    apply_to_peft().remove()
    assert ParamWrapper.forward is own


@pytest.fixture
def computed(monkeypatch):
    """The class name of each experts module that this package has computed, one for each call."""
    found = []
    compute = wrappers.ExpertsCall.compute

    def counted(call, module, *rows):
        found.append(type(module).__name__)
        return compute(call, module, *rows)

    monkeypatch.setattr(wrappers.ExpertsCall, "compute", counted)
    return found
