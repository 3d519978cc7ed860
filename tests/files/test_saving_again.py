"""What is saved again describes itself once, and names modules as they are without wrappers."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from helpers import QWEN3_MOE, build_experts, experts_paths, moe_lora, tiny_model, wrap
from peft_moe_lora.files.adapter_file import read_adapter_file

FILE = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
KEY = "peft_moe_lora"


def description(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()[KEY])


def test_a_pickle_saved_over_an_adapter_is_refused_and_removed(tmp_path):
    model = wrap(build_experts(*QWEN3_MOE))
    model.save_pretrained(tmp_path)
    saved = (tmp_path / FILE).read_bytes()
    with pytest.raises(ValueError, match="safe_serialization=False"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / PICKLE).exists()
    assert (tmp_path / FILE).read_bytes() == saved


def test_an_older_pickle_beside_it_is_nobodys(tmp_path):
    (tmp_path / PICKLE).write_bytes(b"of another program")
    model = wrap(build_experts(*QWEN3_MOE))
    model.save_pretrained(tmp_path)
    assert (tmp_path / PICKLE).read_bytes() == b"of another program"
    assert description(tmp_path / FILE)["experts"]


def test_a_configuration_saved_alone_describes_no_file(tmp_path):
    model = wrap(build_experts(*QWEN3_MOE))
    model.save_pretrained(tmp_path / "adapter")
    other = tmp_path / "other"
    other.mkdir()
    save_file({"weight": torch.ones(3)}, other / FILE)
    before = (other / FILE).read_bytes()
    model.peft_config["default"].save_pretrained(other)
    assert (other / FILE).read_bytes() == before
    assert not (other / "README.md").exists()


def test_compiled_blocks_are_described_by_their_own_paths(tmp_path):
    base = tiny_model()
    paths = experts_paths(base)
    model = moe_lora(base, target_modules=["experts", "gate"])
    layers = model.base_model.model.model.layers
    for i in range(len(layers)):
        layers[i] = torch.compile(layers[i], backend="eager")
    model.save_pretrained(tmp_path)
    described = description(tmp_path / FILE)
    assert sorted(described["experts"]) == paths
    assert sorted(described["routers"]) == [path.replace("experts", "gate") for path in paths]


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None, 3])
def test_a_format_version_that_no_file_can_have_is_refused(version, tmp_path):
    wrap(build_experts(*QWEN3_MOE)).save_pretrained(tmp_path)
    described = description(tmp_path / FILE) | {"format_version": version}
    path = tmp_path / "changed.safetensors"
    save_file({"weight": torch.ones(3)}, path, metadata={KEY: json.dumps(described)})
    with pytest.raises(ValueError, match=r"format_version .* is not known; this version reads 1"):
        read_adapter_file(str(path))
