"""An adapter that is added after FSDP2 has sharded the model trains as in one process."""

import pytest
import torch

from helpers import assert_close
from parallel.fsdp_afterwards import REFUSED, TRAINED
from parallel.processes import run

# the models are fp64, but transformers computes the loss in fp32
TOLERANCE = 1e-9
FP32_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run("parallel.fsdp_afterwards", tmp_path_factory.mktemp("afterwards"))


@pytest.mark.engine("FSDP2", "attach afterwards", "exact")
@pytest.mark.engine("FSDP2", "save", "exact")
@pytest.mark.parametrize("name", TRAINED)
def test_losses_gradients_norms_and_weights_are_those_of_one_process(name, results):
    assert_trained(results[name])


def assert_trained(outcomes, tolerance=TOLERANCE):
    for outcome in outcomes:
        assert isinstance(outcome, dict), outcome
        found, expected = outcome["found"], outcome["expected"]
        assert_close(found["losses"], expected["losses"], FP32_TOLERANCE, "losses")
        assert_close(found["norms"], expected["norms"], tolerance, "norms")
        for what in ("gradients", "ends"):
            assert found[what].keys() == expected[what].keys()
            for key, tensor in expected[what].items():
                assert tensor.abs().max() > 0
                assert_close(found[what][key], tensor, tolerance, f"{what} {key}")
        for what in outcome.keys() & {"loaded", "again"}:
            assert_close(*outcome[what], tolerance, what)


def test_every_process_starts_with_the_values_of_the_first(results):
    for name in ("qwen3_moe", "gpt_oss", "embeddings", "by transformers"):
        assert all(outcome["same start"] for outcome in results[name])


@pytest.mark.engine("FSDP2", "merge, unmerge", "exact")
def test_an_adapter_that_every_process_holds_is_merged_into_shards(results):
    for outcome in results["merges"]:
        assert isinstance(outcome, dict), outcome
        for what, (found, expected) in outcome.items():
            assert_close(found, expected, FP32_TOLERANCE, what)


@pytest.mark.engine("FSDP2", "load", "exact")
def test_an_adapter_is_loaded_into_shards_while_weights_are_gathered(results):
    for outcome in results["gathered"]:
        assert isinstance(outcome, dict), outcome
        assert_close(*outcome["logits"], TOLERANCE)


def test_an_adapter_beside_weights_of_bf16_is_fp32(results):
    for outcome in results["half precision"]:
        assert isinstance(outcome, dict), outcome
        assert outcome["fp32"]
        assert torch.equal(*outcome["logits"])


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_is_sharded_in_another_way_is_refused(name, results):
    for outcome in results[name]:
        assert outcome.startswith("ValueError")
        assert REFUSED[name][1] in outcome
        assert "add the adapter first, and then shard the model with fully_shard" in outcome
