"""Frozen experts that processes share are computed by name as one process computes them."""

from dataclasses import fields

import pytest
from transformers.distributed import DistributedConfig

from helpers import assert_close
from parallel.processes import run

if "ep_size" not in {field.name for field in fields(DistributedConfig)}:
    pytest.skip("this release of transformers has no meshes", allow_module_level=True)

from parallel.by_name import SCENARIOS

# the sum of two processes is rounded otherwise
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run("parallel.by_name", tmp_path_factory.mktemp("by_name"))


@pytest.mark.long
@pytest.mark.parametrize("name", SCENARIOS)
def test_frozen_experts_give_the_numbers_of_one_process(name, results):
    for outcome in results[name]:
        assert isinstance(outcome, dict), outcome
        assert outcome.pop("calls") > 0
        for what, pair in outcome.items():
            assert pair[1].abs().max() > 0
            assert_close(*pair, TOLERANCE, what)
