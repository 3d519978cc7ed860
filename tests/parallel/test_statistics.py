"""Where tokens go, counted over several processes: each token counts once."""

from dataclasses import fields

import pytest
import torch
from transformers.distributed import DistributedConfig

from parallel.processes import run

if "ep_size" not in {field.name for field in fields(DistributedConfig)}:
    pytest.skip("this release of transformers has no ep_size", allow_module_level=True)

from parallel.counting import SCENARIOS


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run("parallel.counting", tmp_path_factory.mktemp("counted"))


@pytest.mark.engine("DDP", "statistics", "exact")
@pytest.mark.engine("FSDP2", "statistics", "exact")
@pytest.mark.engine("Expert parallelism, all_reduce", "statistics", "exact")
@pytest.mark.engine("Expert parallelism, all_to_all", "statistics", "exact")
@pytest.mark.engine("Expert parallelism over FSDP2", "statistics", "exact")
@pytest.mark.engine("Tensor parallelism", "statistics", "exact")
@pytest.mark.parametrize("name", SCENARIOS)
def test_each_token_counts_once(name, results):
    for outcome in results[name]:
        assert isinstance(outcome, dict), outcome
        found, expected = outcome["found"], outcome["expected"]
        for what in ("callback", "expert_load"):
            assert found[what].keys() == expected["expert_load"].keys()
            for path, rows in expected["expert_load"].items():
                assert rows.any()
                assert torch.equal(found[what][path], rows), f"{what} {path}"
        for score in ("tokens", "gates"):
            assert found[score] == expected[score]
