"""Models that DeepSpeed's ZeRO-2 and ZeRO-3 train in two processes give the numbers of one process.

`parallel.zero` is not imported here: it imports DeepSpeed, which takes seconds in every worker.
"""

import pytest

from helpers import assert_close
from parallel.fully_sharded import FAMILIES
from parallel.processes import run

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run("parallel.zero", tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def long_results(tmp_path_factory):
    return run("parallel.zero_long", tmp_path_factory.mktemp("zero_long"))


def assert_trained(outcomes):
    for outcome in outcomes:
        assert isinstance(outcome, dict), outcome
        for what, expected in outcome["expected"].items():
            if what in ("losses", "norms"):
                assert_close(outcome["found"][what], expected, TOLERANCE, what)
                continue
            for name, tensor in expected.items():
                assert tensor.abs().max() > 0, name
                assert_close(outcome["found"][what][name], tensor, TOLERANCE, f"{what} {name}")
        for what in ("loaded", "evaluated"):
            assert_close(*outcome[what], TOLERANCE, what)


@pytest.mark.engine("DeepSpeed ZeRO-2", "attach first", "exact")
@pytest.mark.engine("DeepSpeed ZeRO-2", "train", "exact")
@pytest.mark.engine("DeepSpeed ZeRO-2", "save", "exact")
def test_zero_2_trains_as_one_process(results):
    assert_trained(results["qwen3_moe ZeRO-2"])


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES[1:])
def test_zero_2_trains_every_family_as_one_process(family, long_results):
    assert_trained(long_results[f"{family} ZeRO-2"])
