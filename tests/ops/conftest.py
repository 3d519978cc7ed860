"""Without a CUDA device the kernels run in Triton's interpreter, asked for before Triton is imported."""

import os

import pytest
import torch


def pytest_configure(config):
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config, items):
    """Tests marked gpu are deselected, and counted as such, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Every float buffer a kernel is given to write comes full of NaN, every int buffer full of wild numbers."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else min(2**30, torch.iinfo(out.dtype).max))

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def _plain_products_in_the_twins(monkeypatch):
    """One product per expert in the twins on a GPU too: `F.grouped_mm` refuses ranks that are no multiple of 8."""
    monkeypatch.setattr("peft_moe_lora.ops.grouped._grouped_mm_runs", lambda x, weight: False)


@pytest.fixture
def ran():
    """Says whether a compiled kernel was launched under this name since the test began."""
    from peft_moe_lora.ops.kernels import launch

    launch.forget()
    return lambda name: any(key[0] == name for key, _ in launch._plans)
