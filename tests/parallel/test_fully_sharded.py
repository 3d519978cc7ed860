"""Models that FSDP2 has sharded over two processes give the numbers of one process."""

import pytest
import torch

from helpers import assert_close, assert_share_of_order_one
from parallel.fully_sharded import FAMILIES
from parallel.processes import run

TOLERANCE = 1e-5
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run("parallel.fully_sharded", tmp_path_factory.mktemp("sharded"))


def assert_found(outcomes):
    for outcome in outcomes:
        assert isinstance(outcome, dict), outcome
        assert_close(outcome["found"], outcome["expected"], TOLERANCE)


@pytest.mark.engine("FSDP2", "attach first", "exact")
@pytest.mark.engine("FSDP2", "save", "exact")
@families
def test_every_process_calls_save_and_the_first_writes_the_whole_adapter(family, results):
    assert_found(results[f"saves {family}"])
    assert all(outcome["same bits"] for outcome in results[f"saves {family}"])


@pytest.mark.engine("FSDP2", "load", "exact")
@families
def test_whole_tensors_load_into_shards(family, results):
    assert_found(results[f"loads {family}"])


@pytest.mark.engine("FSDP2", "merge, unmerge", "exact")
@pytest.mark.parametrize("name", [*FAMILIES, "gathered"])
def test_merging_writes_into_shards(name, results):
    for outcome in results[f"merges {name}"]:
        assert isinstance(outcome, dict), outcome
        assert_share_of_order_one(*reversed(outcome["share"]), low=0.05)
        for what in ("merged", "unmerged", "unloaded"):
            assert_close(*outcome[what], TOLERANCE, what)
        assert "call unmerge_adapter() on the model in every process" in outcome["refused"]


def test_merging_some_experts_writes_into_the_shards_that_hold_them(results):
    assert_found(results["some experts"])


def test_safe_merge_writes_into_routers_and_linear_layers_too(results):
    assert_found(results["safe merge of a model"])


def test_safe_merge_of_a_model_fails_before_anything_is_merged(results):
    assert_found(results["safe merge of a linear layer"])
    for outcome in results["safe merge of a linear layer"]:
        assert "NaNs detected in the merged weights" in outcome["error"]
        assert "o_proj is not finite" in outcome["error"]


def test_safe_merge_fails_in_every_process_if_one_finds_infinity(results):
    for outcome in results["safe merge"]:
        assert "NaNs detected in the merged weights" in outcome["error"]
        assert outcome["unchanged"]


@pytest.mark.engine("FSDP1", "train", "refused: use FSDP2")
def test_the_first_fsdp_is_refused_by_name(results):
    for outcome in results["FSDP1"]:
        assert outcome.startswith("ValueError")
        assert "use FSDP2" in outcome


def test_checkpoint_wrappers_are_no_part_of_a_key(results):
    assert_found(results["wrappers"])


def test_two_adapters_are_active_and_merged_together(results):
    for outcome in results["two adapters"]:
        assert isinstance(outcome, dict), outcome
        assert torch.isfinite(outcome["together"][0]).all()
        for found, expected in outcome.values():
            assert_close(found, expected, TOLERANCE)


def test_experts_that_run_once_give_the_gradients_of_one_process(results):
    for outcome in results["keeps experts"]:
        assert isinstance(outcome, dict), outcome
        assert len(outcome["found"]) == 2
        for found in outcome["found"]:
            assert found.keys() == outcome["expected"].keys()
            for name, gradient in outcome["expected"].items():
                assert gradient.abs().max() > 0
                assert_close(found[name], gradient, TOLERANCE, name)
