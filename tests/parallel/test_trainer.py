"""The Trainer and accelerate's own loop under FSDP2 end where one process ends."""

import functools

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

from helpers import adapter_parameters, assert_close, moe_lora, outputs, tiny_model
from parallel import supervised, trained, trained_long
from parallel.fully_sharded import is_block
from parallel.own_loop import loop
from parallel.processes import run
from parallel.trainer import alone
from peft_moe_lora import consolidate_checkpoint

TOLERANCE = 1e-5
# peft 0.21 reads a name that transformers 5.23 deprecates; drop when peft's floor moves
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Module of scenarios -> the folder in which its processes write."""
    return {module: tmp_path_factory.mktemp(module.__name__) for module in (trained, trained_long)}


@pytest.fixture(scope="module")
def results(folders):
    return run("parallel.trained", folders[trained])


@pytest.fixture(scope="module")
def results_of_long(folders):
    return run("parallel.trained_long", folders[trained_long])


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Family -> what one process gives."""
    return functools.cache(lambda family: alone(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="module")
def loop_of_one_process(tmp_path_factory):
    return loop(tmp_path_factory.mktemp("loop"))


def assert_same(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert_close(found[name], tensor, TOLERANCE, name)
    else:
        assert_close(found, expected, TOLERANCE)


def assert_lives(outcomes, expected):
    # the second step is another adapter than the last, so that loading nothing would show
    for name, tensor in expected["last"].items():
        assert (tensor - expected["second"][name]).norm() > 1e-3 * tensor.norm(), name
    for outcome in outcomes:
        assert isinstance(outcome, dict), outcome
        assert outcome["class"] == "FSDPPeftModel"
        for what in ("losses", "second", "resumed", "last"):
            assert_same(outcome[what], expected[what])


settings = pytest.mark.parametrize("name", trained.SETTINGS)


@pytest.mark.engine("Trainer with FSDP2", "attach first", "exact")
@pytest.mark.engine("Trainer with FSDP2", "train", "exact")
@pytest.mark.engine("Trainer with FSDP2", "load", "exact")
@pytest.mark.engine("Trainer with FSDP2", "resume", "exact")
@settings
def test_training_going_back_to_the_best_and_resuming_are_those_of_one_process(
    name, results, one_process
):
    assert_lives(results[f"qwen3_moe {name}"], one_process("qwen3_moe"))


@pytest.mark.long
@pytest.mark.parametrize("name", trained_long.SCENARIOS)
def test_every_family_and_setting_lives_as_in_one_process(name, results_of_long, one_process):
    family = name.split()[0]
    outcomes = results_of_long[name]
    if family in ("deepseek_v3", "nemotron_h") and "cpu_ram_efficient_loading" in name:
        # accelerate 1.15 takes the buffers that routers save for shards, with any adapter
        assert all("no attribute 'device_mesh'" in outcome for outcome in outcomes)
        return
    assert_lives(outcomes, one_process(family))


@pytest.mark.engine("Trainer with FSDP2", "save", "exact")
@settings
def test_saved_adapters_are_those_of_the_model_bit_for_bit(name, results, folders):
    (outcome, _) = results[f"qwen3_moe {name}"]
    folder = folders[trained] / f"qwen3_moe {name}"
    assert_holds(folder / "adapter", outcome["second"])
    if name == "FULL_STATE_DICT":
        assert_holds(folder / "model", outcome["second"])
        assert_holds(folder / "checkpoint-2", outcome["second"])
    else:
        # the Trainer writes shards alone
        assert not (folder / "model").exists()
        checkpoint = folder / "checkpoint-2"
        consolidate_checkpoint(checkpoint, folder / "whole", config=folder / "adapter")
        assert_holds(folder / "whole", outcome["second"])


def assert_holds(folder, expected):
    """One process loads the adapter of a folder, and has these parameters."""
    model = PeftModel.from_pretrained(tiny_model("qwen3_moe"), folder)
    found = adapter_parameters(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", trained.LOOPS)
def test_a_loop_of_your_own_ends_and_goes_on_as_in_one_process(
    name, results, folders, loop_of_one_process
):
    expected = loop_of_one_process
    assert_same(expected["adapter again"], expected["adapter"])
    outcomes = results[f"loop {name}"]
    for outcome in outcomes:
        assert isinstance(outcome, dict), outcome
        for what, value in expected.items():
            assert_same(outcome[what], value)
    folder = folders[trained] / f"loop {name}"
    assert_holds(folder / "adapter", outcomes[0]["adapter"])
    consolidate_checkpoint(folder / "state", folder / "whole", config=folder / "adapter")
    assert_holds(folder / "whole", outcomes[0]["saved"])


@pytest.mark.engine("Trainer with FSDP2", "train", "exact")
def test_an_adapter_that_trl_adds_is_trained_as_in_one_process(results, folders, tmp_path):
    expected = supervised.sft(tmp_path, 2)
    for outcome in results["SFTTrainer"]:
        assert isinstance(outcome, dict), outcome
        assert_same(outcome["losses"], expected["losses"])
        assert_same(outcome["adapter"], expected["adapter"])
    assert_holds(folders[trained] / "sft" / "model", outcome["adapter"])


@pytest.mark.engine("FSDP1", "train", "refused: use FSDP2")
def test_the_first_fsdp_is_refused_before_the_first_step(results):
    for outcome in results["FSDP1"]:
        assert outcome.startswith("ValueError")
        assert "use FSDP2" in outcome


def test_a_module_trained_whole_within_a_checkpoint_wrapper_is_saved(tmp_path):
    model = moe_lora(tiny_model(), modules_to_save=["q_proj"])
    expected = get_peft_model_state_dict(model)
    apply_activation_checkpointing(model, check_fn=is_block)
    found = get_peft_model_state_dict(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert_close(outputs(loaded), outputs(model.eval()), TOLERANCE)
