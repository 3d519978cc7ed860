"""Under DDP and FSDP2, two processes with PEFT's adapters have the gradients of one."""

import pytest

from helpers import assert_close, token_ids
from interop.models import pairs, peft_model
from interop.several_processes import SCENARIOS, loss_of
from parallel import processes

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return processes.run("interop.several_processes", tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("engine", SCENARIOS)
def test_two_processes_have_the_gradients_of_one(engine, results):
    model = peft_model().train()
    # PEFT's own code, on both rows
    loss_of(model, token_ids()).backward()
    for found in results[engine]:
        assert not isinstance(found, str), found
        # one call for each of the two layers
        assert found["calls"] == 2
        for parameter, gradient in zip(pairs(model), found["gradients"], strict=True):
            assert_close(gradient, parameter.grad, 1e-5)
