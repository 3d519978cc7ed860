"""The names that a conversion writes mean to their readers what they meant before."""

import copy

import pytest
import torch
from peft import PeftModel

from convert.adapters import save_base, save_ours
from helpers import assert_close, outputs, tiny_model
from peft_moe_lora import convert_adapter
from peft_moe_lora.files.tensor_file import RefusedError

# fp32: what the promise of equal logits says
TOLERANCE = 1e-5


def test_a_short_target_names_no_layer_that_had_no_adapter(tmp_path):
    """The dense layer's up_proj is adapted, the shared experts' is not: the name is no target."""
    base = tiny_model("deepseek_v3")
    base.config.save_pretrained(tmp_path / "base")
    model = save_ours(
        base, tmp_path / "ours", target_modules=["experts", "model.layers.0.mlp.up_proj"]
    )
    again = tmp_path / "again"
    convert_adapter(tmp_path / "ours", again, to="moe_lora", base_config=tmp_path / "base")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), again).eval()
    assert_close(outputs(loaded), outputs(model), TOLERANCE, "logits")


@pytest.mark.parametrize(
    "settings", [{"layers_to_transform": [1]}, {"exclude_modules": r".*\.0\..*"}], ids=str
)
def test_layers_that_were_left_out_stay_so_without_a_base(settings, tmp_path):
    base = tiny_model()
    model = save_ours(base, tmp_path / "ours", target_modules=["experts", "q_proj"], **settings)
    convert_adapter(tmp_path / "ours", tmp_path / "again", to="moe_lora")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again").eval()
    assert_close(outputs(loaded), outputs(model), TOLERANCE, "logits")


@pytest.mark.parametrize("to", ["moe_lora", "peft", "per_expert"])
def test_a_router_saved_whole_comes_along_under_published_names(to, tmp_path):
    base = save_base("mixtral", tmp_path / "base")
    model = save_ours(base, tmp_path / "ours", modules_to_save=["gate"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "ours")
    convert_adapter(tmp_path / "ours", tmp_path / to, to=to, base_config=tmp_path / "base")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / to).eval()
    assert_close(outputs(again), outputs(model), TOLERANCE, "logits")


@pytest.mark.parametrize("name", ["down_proj", "model.layers.1.mlp.shared_experts.down_proj"])
def test_a_layer_that_peft_takes_for_experts_is_refused(name, tmp_path):
    """PEFT would replace the target by the experts' down_proj, and drop the layer's own LoRA."""
    base = save_base("deepseek_v3", tmp_path / "base")
    save_ours(base, tmp_path / "ours", target_modules=["experts", name])
    for base_config in (tmp_path / "base", None):
        with pytest.raises(RefusedError, match=r"PEFT takes .*down_proj"):
            convert_adapter(
                tmp_path / "ours", tmp_path / "peft", to="peft", base_config=base_config
            )
    assert not (tmp_path / "peft").exists()


def test_a_layer_of_that_name_beside_other_experts_is_converted(tmp_path):
    base = save_base("nemotron_h", tmp_path / "base")
    model = save_ours(base, tmp_path / "ours", target_modules=["experts", "down_proj"])
    convert_adapter(tmp_path / "ours", tmp_path / "peft", to="peft", base_config=tmp_path / "base")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").eval()
    assert_close(outputs(again), outputs(model), TOLERANCE, "logits")


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_layers_pattern_does_not_reach_the_experts(field, tmp_path):
    """The experts' parameter down_proj ends with the shared experts' name."""
    base = save_base("nemotron_h", tmp_path / "base")
    targets = ["experts", "down_proj"]
    pattern = {"shared_experts.down_proj": 3}
    model = save_ours(base, tmp_path / "ours", target_modules=targets, **{field: pattern})
    convert_adapter(tmp_path / "ours", tmp_path / "peft", to="peft", base_config=tmp_path / "base")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").eval()
    assert_close(outputs(again), outputs(model), TOLERANCE, "logits")
