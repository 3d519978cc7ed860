"""Models that DeepSpeed's ZeRO-2 and ZeRO-3 train in two processes give the numbers of one process.

`parallel.zero` is not imported here: it imports DeepSpeed, which takes seconds in every worker.
"""

import functools

import pytest
import torch

from helpers import assert_close, assert_share_of_order_one
from parallel.fully_sharded import FAMILIES
from parallel.processes import run
from parallel.trainer import alone

TOLERANCE = 1e-5
families = pytest.mark.parametrize("family", FAMILIES)
stages = pytest.mark.parametrize("stage", [2, 3])


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run("parallel.zero_short", tmp_path_factory.mktemp("zero"))


@pytest.fixture(scope="module")
def long_results(tmp_path_factory):
    return run("parallel.zero_long", tmp_path_factory.mktemp("zero_long"))


@pytest.fixture(scope="module")
def one_trainer(tmp_path_factory):
    """Family -> what the Trainer gives in one process."""
    return functools.cache(lambda family: alone(family, tmp_path_factory.mktemp(family)))


def assert_trained(outcomes):
    for outcome in outcomes:
        assert isinstance(outcome, dict), outcome
        for what, expected in outcome["expected"].items():
            found = outcome["found"][what]
            if what in ("losses", "norms"):
                assert_close(found, expected, TOLERANCE, what)
                continue
            for name, tensor in expected.items():
                assert tensor.abs().max() > 0, name
                assert_close(found[name], tensor, TOLERANCE, f"{what} {name}")
        for what in {"evaluated", "loaded"} & outcome.keys():
            assert_close(*outcome[what], TOLERANCE, what)


@pytest.mark.engine("DeepSpeed ZeRO-2", "attach first", "exact")
@pytest.mark.engine("DeepSpeed ZeRO-2", "train", "exact")
@pytest.mark.engine("DeepSpeed ZeRO-2", "save", "exact")
def test_zero_2_trains_and_saves_as_one_process(results):
    assert_trained(results["qwen3_moe ZeRO-2"])


@pytest.mark.engine("DeepSpeed ZeRO-3", "attach first", "exact")
@pytest.mark.engine("DeepSpeed ZeRO-3", "train", "exact")
@pytest.mark.engine("DeepSpeed ZeRO-3", "save", "exact")
def test_zero_3_trains_and_saves_as_one_process(results):
    assert_trained(results["qwen3_moe ZeRO-3"])


@pytest.mark.engine("DeepSpeed ZeRO-3", "attach afterwards", "exact")
def test_a_model_that_was_loaded_in_parts_trains_as_one_process(results):
    """Its experts are empty tensors when the adapter is added, and when one is loaded."""
    assert_trained(results["qwen3_moe ZeRO-3, loaded in parts"])


def test_experts_alone_train_as_in_one_process(results):
    assert_trained(results["experts alone"])


def test_gradients_that_zero_3_would_lose_are_refused_in_the_first_forward(results):
    for outcome in results["loses gradients"]:
        assert outcome.startswith("ValueError")
        assert "model.enable_input_require_grads()" in outcome


@pytest.mark.engine("DeepSpeed ZeRO-2", "load", "exact")
@pytest.mark.engine("DeepSpeed ZeRO-3", "load", "exact")
@stages
def test_tensors_loaded_after_the_start_reach_the_optimizer(stage, results):
    assert_trained(results[f"loads, stage {stage}"])


@pytest.mark.engine("DeepSpeed ZeRO-2", "resume", "exact")
@pytest.mark.engine("DeepSpeed ZeRO-3", "resume", "exact")
@stages
def test_a_checkpoint_of_deepspeed_goes_on_as_if_it_never_stopped(stage, results):
    assert_trained(results[f"resumes, stage {stage}"])
    found, expected = results[f"resumes, stage {stage}"][0]["consolidated"]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


@pytest.mark.engine("DeepSpeed ZeRO-2", "attach afterwards", "refused: after initialize")
@pytest.mark.engine("DeepSpeed ZeRO-3", "attach afterwards", "refused: after initialize")
@stages
def test_a_new_adapter_after_the_start_is_refused(stage, results):
    for outcome in results[f"adapts, stage {stage}"]:
        assert outcome.startswith("ValueError: DeepSpeed has an optimizer for this model already")
        assert "then call deepspeed.initialize or accelerator.prepare" in outcome


@pytest.mark.engine("DeepSpeed ZeRO-2", "merge, unmerge", "exact")
@pytest.mark.engine("DeepSpeed ZeRO-3", "merge, unmerge", "exact")
@stages
def test_merging_writes_into_every_processs_parts(stage, results):
    assert_merged(results[f"merges, stage {stage}"])
    for outcome in results["merges, stage 3"]:
        assert "call unmerge_adapter() on the model in every process" in outcome["refused"]


