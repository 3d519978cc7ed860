"""What FSDP2 offers, with an adapter that is added before the model is sharded, or afterwards."""

import pytest

from helpers import assert_close, assert_share_of_order_one
from parallel.fsdp_of_four import SCENARIOS as SCENARIOS_OF_FOUR
from parallel.fsdp_options import LIVES, OTHER
from parallel.processes import run
from parallel.test_fsdp_afterwards import FP32_TOLERANCE, TOLERANCE, assert_trained

when = pytest.mark.parametrize("when", ["first", "afterwards"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def results(folder):
    return run("parallel.fsdp_options", folder)


@pytest.fixture(scope="module")
def results_of_four(results, folder):
    (folder / "rendezvous").unlink(missing_ok=True)
    return run("parallel.fsdp_of_four", folder, 4)


def assert_equal(outcomes, what, tolerance=TOLERANCE):
    for outcome in outcomes:
        assert isinstance(outcome, dict), outcome
        found, expected = outcome["found"][what], outcome["expected"][what]
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert_close(found[key], tensor, tolerance, key)


@pytest.mark.engine("FSDP2", "train", "exact")
@when
def test_training_is_that_of_one_process(when, results):
    assert_trained(results[when])


@pytest.mark.engine("HSDP", "attach first", "exact")
@pytest.mark.engine("HSDP", "attach afterwards", "exact")
@pytest.mark.engine("HSDP", "train", "exact")
@pytest.mark.engine("FSDP2 with CPU offload", "attach first", "exact")
@pytest.mark.engine("FSDP2 with CPU offload", "attach afterwards", "exact")
@pytest.mark.engine("FSDP2 with CPU offload", "train", "exact")
@pytest.mark.engine("FSDP2", "quantized experts", "exact")
@pytest.mark.parametrize("name", OTHER)
@when
def test_training_with_an_option_is_that_of_one_process(when, name, results):
    fp32 = {"quantized": FP32_TOLERANCE}
    assert_trained(results[f"{when}, {name}"], fp32.get(name, TOLERANCE))


def test_rows_of_an_embedding_are_trained_if_the_adapter_is_added_first(results):
    assert_trained(results["first, tokens"])
    for outcome in results["afterwards, tokens"]:
        assert outcome.startswith("ValueError: trainable_token_indices: FSDP2 has sharded")
        assert "Add the adapter first" in outcome


@when
@pytest.mark.parametrize("name", ["mixed", "mixed, saved whole"])
def test_gradients_under_a_policy_of_bf16_are_those_of_weights_in_bf16(when, name, results):
    assert_equal(results[f"{when}, {name}"], "gradients", FP32_TOLERANCE)


@pytest.mark.engine("FSDP2", "resume", "exact")
@pytest.mark.parametrize(
    "name", ["first, checkpoint", "afterwards, checkpoint", "checkpoint, the other way"]
)
def test_training_goes_on_from_a_distributed_checkpoint(name, results):
    assert_equal(results[name], "ends")


@pytest.mark.engine("FSDP2", "resume", "exact")
def test_one_process_goes_on_from_a_distributed_checkpoint(results):
    assert_equal(results["checkpoint, alone"], "ends")


@pytest.mark.engine("FSDP2", "save", "exact")
@pytest.mark.engine("FSDP2", "load", "exact")
@pytest.mark.engine("FSDP2", "merge, unmerge", "exact")
@pytest.mark.parametrize("name", LIVES)
@when
def test_what_is_trained_beside_experts_is_saved_loaded_and_merged(when, name, results):
    for outcome in results[f"{when}, {name}, life"]:
        assert isinstance(outcome, dict), outcome
        share = outcome.pop("share")
        for what, (found, expected) in outcome.items():
            assert_share_of_order_one(expected, share, low=0.05)
            assert_close(found, expected, FP32_TOLERANCE, what)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("merges tokens", "trainable_token_indices: FSDP2 has sharded"),
        ("first, merges quantized", "cannot be merged into quantized experts"),
        ("afterwards, merges quantized", "cannot be merged into quantized experts"),
    ],
)
def test_what_cannot_be_merged_into_shards_is_refused_before_anything_changes(name, what, results):
    for outcome in results[name]:
        assert outcome.startswith("ValueError")
        assert what in outcome
        assert "save the adapter, and merge it in one process" in outcome


@pytest.mark.engine("FSDP2", "torch.compile", "exact")
@pytest.mark.long
@pytest.mark.parametrize("name", SCENARIOS_OF_FOUR)
def test_four_processes_train_as_one(name, results_of_four):
    if name == "from two processes":
        assert_equal(results_of_four[name], "ends")
    else:
        assert_trained(results_of_four[name])
