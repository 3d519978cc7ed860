"""Experts that transformers divides over several processes train as those of one process do."""

from dataclasses import fields

import pytest
from transformers.distributed import DistributedConfig

from helpers import assert_close
from parallel.processes import run

if "ep_size" not in {field.name for field in fields(DistributedConfig)}:
    pytest.skip("this release of transformers has no ep_size", allow_module_level=True)

from parallel.expert_parallel import ADAPTERS, MODES, NUMBER_OF_EXPERTS, REFUSED, R
from parallel.expert_parallel_of_four import MODES_OF_FOUR
from parallel.expert_parallel_of_four import SCENARIOS as SCENARIOS_OF_FOUR

TOLERANCE = 1e-9
FP32_TOLERANCE = 1e-5
TRAINED = [
    *(f"{family} {mode}" for family in NUMBER_OF_EXPERTS for mode in MODES),
    *(f"qwen3_moe {mode}, {adapter}" for adapter in ADAPTERS for mode in MODES),
]
trained = pytest.mark.parametrize("name", TRAINED)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run("parallel.expert_parallel", tmp_path_factory.mktemp("divided"))


@pytest.fixture(scope="module")
def results_of_four(tmp_path_factory):
    return run("parallel.expert_parallel_of_four", tmp_path_factory.mktemp("four"), 4)


@pytest.mark.engine("Expert parallelism, all_reduce", "train", "exact")
@pytest.mark.engine("Expert parallelism, all_to_all", "train", "exact")
@trained
def test_losses_gradients_norms_and_weights_are_those_of_one_process(name, results):
    assert_trained(results[name])


@pytest.mark.engine("Expert parallelism over FSDP2", "train", "exact")
@pytest.mark.engine("Expert parallelism over FSDP2", "save", "exact")
@pytest.mark.long
@pytest.mark.parametrize("name", [n for n in SCENARIOS_OF_FOUR if not n.startswith("merges")])
def test_four_processes_train_as_one(name, results_of_four):
    assert_trained(results_of_four[name])
    for outcome in results_of_four[name]:
        assert_close(*outcome["loaded"], TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES_OF_FOUR)
def test_four_processes_load_and_merge(mode, results_of_four):
    assert_as_in_one_process(results_of_four[f"merges {mode}"])


def assert_as_in_one_process(outcomes):
    for outcome in outcomes:
        assert isinstance(outcome, dict), outcome
        for what, pair in outcome.items():
            assert_close(*pair, FP32_TOLERANCE, what)


def assert_trained(outcomes):
    for outcome in outcomes:
        assert isinstance(outcome, dict), outcome
        found, expected = outcome["found"], outcome["expected"]
        # transformers computes the loss in fp32
        assert_close(found["losses"], expected["losses"], FP32_TOLERANCE, "losses")
        assert_close(found["norms"], expected["norms"], TOLERANCE, "norms")
        for what in ("gradients", "ends"):
            for key, expected in outcome["expected"][what].items():
                assert expected.abs().max() > 0
                assert_close(outcome["found"][what][key], expected, TOLERANCE, f"{what} {key}")


@pytest.mark.parametrize("mode", MODES)
def test_losses_gradients_and_norms_in_fp32(mode, results):
    for outcome in results[f"fp32 {mode}"]:
        assert isinstance(outcome, dict), outcome
        found, expected = outcome["found"], outcome["expected"]
        for what in ("losses", "norms"):
            assert_close(found[what], expected[what], FP32_TOLERANCE, what)
        for key, gradient in expected["gradients"].items():
            assert_close(found["gradients"][key], gradient, FP32_TOLERANCE, key)


@pytest.mark.engine("Expert parallelism, all_reduce", "attach afterwards", "exact")
@pytest.mark.engine("Expert parallelism, all_to_all", "attach afterwards", "exact")
@trained
def test_the_start_is_that_of_one_process_with_the_first_processs_seed(name, results):
    assert all(outcome["same start"] for outcome in results[name])


@pytest.mark.engine("Expert parallelism, all_reduce", "save", "exact")
@pytest.mark.engine("Expert parallelism, all_to_all", "save", "exact")
@trained
def test_what_is_saved_loads_in_one_process(name, results):
    for outcome in results[name]:
        assert_close(*outcome["loaded"], TOLERANCE)


@pytest.mark.parametrize("mode", MODES)
def test_a_process_holds_the_ranks_of_its_own_experts(mode, results):
    for outcome in results[f"qwen3_moe {mode}"]:
        assert outcome["held"] == (4 * R, 4 * R)


@pytest.mark.engine("Expert parallelism, all_reduce", "load", "exact")
@pytest.mark.engine("Expert parallelism, all_to_all", "load", "exact")
@pytest.mark.engine("Expert parallelism over FSDP2", "load", "exact")
@pytest.mark.engine("Expert parallelism, all_reduce", "merge, unmerge", "exact")
@pytest.mark.engine("Expert parallelism, all_to_all", "merge, unmerge", "exact")
@pytest.mark.engine("Expert parallelism over FSDP2", "merge, unmerge", "exact")
@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_loads_and_merges_into_every_processs_experts(mode, results):
    assert_as_in_one_process(results[f"merges {mode}"])


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_refused_by_name(name, results):
    for outcome in results[f"refuses {name}"]:
        assert outcome.startswith(f"ValueError: {name}=")
        assert "under expert parallelism" in outcome


@pytest.mark.parametrize("name", ["undivided", "off the interface"])
@pytest.mark.engine("Expert parallelism, all_reduce", "attach afterwards", "refused: llama4, dbrx")
def test_experts_that_are_not_divided_as_expected_are_refused(name, results):
    for outcome in results[name]:
        assert outcome.startswith("UnsupportedExperts: model.layers.")
        assert "has not divided" in outcome


@pytest.mark.engine(
    "Expert parallelism, all_reduce", "quantized experts", "refused: they are stored whole"
)
@pytest.mark.engine(
    "Expert parallelism, all_to_all", "quantized experts", "refused: they are stored whole"
)
def test_quantized_experts_are_refused(results):
    for outcome in results["quantized"]:
        assert outcome.startswith("UnsupportedExperts: model.layers.1.mlp.experts: quantized")
    for outcome in results["quantizing"]:
        assert outcome.startswith("ValueError: model.layers.0.mlp.experts is divided among")


@pytest.mark.parametrize("mode", MODES)
def test_memory_of_a_process_falls_with_the_number_of_processes(mode, results):
    for outcome in results[f"optimizer {mode}"]:
        whole, held = outcome["bytes"]
        assert held * 2 == whole
