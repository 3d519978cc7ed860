"""The checkpoint of a sharded training becomes the adapter that was trained, or an error."""

import json
import pickle
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from typer.testing import CliRunner

from helpers import adapter_parameters, fill_adapter, moe_lora, tiny_model
from peft_moe_lora import consolidate_checkpoint
from peft_moe_lora.cli import BAD, EXISTS, REFUSED, app
from peft_moe_lora.files.tensor_file import AdapterError, ExistsError, RefusedError

WEIGHTS = "adapter_model.safetensors"
SHARDS = "pytorch_model_fsdp_0"
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled:UserWarning", "ignore:Detected an existing:UserWarning"
)


class Trained:
    """A model with an adapter beside which a router, a linear layer and a head are trained."""

    def __init__(self, folder, **config):
        self.base = folder / "base"
        base = tiny_model()
        base.save_pretrained(self.base)
        config.setdefault("target_modules", ["experts", "gate", "o_proj"])
        # PEFT writes it into the configuration
        base.name_or_path = str(self.base)
        self.model = moe_lora(base, **config)
        self.saved = folder / "saved"
        self.model.save_pretrained(self.saved)

    def checkpoint(self, folder, state, config=True):
        """A folder as the Trainer saves it with SHARDED_STATE_DICT."""
        dcp.save({"model": state}, storage_writer=dcp.FileSystemWriter(folder / SHARDS))
        if config:
            shutil.copy(self.saved / "adapter_config.json", folder)
        return folder

    def assert_is(self, folder):
        """An adapter folder holds this adapter, bit for bit, and loads."""
        expected = load_file(self.saved / WEIGHTS)
        found = load_file(folder / WEIGHTS)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
        loaded = adapter_parameters(PeftModel.from_pretrained(tiny_model(), folder))
        for name, parameter in adapter_parameters(self.model).items():
            assert torch.equal(loaded[name], parameter), name


@pytest.fixture
def trained(tmp_path):
    return Trained(tmp_path)


@pytest.fixture
def checkpoint(trained, tmp_path):
    return trained.checkpoint(tmp_path / "checkpoint", get_peft_model_state_dict(trained.model))


def command(*arguments):
    return CliRunner().invoke(app, ["consolidate", *map(str, arguments)])


def test_the_adapter_of_a_checkpoint_is_written_bit_for_bit(trained, checkpoint, tmp_path):
    done = consolidate_checkpoint(checkpoint, tmp_path / "out")
    assert (done.modules, done.experts) == (2, 2 * 5)
    trained.assert_is(tmp_path / "out")


def test_the_command_takes_the_folder_of_shards_and_a_configuration(trained, checkpoint, tmp_path):
    (checkpoint / "adapter_config.json").unlink()
    assert command(checkpoint, tmp_path / "out").exit_code == BAD
    arguments = [checkpoint / SHARDS, tmp_path / "out", "--config", trained.saved]
    assert command(*arguments).exit_code == 0
    trained.assert_is(tmp_path / "out")
    assert command(*arguments).exit_code == EXISTS
    assert command(*arguments, "--force", "--json").exit_code == 0


def test_a_checkpoint_of_the_whole_model_gives_one_adapter(tmp_path):
    trained = Trained(tmp_path, modules_to_save=["lm_head"])
    trained.model.add_adapter("second", trained.model.peft_config["default"])
    fill_adapter(trained.model, "second", seed=7)
    optimizer = {f"{name}.exp_avg": p for name, p in trained.model.named_parameters()}
    folder = trained.checkpoint(tmp_path / "checkpoint", trained.model.state_dict())
    dcp.save(
        {"model": trained.model.state_dict(), "optimizer": {"state": optimizer}},
        storage_writer=dcp.FileSystemWriter(folder / SHARDS, overwrite=True),
    )
    with pytest.raises(RefusedError, match=r"holds the adapters \['default', 'second'\]"):
        consolidate_checkpoint(folder, tmp_path / "out")
    with pytest.raises(RefusedError, match="holds no adapter 'third'"):
        consolidate_checkpoint(folder, tmp_path / "out", adapter_name="third")
    consolidate_checkpoint(folder, tmp_path / "out", adapter_name="default")
    trained.assert_is(tmp_path / "out")
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / "out" / WEIGHTS)