def assert_merged(outcomes):
    for outcome in outcomes:
        assert isinstance(outcome, dict), outcome
        assert_share_of_order_one(*reversed(outcome["share"]), low=0.05)
        for what in ("merged", "unmerged", "unloaded"):
            assert_close(*outcome[what], TOLERANCE, what)


def test_a_gathered_state_dict_is_saved_by_the_first_process(results):
    for outcome in results["by accelerate"]:
        assert isinstance(outcome, dict), outcome
        for name in ("by_accelerate", "by_trainer"):
            assert_close(*outcome[name], TOLERANCE, name)
    (first, _) = results["by accelerate"]
    assert "stage3_gather_16bit_weights_on_model_save" in first["refused"]


def test_a_block_that_is_computed_again_trains_as_in_one_process(results):
    assert_trained(results["checkpointing"])


def assert_trained_in_bf16(outcomes):
    """The same training, with 8 bits of each number: losses are close, weights are not compared."""
    for outcome in outcomes:
        assert isinstance(outcome, dict), outcome
        assert_close(outcome["found"]["losses"], outcome["expected"]["losses"], 0.03, "losses")
        for name, tensor in outcome["expected"]["gradients"].items():
            assert_close(outcome["found"]["gradients"][name].float(), tensor, 0.1, name)
        saved, ended = outcome["saved"]
        assert all(torch.equal(saved[name], ended[name]) for name in ended)


def test_bf16_trains_and_saves(results):
    assert_trained_in_bf16(results["bf16, stage 3"])


def assert_lives(outcomes, expected):
    # the second step is another adapter than the last, so that loading nothing would show
    for name, tensor in expected["last"].items():
        assert (tensor - expected["second"][name]).norm() > 1e-3 * tensor.norm(), name
    for outcome in outcomes:
        assert isinstance(outcome, dict), outcome
        for what in ("losses", "resumed"):
            assert_close(outcome[what], expected[what], TOLERANCE, what)
        for what in ("second", "last"):
            for name, tensor in expected[what].items():
                assert_close(outcome[what][name], tensor, TOLERANCE, f"{what} {name}")
        for folder, saved in outcome["saved"].items():
            for name, tensor in outcome["second"].items():
                assert torch.equal(saved[name], tensor), f"{folder} {name}"


@pytest.mark.engine("Trainer with DeepSpeed ZeRO-3", "attach afterwards", "exact")
@pytest.mark.engine("Trainer with DeepSpeed ZeRO-3", "train", "exact")
@pytest.mark.engine("Trainer with DeepSpeed ZeRO-3", "save", "exact")
@pytest.mark.engine("Trainer with DeepSpeed ZeRO-3", "load", "exact")
@pytest.mark.engine("Trainer with DeepSpeed ZeRO-3", "resume", "exact")
def test_the_trainer_goes_back_to_the_best_and_resumes_as_in_one_process(results, one_trainer):
    assert_lives(results["Trainer, stage 3, loaded in parts"], one_trainer("qwen3_moe"))


@pytest.mark.engine("Trainer with DeepSpeed ZeRO-2", "attach first", "exact")
@pytest.mark.engine("Trainer with DeepSpeed ZeRO-2", "train", "exact")
@pytest.mark.engine("Trainer with DeepSpeed ZeRO-2", "save", "exact")
@pytest.mark.engine("Trainer with DeepSpeed ZeRO-2", "load", "exact")
@pytest.mark.engine("Trainer with DeepSpeed ZeRO-2", "resume", "exact")
@pytest.mark.engine("Trainer with DeepSpeed ZeRO-3", "attach first", "exact")
@pytest.mark.long
@stages
@families
def test_every_familys_trainer_goes_back_and_resumes(family, stage, long_results, one_trainer):
    assert_lives(long_results[f"{family} Trainer, stage {stage}"], one_trainer(family))


@pytest.mark.long
@families
@pytest.mark.parametrize("kind", ["ZeRO-2", "ZeRO-3", "ZeRO-3, loaded in parts"])
def test_every_family_trains_as_in_one_process(kind, family, long_results):
    assert_trained(long_results[f"{family} {kind}"])


@pytest.mark.long
@pytest.mark.parametrize("name", ["some experts", "recompute", "materialize", "modules_to_save"])
def test_every_setting_trains_as_in_one_process(name, long_results):
    assert_trained(long_results[f"{name}, loaded in parts"])


@pytest.mark.engine("DeepSpeed ZeRO-2", "quantized experts", "exact")
@pytest.mark.engine("DeepSpeed ZeRO-3", "quantized experts", "exact")
@pytest.mark.long
@stages
def test_quantized_experts_train_as_in_one_process(stage, long_results):
    assert_trained(long_results[f"quantized, stage {stage}"])


@pytest.mark.long
def test_zero_2_trains_in_bf16(long_results):
    assert_trained_in_bf16(long_results["bf16, stage 2"])


@pytest.mark.long
@families
def test_merging_every_family_writes_into_every_processs_parts(family, long_results):
    assert_merged(long_results[f"{family} merges"])
