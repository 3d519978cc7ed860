"""An adapter that one engine saves gives the same logits on every other."""

from dataclasses import fields

import pytest
from transformers.distributed import DistributedConfig

from helpers import assert_close
from parallel.processes import run

if "ep_size" not in {field.name for field in fields(DistributedConfig)}:
    pytest.skip("this release of transformers has no ep_size", allow_module_level=True)

TOLERANCE = 1e-5
ENGINES = (
    "one process",
    "DDP",
    "FSDP2",
    "FSDP2, attached afterwards",
    "ZeRO-3",
    "expert parallelism",
    "expert parallelism over FSDP2",
    "tensor parallelism",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run("parallel.across", tmp_path_factory.mktemp("across"))


@pytest.mark.engine("DDP", "attach first", "exact")
@pytest.mark.engine("DDP", "save", "exact")
@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_saves(name, results):
    for outcome in results[f"{name} saves"]:
        assert isinstance(outcome, dict), outcome
        assert_close(outcome["found"], outcome["expected"], TOLERANCE)


@pytest.mark.engine("DDP", "load", "exact")
@pytest.mark.engine("Expert parallelism over FSDP2", "attach afterwards", "exact")
@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_loads_what_each_has_saved(name, results):
    for outcome in results[f"{name} loads"]:
        assert isinstance(outcome, dict), outcome
        assert list(outcome) == list(ENGINES)
        for other, pair in outcome.items():
            assert_close(*pair, TOLERANCE, other)
