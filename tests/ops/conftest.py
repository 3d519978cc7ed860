"""Without a CUDA device the kernels run in Triton's interpreter.

It is switched on before Triton is imported, for the whole process. So these tests run in a pytest
call of their own.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
TOGETHER = """tests/ops and other tests were selected together.
Without a CUDA device tests/ops switch Triton's interpreter on for the whole process.
Run two calls: `pytest --ignore tests/ops` and `pytest tests/ops`. `make test` does both."""


def pytest_configure(config):
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items):
    """With a CUDA device the tests here are marked gpu, but for those that compile kernels alone.

    Compiling needs no device, so `make test` runs those, on a machine with a GPU too.
    """
    if not torch.cuda.is_available():
        return
    for item in items:
        if HERE in item.path.parents and item.path.name != "test_table.py":
            item.add_marker("gpu")


def _with_others(session):
    """Whether other tests are selected too: the interpreter would be on for them as well."""
    here = [HERE in item.path.parents for item in session.items]
    return not torch.cuda.is_available() and any(here) and not all(here)


def pytest_collection_finish(session):
    # an error in a worker of xdist would not be shown; there the fixture below shows it
    if session.config.option.collectonly or hasattr(session.config, "workerinput"):
        return
    if _with_others(session):
        raise pytest.UsageError(TOGETHER)


@pytest.fixture(autouse=True, scope="session")
def _in_a_call_of_their_own(request):
    if _with_others(request.session):
        pytest.fail(TOGETHER, pytrace=False)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Every new buffer is full of NaN, or of large numbers if it holds ints."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        if out.is_floating_point():
            return out.fill_(float("nan"))
        return out.fill_(min(2**30, torch.iinfo(out.dtype).max))

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(autouse=True)
def _plain_products_in_the_twins(monkeypatch):
    """The twins run one product per expert, on a GPU too.

    `F.grouped_mm` refuses ranks that are not a multiple of 8.
    """
    monkeypatch.setattr("peft_moe_lora.ops.grouped._grouped_mm_runs", lambda x, weight: False)


@pytest.fixture(autouse=True)
def _a_key_decides_what_is_launched(monkeypatch):
    """Two launches with the same key ask for the same kernel, arguments and constants.

    On a GPU the key finds what an earlier launch compiled. The interpreter compiles nothing and
    asks at every launch, so the answers can be compared here.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from peft_moe_lora.ops.kernels.launching import launch

    plain = launch.launch

    def asked_again(key, kernel, grid, tensors, arguments, *others):
        operands, numbers, constants = arguments()
        answer = kernel, _without_tensors(operands), numbers, dict(constants)
        assert _ANSWERS.setdefault(key, answer) == answer, f"launches of {key} differ"
        return plain(key, kernel, grid, tensors, lambda: (operands, numbers, constants), *others)

    for name, module in list(sys.modules.items()):
        of_kernels = name.startswith("peft_moe_lora.ops.kernels.") and module is not launch
        if of_kernels and getattr(module, "launch", None) is plain:
            monkeypatch.setattr(module, "launch", asked_again)


_ANSWERS = {}


def _without_tensors(operand):
    """The operand, which may be a tuple of operands, with a word in the place of each tensor."""
    if isinstance(operand, tuple):
        return tuple(map(_without_tensors, operand))
    if isinstance(operand, torch.Tensor):
        return "a tensor"
    return operand


@pytest.fixture
def kernels():
    # imported here, after the interpreter is switched on
    from peft_moe_lora.ops import kernels

    return kernels


@pytest.fixture
def ran():
    """A function that says whether a kernel of this name was launched since the test began."""
    from peft_moe_lora.ops.kernels.launching import launch

    launch.forget()
    return lambda name: any(key[0] == name for key, _ in launch._plans)