def test_a_checkpoint_in_one_file_is_read(trained, checkpoint, tmp_path):
    shutil.rmtree(checkpoint / SHARDS)
    torch.save(trained.model.state_dict(), checkpoint / "pytorch_model_fsdp.bin")
    consolidate_checkpoint(checkpoint, tmp_path / "out")
    trained.assert_is(tmp_path / "out")


def test_deepspeed_reads_its_own_checkpoints(trained, checkpoint, tmp_path, monkeypatch):
    """DeepSpeed is imitated here: it gives whole fp32 tensors under the names of parameters."""
    shutil.rmtree(checkpoint / SHARDS)
    (checkpoint / "global_step4").mkdir()
    for name in ("deepspeed", "deepspeed.utils.zero_to_fp32"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RefusedError, match="pip install deepspeed"):
        consolidate_checkpoint(checkpoint, tmp_path / "out")
    asked = []

    def read(folder, exclude_frozen_parameters):
        asked.append((folder, exclude_frozen_parameters))
        print("Processing")
        return {
            name: parameter.data for name, parameter in adapter_parameters(trained.model).items()
        }

    names = ("deepspeed", "deepspeed.utils", "deepspeed.utils.zero_to_fp32")
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[-1]].get_fp32_state_dict_from_zero_checkpoint = read
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    done = command(checkpoint, tmp_path / "out", "--json")
    assert json.loads(done.stdout)["modules"] == 2
    assert asked == [(str(checkpoint), True)]
    trained.assert_is(tmp_path / "out")


# ---- errors --------------------------------------------------------------------------------------


def refused(checkpoint, tmp_path, match, error=AdapterError, **options):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error, match=match):
        consolidate_checkpoint(checkpoint, tmp_path / "out", **options)
    assert sorted(tmp_path.rglob("*")) == before, "something was written"


def test_a_value_that_is_not_finite_is_refused(trained, tmp_path):
    state = get_peft_model_state_dict(trained.model)
    state[next(key for key in state if "experts" in key)][3, 2] = torch.nan
    refused(trained.checkpoint(tmp_path / "c", state), tmp_path, "holds NaN or infinity")


@pytest.mark.parametrize("part", ["lora_B.down", "gate.lora_A", "layers.1."])
def test_a_missing_tensor_is_refused(part, trained, tmp_path):
    state = get_peft_model_state_dict(trained.model)
    state = {key: tensor for key, tensor in state.items() if part not in key}
    refused(
        trained.checkpoint(tmp_path / "c", state), tmp_path, "lora_B|holds no A and B|no lora_A"
    )


def test_another_configuration_is_refused(trained, checkpoint, tmp_path):
    other = Trained(tmp_path / "other", r=3)
    refused(checkpoint, tmp_path, "r=3|rank", config=other.saved)


def test_an_interrupted_save_and_missing_shards_are_refused(checkpoint, tmp_path):
    shard = next((checkpoint / SHARDS).glob("*.distcp"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    refused(checkpoint, tmp_path, "cannot be read|NaN")
    shard.unlink()
    refused(checkpoint, tmp_path, "misses")
    (checkpoint / SHARDS / ".metadata").unlink()
    refused(checkpoint, tmp_path, "saving was interrupted")


class _Runs:
    """A pickle that would write a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.write_text, (self.file, "was run")


def test_metadata_that_would_run_code_are_refused(checkpoint, tmp_path):
    file = tmp_path / "run"
    (checkpoint / SHARDS / ".metadata").write_bytes(pickle.dumps(_Runs(file)))
    refused(checkpoint, tmp_path, "which no such file needs")
    assert not file.exists()


def test_what_is_no_checkpoint_is_named(trained, checkpoint, tmp_path):
    with pytest.raises(AdapterError, match="whole already"):
        consolidate_checkpoint(trained.saved, tmp_path / "out")
    with pytest.raises(AdapterError, match="is no checkpoint of a sharded training"):
        consolidate_checkpoint(trained.base, tmp_path / "out", config=trained.saved)
    with pytest.raises(ExistsError):
        consolidate_checkpoint(checkpoint, checkpoint, force=True)
    assert command(trained.base, tmp_path / "out").exit_code in (BAD, REFUSED)
