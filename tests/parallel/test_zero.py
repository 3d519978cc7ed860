"""Models that DeepSpeed's ZeRO-2 and ZeRO-3 train in two processes give the numbers of one process.

`parallel.zero` is not imported here: it imports DeepSpeed, which takes seconds in every worker.
"""

import pytest

from helpers import assert_close, assert_share_of_order_one
from parallel.fully_sharded import FAMILIES
from parallel.processes import run

TOLERANCE = 1e-5
stages = pytest.mark.parametrize("stage", [2, 3])


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
    for outcome in results[f"merges, stage {stage}"]:
        assert isinstance(outcome, dict), outcome
        assert_share_of_order_one(*reversed(outcome["share"]))
        for what in ("merged", "unmerged", "unloaded"):
            assert_close(*outcome[what], TOLERANCE, what)
        if stage == 3:
            assert "call unmerge_adapter() on the model in every process" in outcome["refused"]


def test_a_gathered_state_dict_is_saved_by_the_first_process(results):
    for outcome in results["by accelerate"]:
        assert isinstance(outcome, dict), outcome
        for name in ("by_accelerate", "by_trainer"):
            assert_close(*outcome[name], TOLERANCE, name)
    (first, _) = results["by accelerate"]
    assert "stage3_gather_16bit_weights_on_model_save" in first["refused"]


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["ZeRO-2", "ZeRO-3", "ZeRO-3, loaded in parts"])
def test_every_family_trains_as_in_one_process(kind, family, long_results):
    assert_trained(long_results[f"{family} {kind}"])
