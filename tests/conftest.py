"""What holds in every test: no network, one seed, and no luck with memory that nobody wrote."""

import gc
import os
import re

# before transformers is imported: nothing here may ask the hub for anything
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

# DeepSpeed warns where it has to find out that there is no accelerator, also in examples that never
# use it: accelerate imports it wherever it is installed
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# tests of these files take up to 45 s each: whole models under torch.compile, fp64 twins
LONG_ON_A_GPU = {
    "test_act_backward_outer.py",
    "test_beside_experts.py",
    "test_convergence.py",
    "test_shrink_outer.py",
    "test_training_modes.py",
}

# a set of several texts, or an address: another text in each process
CHANGING_ID = re.compile(r"\bset\(|\bfrozenset\(|\{['\"][^:}]*,| at 0x[0-9a-f]")


def pytest_collection_modifyitems(config, items):
    """Without a CUDA device the tests marked gpu are deselected, and counted as such.

    With one, the longest come first, so that the processes of `make gpu-test` end together.
    A test whose name another process would write in another way is an error: the processes of
    pytest-xdist must collect the same names.
    """
    changing = [item.nodeid for item in items if CHANGING_ID.search(item.name)]
    if changing:
        raise pytest.UsageError(f"names that differ from process to process: {changing}; give ids=")
    if torch.cuda.is_available():
        items.sort(key=lambda item: item.path.name not in LONG_ON_A_GPU)
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nothing_left_of_other_tests(request):
    """A GPU test starts without the garbage of earlier tests.

    Garbage that is collected while a test measures memory would make it seem to need less.
    """
    if request.node.get_closest_marker("gpu"):
        gc.collect()


@pytest.fixture
def poisoned_memory():
    """`torch.empty` gives NaN, so that a row that is read before it is written always shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches(monkeypatch):
    """The launches of kernels, recorded without a GPU: a `helpers.launches.Launches`."""
    # here, because Triton must not be imported before tests/ops chooses the interpreter
    from helpers.launches import record_launches

    return record_launches(monkeypatch)
