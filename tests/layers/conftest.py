"""Counts linear layers that PEFT computes, and experts that are computed without an adapter."""

import pytest
from peft.tuners import lora

from peft_moe_lora.layers import frozen


@pytest.fixture
def by_peft(monkeypatch):
    """Layers whose call PEFT's own forward computed, in order."""
    calls = []
    own = lora.Linear.forward

    def forward(layer, *args, **kwargs):
        calls.append(layer)
        return own(layer, *args, **kwargs)

    monkeypatch.setattr(lora.Linear, "forward", forward)
    return calls


@pytest.fixture
def frozen_calls(monkeypatch):
    """The experts modules that were computed without an adapter, in order."""
    calls = []
    compute = frozen.own.compute

    def counted(module, layout, rows, up, down, **options):
        if up.lora_A is None and down.lora_A is None:
            calls.append(module)
        return compute(module, layout, rows, up, down, **options)

    monkeypatch.setattr(frozen.own, "compute", counted)
    return calls
