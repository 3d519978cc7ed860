"""The names that a conversion writes mean to their readers what they meant before."""

import pytest
import torch

from convert.adapters import TOLERANCE, load, rewrite, save_base, save_ours, tensors
from helpers import assert_close, outputs, tiny_model
from peft_moe_lora import convert_adapter
from peft_moe_lora.experts.families import HUB_NAMES
from peft_moe_lora.files.tensor_file import RefusedError


def test_a_short_target_names_no_layer_that_had_no_adapter(tmp_path):
    """The dense layer's up_proj is adapted, the shared experts' is not: the name is no target."""
    base = tiny_model("deepseek_v3")
    base.config.save_pretrained(tmp_path / "base")
    model = save_ours(
        base, tmp_path / "ours", target_modules=["experts", "model.layers.0.mlp.up_proj"]
    )
    again = tmp_path / "again"
    convert_adapter(tmp_path / "ours", again, to="moe_lora", base_config=tmp_path / "base")
    loaded = load(base, again)
    assert_close(outputs(loaded), outputs(model), TOLERANCE, "logits")


@pytest.mark.parametrize(
    "settings", [{"layers_to_transform": [1]}, {"exclude_modules": r".*\.0\..*"}], ids=str
)
def test_layers_that_were_left_out_stay_so_without_a_base(settings, tmp_path):
    base = tiny_model()
    model = save_ours(base, tmp_path / "ours", target_modules=["experts", "q_proj"], **settings)
    convert_adapter(tmp_path / "ours", tmp_path / "again", to="moe_lora")
    loaded = load(base, tmp_path / "again")
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
    again = load(base, tmp_path / to)
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


@pytest.mark.parametrize("to", ["per_expert", "vllm_3d"])
def test_formats_of_servers_say_that_peft_drops_such_a_layer(to, tmp_path):
    base = save_base("deepseek_v3", tmp_path / "base")
    model = save_ours(base, tmp_path / "ours", target_modules=["experts", "down_proj"])
    out = tmp_path / to
    done = convert_adapter(tmp_path / "ours", out, to=to, base_config=tmp_path / "base")
    assert any("PEFT takes the name of" in note for note in done.notes), done.notes
    assert "PeftModel" not in (out / "README.md").read_text()
    # it is so: PEFT says nothing, and computes something else
    with pytest.raises(AssertionError):
        assert_close(outputs(load(base, out)), outputs(model), TOLERANCE)


@pytest.mark.parametrize("to", ["per_expert", "vllm_3d"])
def test_a_card_tells_how_peft_loads_what_it_reads(to, tmp_path):
    base = save_base("deepseek_v3", tmp_path / "base")
    model = save_ours(base, tmp_path / "ours", target_modules=["experts", "o_proj"])
    out = tmp_path / to
    convert_adapter(tmp_path / "ours", out, to=to, base_config=tmp_path / "base")
    assert "PeftModel" in (out / "README.md").read_text()
    assert_close(outputs(load(base, out)), outputs(model), TOLERANCE)


def test_a_layer_of_that_name_beside_other_experts_is_converted(tmp_path):
    base = save_base("nemotron_h", tmp_path / "base")
    model = save_ours(base, tmp_path / "ours", target_modules=["experts", "down_proj"])
    convert_adapter(tmp_path / "ours", tmp_path / "peft", to="peft", base_config=tmp_path / "base")
    again = load(base, tmp_path / "peft")
    assert_close(outputs(again), outputs(model), TOLERANCE, "logits")


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_layers_pattern_does_not_reach_the_experts(field, tmp_path):
    """The experts' parameter down_proj ends with the shared experts' name."""
    base = save_base("nemotron_h", tmp_path / "base")
    targets = ["experts", "down_proj"]
    pattern = {"shared_experts.down_proj": 3}
    model = save_ours(base, tmp_path / "ours", target_modules=targets, **{field: pattern})
    convert_adapter(tmp_path / "ours", tmp_path / "peft", to="peft", base_config=tmp_path / "base")
    again = load(base, tmp_path / "peft")
    assert_close(outputs(again), outputs(model), TOLERANCE, "logits")


def test_names_of_a_text_model_and_of_one_within_a_larger(qwen, tmp_path):
    """model.layers meets model.language_model.layers: the base says which it is."""

    def inner(state):
        return {
            n.replace("model.model.layers", "model.model.language_model.layers"): t
            for n, t in state.items()
        }

    convert_adapter(qwen.ours, tmp_path / "p", to="per_expert", base_config=qwen.config)
    rewrite(tmp_path / "p", inner)
    convert_adapter(tmp_path / "p", tmp_path / "ours", to="moe_lora", base_config=qwen.config)
    assert tensors(tmp_path / "ours").keys() == tensors(qwen.ours).keys()


def test_hub_names_are_transformers_own():
    """The table of old names against the mapping transformers loads checkpoints with."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for model_type, names in HUB_NAMES.items():
        mapping = get_checkpoint_conversion_mapping(model_type)
        if mapping is None:
            continue  # a family that this transformers does not have yet
        sources = [p.replace("\\", "") for c in mapping for p in c.source_patterns]
        of_experts = [s.rpartition(".weight")[0] for s in sources if ".experts.*" in s]
        leaves = {s.rpartition(".")[2] for s in of_experts}
        assert leaves == {names.gate, names.up, names.down}
        assert any("block_sparse_moe" in s for s in sources) == (names.block != "mlp")
        key = f"model.layers.0.mlp.experts.3.{names.up}.lora_A"
        assert names.from_hub(names.to_hub(key)) == key
    assert HUB_NAMES["phimoe"].to_hub("layers.0.mlp.router") == "layers.0.block_sparse_moe.gate"
    assert HUB_NAMES["kimi_linear"].to_hub("layers.0.mlp.gate_proj") == "layers.0.mlp.gate_proj"


def test_no_family_with_names_of_its_own_is_forgotten():
    """Every model type of the installed transformers whose published experts are w1, w2, w3."""
    from transformers import CONFIG_MAPPING
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for model_type in CONFIG_MAPPING:
        sources = [
            p
            for c in get_checkpoint_conversion_mapping(model_type) or ()
            for p in c.source_patterns
        ]
        if any("experts.*.w1" in s.replace("\\", "") for s in sources):
            assert model_type in HUB_NAMES
