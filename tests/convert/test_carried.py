"""What a conversion carries beside the experts: scalings, ranks, routers, modules saved whole."""

import pytest
import torch

from convert.adapters import (
    READ_BY_PEFT,
    TOLERANCE,
    UPDATE_READERS,
    config_of,
    load,
    rewrite,
    save_base,
    save_ours,
    save_pefts,
    tensors,
)
from helpers import assert_close, outputs
from peft_moe_lora import convert_adapter, verify_adapter
from peft_moe_lora.convert.formats import FORMATS
from peft_moe_lora.files.tensor_file import RefusedError


@pytest.mark.parametrize("to", UPDATE_READERS)
def test_every_scaling_and_rank_arrives(qwen, tmp_path, to):
    """rsLoRA, ranks and alphas by pattern, and attention at once: every reader agrees."""
    model = save_ours(
        qwen.base,
        tmp_path / "ours",
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["experts", "q_proj", "v_proj"],
        rank_pattern={"layers.1.mlp.experts": 2, "q_proj": 3},
        alpha_pattern={"layers.0.mlp.experts": 5},
    )
    done = convert_adapter(tmp_path / "ours", tmp_path / to, to=to, base_config=qwen.config)
    config, notes = config_of(tmp_path / to), " ".join(done.notes)
    if FORMATS[to].one_rank:
        assert not config["rank_pattern"]
        assert not config["alpha_pattern"]
        assert not config["use_rslora"]
        assert "padded with zeros to 4" in notes
        assert "folded into B" in notes
    if to in READ_BY_PEFT:
        assert_close(outputs(load(qwen.base, tmp_path / to)), outputs(model), TOLERANCE, "logits")
    assert verify_adapter(tmp_path / "ours", qwen.config, tmp_path / to).ok
    convert_adapter(tmp_path / to, tmp_path / "back", to="moe_lora", base_config=qwen.config)
    assert_close(outputs(load(qwen.base, tmp_path / "back")), outputs(model), TOLERANCE, "logits")


def test_attention_router_and_saved_modules_travel(qwen, tmp_path):
    model = save_ours(qwen.base, tmp_path / "ours", target_modules=["experts", "q_proj", "v_proj"],
                      modules_to_save=["lm_head"])  # fmt: skip
    with torch.no_grad():
        model.get_submodule("base_model.model.lm_head").modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path / "ours")
    for to in ("peft", "per_expert"):
        done = convert_adapter(tmp_path / "ours", tmp_path / to, to=to, base_config=qwen.config)
        assert_close(outputs(load(qwen.base, tmp_path / to)), outputs(model), TOLERANCE, "logits")
    assert any("LoRA alone" in note for note in done.notes)
    for to in ("vllm_3d", "sglang_3d"):
        with pytest.raises(RefusedError, match="loads LoRA alone"):
            convert_adapter(tmp_path / "ours", tmp_path / to, to=to, base_config=qwen.config)


@pytest.mark.parametrize("with_base", [True, False])
def test_a_router_of_pefts_travels(qwen, tmp_path, with_base):
    targets = ["experts.gate_up_proj", "experts.down_proj", "gate.weight"]
    theirs = save_pefts(
        qwen.base, tmp_path / "theirs", target_parameters=targets, rank_pattern={"gate.weight": 2}
    )
    base_config = qwen.config if with_base else None
    assert [n for n in tensors(tmp_path / "theirs") if "mlp.gate.lora_A" in n]
    for to in ("moe_lora", "peft", *(["vllm_3d", "per_expert"] if with_base else [])):
        convert_adapter(tmp_path / "theirs", tmp_path / to, to=to, base_config=base_config)
        assert_close(outputs(load(qwen.base, tmp_path / to)), outputs(theirs), TOLERANCE, to)
    assert config_of(tmp_path / "moe_lora")["rank_pattern"] == {"gate": 2}


@pytest.mark.parametrize("with_base", [True, False])
def test_a_router_of_ours_travels_and_comes_back(qwen, tmp_path, with_base):
    """For PEFT a router is a parameter, for us and for servers a module.

    Without the base model the file itself has to say which.
    """
    targets = ["experts", "gate", "q_proj", "v_proj"]
    ours = save_ours(qwen.base, tmp_path / "ours", target_modules=targets, rank_pattern={"gate": 2})
    base_config = qwen.config if with_base else None
    for to in ("moe_lora", "peft", *(["vllm_3d", "per_expert"] if with_base else [])):
        convert_adapter(tmp_path / "ours", tmp_path / to, to=to, base_config=base_config)
        assert_close(outputs(load(qwen.base, tmp_path / to)), outputs(ours), TOLERANCE, to)
        convert_adapter(
            tmp_path / to, tmp_path / "back", to="moe_lora", base_config=base_config, force=True
        )
        assert_close(
            outputs(load(qwen.base, tmp_path / "back")), outputs(ours), TOLERANCE, f"{to} and back"
        )
    assert "gate.weight" in config_of(tmp_path / "peft")["target_parameters"]
    assert config_of(tmp_path / "peft")["rank_pattern"] == {"gate.weight": 2}
    if with_base:
        assert verify_adapter(tmp_path / "ours", qwen.config, tmp_path / "per_expert").ok


