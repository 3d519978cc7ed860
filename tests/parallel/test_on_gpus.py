"""Engines over NCCL, with the kernels: the numbers of one GPU that sees all batches."""

from dataclasses import fields

import pytest
import torch
from transformers.distributed import DistributedConfig

from helpers import adapter_parameters, moe_lora, tiny_model, token_ids
from parallel.processes import run

if "ep_size" not in {field.name for field in fields(DistributedConfig)}:
    pytest.skip("this release of transformers has no ep_size", allow_module_level=True)

from parallel import on_four_gpus, on_gpus

pytestmark = pytest.mark.gpu
# beyond twice the error of one GPU, because engines add in another order
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-3}


def needs(count):
    return pytest.mark.skipif(
        torch.cuda.device_count() < count, reason=f"one process per CUDA device, {count} of them"
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run("parallel.on_gpus", tmp_path_factory.mktemp("two"), 2, backend="nccl")


@pytest.fixture(scope="module")
def results_of_four(tmp_path_factory):
    return run("parallel.on_four_gpus", tmp_path_factory.mktemp("four"), 4, backend="nccl")


def assert_trained(outcomes, name):
    tolerance = TOLERANCES[name.rpartition(", ")[2]]
    for outcome in outcomes:
        assert isinstance(outcome, dict), outcome
        found, alone, expected = (flat(outcome[what]) for what in ("found", "alone", "expected"))
        for key, value in expected.items():
            allowed = 2 * error(alone[key], value) + tolerance
            assert error(found[key], value) <= allowed, key
        loaded, saved = outcome["loaded"]
        assert error(loaded, saved) <= {"fp32": 1e-4, "bf16": 3e-2}[name.rpartition(", ")[2]]


def flat(results):
    """{name: tensor} of losses, gradients and last parameters."""
    return {
        "losses": results["losses"],
        **{f"gradient of {key}": value for key, value in results["gradients"].items()},
        **{f"{key} at the end": value for key, value in results["ends"].items()},
    }


def error(found, expected):
    """The norm of the difference over the norm."""
    assert expected.norm() > 0
    return ((found - expected).norm() / expected.norm()).item()


@needs(2)
@pytest.mark.parametrize("name", on_gpus.scenarios(on_gpus.ENGINES))
def test_two_gpus_train_and_save_as_one(name, results):
    assert_trained(results[name], name)


@needs(2)
def test_processes_may_have_different_numbers_of_tokens(results):
    for outcome in results["tokens differ, EP"]:
        assert outcome == {"finite": True}


@needs(4)
@pytest.mark.parametrize("name", on_four_gpus.SCENARIOS)
def test_four_gpus_train_and_save_as_one(name, results_of_four):
    assert_trained(results_of_four[name], name)


@needs(2)
@pytest.mark.parametrize("dtype", on_gpus.DTYPES)
def test_one_process_runs_a_layer_on_every_gpu_in_turn(dtype):
    """Launches are recorded and replayed for each device alone."""
    models = []
    for index in range(2):
        model = moe_lora(tiny_model("qwen3_moe", **on_gpus.SIZES, dtype=on_gpus.DTYPES[dtype]))
        models.append(model.to(f"cuda:{index}"))
    for step in range(6):
        results = []
        for index, model in enumerate(models):
            ids = token_ids(2, 40, seed=step).to(f"cuda:{index}")
            model.zero_grad()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            gradients = [p.grad.cpu() for p in adapter_parameters(model).values()]
            results.append([loss.detach().cpu(), *gradients])
        for first, second in zip(*results, strict=True):
            assert error(second, first) <= TOLERANCES[dtype], step
