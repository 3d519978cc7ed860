"""Without a CUDA device the kernels run in Triton's interpreter, asked for before Triton is imported."""

import os
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


def pytest_configure(config):
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config, items):
    """With a CUDA device, all of these are tests of the GPU; without one, those marked gpu go."""
    if torch.cuda.is_available():
        for item in items:
            if FOLDER in item.path.parents:
                item.add_marker("gpu")
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
        return out.fill_(
            float("nan") if out.is_floating_point() else min(2**30, torch.iinfo(out.dtype).max)
        )

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def _plain_products_in_the_twins(monkeypatch):
    """One product per expert in the twins on a GPU too: `F.grouped_mm` refuses ranks that are no multiple of 8."""
    monkeypatch.setattr("peft_moe_lora.ops.grouped._grouped_mm_runs", lambda x, weight: False)


@pytest.fixture(autouse=True)
def _a_key_decides_what_is_launched(monkeypatch):
    """On a GPU a launch finds by its key what an earlier one compiled; the interpreter, which compiles nothing, asks
    every time, and so it is asked here whether the answer is the one that the key had before."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from peft_moe_lora.ops.kernels.launching import launch

    plain = launch.launch

    def asked_again(key, kernel, grid, tensors, rest, *others):
        fixed, constants = rest()
        answer = kernel, fixed, dict(constants)
        assert _ANSWERS.setdefault(key, answer) == answer, f"launches of {key} differ"
        return plain(key, kernel, grid, tensors, lambda: (fixed, constants), *others)

    for name, module in list(sys.modules.items()):
        of_kernels = name.startswith("peft_moe_lora.ops.kernels.") and module is not launch
        if of_kernels and getattr(module, "launch", None) is plain:
            monkeypatch.setattr(module, "launch", asked_again)


_ANSWERS = {}


@pytest.fixture
def ran():
    """Says whether a compiled kernel was launched under this name since the test began."""
    from peft_moe_lora.ops.kernels.launching import launch

    launch.forget()
    return lambda name: any(key[0] == name for key, _ in launch._plans)