def test_a_router_that_is_a_linear_layer_with_a_forward_of_its_own_travels(tmp_path):
    """phimoe's router is a linear layer that returns a tuple, so for PEFT it is a parameter too."""
    base = save_base("phimoe", tmp_path / "base")
    model = save_ours(base, tmp_path / "ours", target_modules=["experts", "router"])
    for to in ("peft", "moe_lora"):
        convert_adapter(tmp_path / "ours", tmp_path / to, to=to, base_config=tmp_path / "base")
        loaded = load(base, tmp_path / to)
        assert_close(outputs(loaded), outputs(model), TOLERANCE, to)
    assert "router.weight" in config_of(tmp_path / "peft")["target_parameters"]
    convert_adapter(
        tmp_path / "peft", tmp_path / "back", to="moe_lora", base_config=tmp_path / "base"
    )
    assert tensors(tmp_path / "back").keys() == tensors(tmp_path / "ours").keys()


def test_routers_saved_whole_travel_with_what_ends_on_their_name(tmp_path):
    """PEFT matches modules_to_save by the ends of names: "gate" matches shared_expert_gate too."""
    base = save_base("qwen2_moe", tmp_path / "base")
    model = save_ours(base, tmp_path / "ours", modules_to_save=["gate"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.mul_(1.5)
    saved = {
        name.split(".")[-2] for name in tensors(tmp_path / "ours") if name.endswith("gate.weight")
    }
    assert saved == {"gate", "shared_expert_gate"}
    model.save_pretrained(tmp_path / "ours")
    for to in ("peft", "moe_lora"):
        convert_adapter(tmp_path / "ours", tmp_path / to, to=to, base_config=tmp_path / "base")
        loaded = load(base, tmp_path / to)
        assert_close(outputs(loaded), outputs(model), TOLERANCE, to)


def test_what_some_reader_would_refuse_is_said(qwen, tmp_path):
    save_ours(qwen.base, tmp_path / "q", target_modules=["experts", "q_proj"])
    with pytest.raises(RefusedError, match=r"q_proj and v_proj together only.*has q_proj"):
        convert_adapter(tmp_path / "q", tmp_path / "out", to="sglang_3d", base_config=qwen.config)
    done = convert_adapter(
        tmp_path / "q", tmp_path / "out", to="per_expert", base_config=qwen.config
    )
    assert any("q_proj and v_proj together only" in note for note in done.notes)
    save_ours(qwen.base, tmp_path / "r", r=600, randomize=False)
    with pytest.raises(RefusedError, match="ranks up to 512"):
        convert_adapter(tmp_path / "r", tmp_path / "r-out", to="vllm_3d", base_config=qwen.config)
    with pytest.raises(RefusedError, match="--base-config"):
        convert_adapter(qwen.ours, tmp_path / "no-base", to="per_expert")


def test_adapted_layers_are_named_where_not_all_are(qwen, tmp_path):
    model = save_ours(qwen.base, tmp_path / "ours", layers_to_transform=[1])
    for base_config in (qwen.config, None):
        convert_adapter(
            tmp_path / "ours", tmp_path / "peft", to="peft", base_config=base_config, force=True
        )
        targets = config_of(tmp_path / "peft")["target_parameters"]
        assert targets == [f"model.layers.1.mlp.experts.{n}" for n in ("down_proj", "gate_up_proj")]
        assert_close(
            outputs(load(qwen.base, tmp_path / "peft")), outputs(model), TOLERANCE, "logits"
        )


def test_bf16_stays_bf16(qwen, tmp_path):
    save_ours(qwen.base, tmp_path / "ours", target_modules=["experts", "q_proj"])
    rewrite(
        tmp_path / "ours",
        lambda state: {n: t.bfloat16() if "experts" in n else t for n, t in state.items()},
    )
    convert_adapter(tmp_path / "ours", tmp_path / "p", to="per_expert", base_config=qwen.config)
    dtypes = {("experts" in n): t.dtype for n, t in tensors(tmp_path / "p").items()}
    assert dtypes == {True: torch.bfloat16, False: torch.float32}
    assert verify_adapter(tmp_path / "ours", qwen.config, tmp_path / "p").max_error == 0
