"""Experts whose features transformers divides over processes give the numbers of one process."""

from dataclasses import fields

import pytest
from transformers.distributed import DistributedConfig

from helpers import assert_close, assert_share_of_order_one, relative_error
from parallel.processes import run

if "ep_size" not in {field.name for field in fields(DistributedConfig)}:
    pytest.skip("this release of transformers has no meshes", allow_module_level=True)

from parallel.dropping import AS_ONE_PROCESS
from parallel.tensor_parallel import ADAPTERS, FAMILIES, REFUSED

# the sum of two processes is rounded otherwise, and models compute norms and routers in fp32
TOLERANCE = 1e-6
FP32_TOLERANCE = 1e-5
TRAINED = [*FAMILIES, *ADAPTERS, "whole attention"]
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run("parallel.tensor_parallel", tmp_path_factory.mktemp("features"))


def assert_all_close(outcomes):
    for outcome in outcomes:
        assert isinstance(outcome, dict), outcome
        for what, pair in outcome.items():
            if what == "share":
                assert_share_of_order_one(*reversed(pair))
                continue
            assert_close(*pair, FP32_TOLERANCE, what)


@pytest.mark.engine("Tensor parallelism", "train", "exact")
@pytest.mark.engine("Tensor parallelism", "attach afterwards", "exact")
@pytest.mark.parametrize("name", TRAINED)
def test_losses_gradients_norms_and_weights_are_those_of_one_process(name, results):
    for outcome in results[name]:
        assert isinstance(outcome, dict), outcome
        assert outcome["same start"]
        found, expected = outcome["found"], outcome["expected"]
        # transformers computes the loss in fp32
        assert_close(found["losses"], expected["losses"], FP32_TOLERANCE, "losses")
        assert_close(found["norms"], expected["norms"], TOLERANCE, "norms")
        for what in ("gradients", "ends"):
            for key, tensor in expected[what].items():
                assert tensor.abs().max() > 0
                assert_close(found[what][key], tensor, TOLERANCE, f"{what} {key}")


def test_losses_gradients_and_norms_in_fp32(results):
    for outcome in results["fp32"]:
        assert isinstance(outcome, dict), outcome
        for what in ("losses", "norms"):
            found, expected = outcome["found"][what], outcome["expected"][what]
            assert_close(found, expected, FP32_TOLERANCE, what)
        for key, gradient in outcome["expected"]["gradients"].items():
            assert_close(outcome["found"]["gradients"][key], gradient, FP32_TOLERANCE, key)


@pytest.mark.engine("Tensor parallelism", "save", "exact")
@pytest.mark.parametrize("name", TRAINED)
def test_what_is_saved_loads_in_one_process(name, results):
    for outcome in results[name]:
        assert_close(*outcome["loaded"], TOLERANCE)


@pytest.mark.engine("Tensor parallelism", "load", "exact")
@families
def test_what_one_process_has_saved_loads(family, results):
    assert_all_close(results[f"loads {family}"])


@pytest.mark.engine("Tensor parallelism", "merge, unmerge", "exact")
@families
def test_merging_writes_into_every_processs_features(family, results):
    assert_all_close(results[f"merges {family}"])


def assert_dropped(outcomes):
    for outcome in outcomes:
        assert isinstance(outcome, dict), outcome
        found, expected = outcome["found"], outcome["expected"]
        assert relative_error(outcome["undropped"], expected["losses"]) > 1e-3
        assert_close(found["losses"], expected["losses"], FP32_TOLERANCE, "losses")
        for key, gradient in expected["gradients"].items():
            assert gradient.abs().max() > 0
            assert_close(found["gradients"][key], gradient, TOLERANCE, key)


@pytest.mark.parametrize("name", AS_ONE_PROCESS)
def test_dropout_has_the_masks_of_one_process(name, results):
    assert_dropped(results[f"drops, {name}"])


def test_dropout_of_rows_that_a_process_alone_has_repeats_under_checkpointing(results):
    outcomes = results["drops, all_to_all"]
    assert_dropped(outcomes)
    assert all(outcome["own masks"] for outcome in outcomes)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a bias", "the bias of ['gate_up', 'down'] would be added once by each process"),
        ("other rows", "the rows of its gate_up do not give the columns of its down"),
    ],
)
def test_parts_that_do_not_add_up_are_refused(name, why, results):
    for outcome in results[f"refuses {name}"]:
        assert outcome.startswith("UnsupportedExperts: model.layers.0.mlp.experts: ")
        assert why in outcome


def test_a_layer_that_cannot_follow_is_refused_by_its_path(results):
    for outcome in results["refuses an embedding"]:
        assert outcome.startswith(
            "ValueError: target_modules: model.embed_tokens cannot get a LoRA"
        )


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name, results):
    for outcome in results[f"refuses {name}"]:
        assert outcome.startswith(f"ValueError: {name}=")
        assert "under tensor parallelism" in outcome
