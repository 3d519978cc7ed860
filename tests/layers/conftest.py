"""Counts the linear layers that PEFT's own forward computes."""

import pytest
from peft.tuners import lora


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
