"""Names for experts that people write in target_modules, on ten families.

Each adapts what a reader would expect, or the message says what to write instead.
"""

import logging

import pytest
from peft import PeftModel, get_peft_model
from torch import nn

from families.off_interface import off_interface_model
from helpers import QWEN3_MOE, Holder, build_experts, tiny_model
from peft_moe_lora import MoELoraConfig
from peft_moe_lora.layers.layer import MoELoraLayer

FAMILIES = [
    "qwen3_moe",
    "gpt_oss",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "deepseek_v3",
    "gemma4",
    "qwen3_next",
    "qwen2_moe",
    "llama4",
]
# the block that holds the experts, where it is not "mlp"
BLOCKS = {"nemotron_h": "mixer", "gemma4": None, "llama4": "feed_forward"}
# families whose dense layers or shared experts have all three names of transformers 4
WITH_DENSE_LAYERS = {"deepseek_v3", "gemma4", "qwen3_next", "qwen2_moe", "llama4"}
every_family = pytest.mark.parametrize("family", FAMILIES)


def built(family):
    if family == "llama4":
        return off_interface_model(family)
    return tiny_model(family)


def adapted(family, target_modules, **changes):
    """Paths of the experts modules with an adapter, and the model."""
    config = MoELoraConfig(r=2, target_modules=target_modules, **changes)
    model = get_peft_model(built(family), config)
    return [n for n, m in model.named_modules() if isinstance(m, MoELoraLayer)], model


@every_family
@pytest.mark.parametrize("name", ["experts", ["experts"]], ids=str)
def test_experts_are_every_experts_module(family, name):
    found, model = adapted(family, name)
    assert len(found) == (1 if family == "deepseek_v3" else 2)
    assert all(path.endswith("experts") for path in found)
    assert model.peft_config["default"].target_modules == {"experts"}


@every_family
def test_the_block_beside_the_name(family):
    block = BLOCKS.get(family, "mlp")
    if block == "mlp":
        for name in (["mlp.experts"], "mlp.experts"):
            found, _ = adapted(family, name)
            assert found
        return
    with pytest.raises(ValueError, match=r"'mlp.experts' matches no module .* Write 'experts'\."):
        adapted(family, ["mlp.experts"])
    if block is not None:
        assert adapted(family, [f"{block}.experts"])[0]


@every_family
def test_parameters_are_pointed_to_target_parameters(family):
    with pytest.raises(ValueError, match=r"target_modules: '\w+' matches no module") as refused:
        adapted(family, ["gate_up_proj", "down_proj"])
    message = str(refused.value)
    if family == "nemotron_h":
        # it has no gate, so the name is of no parameter
        assert "Did you mean 'up_proj'?" in message
        return
    assert "name it in target_parameters, or write 'experts' in target_modules" in message
    found, _ = adapted(family, None, target_parameters=["gate_up_proj", "down_proj"])
    assert found


@every_family
def test_numbered_names_are_pointed_to_experts(family):
    with pytest.raises(
        ValueError, match=r"'w1' matches no module .* Write 'experts' in target_mod"
    ):
        adapted(family, ["w1", "w2", "w3"])


@every_family
@pytest.mark.parametrize("attention", [False, True], ids=["", "attention"])
def test_names_of_transformers_4_never_leave_the_experts_out_without_a_word(
    family, attention, caplog
):
    names = ["gate_proj", "up_proj", "down_proj"]
    if attention:
        names.append("q_a_proj" if family == "deepseek_v3" else "q_proj")
    if family not in WITH_DENSE_LAYERS:
        with pytest.raises(ValueError, match=r"matches no module .* write 'experts'|Write 'exper"):
            adapted(family, names)
        return
    with caplog.at_level(logging.WARNING, "peft_moe_lora"):
        found, _ = adapted(family, names)
    assert found == []
    assert "no expert gets an adapter" in caplog.text
    assert "add ['experts']" in caplog.text
    caplog.clear()
    found, _ = adapted(family, [*names, "experts"])
    assert found
    assert not caplog.records


def test_attention_alone_is_what_it_says(caplog):
    found, _ = adapted("qwen2_moe", ["q_proj", "v_proj"])
    assert found == []
    assert not caplog.records


def test_a_saved_adapter_of_dense_layers_loads_without_the_warning(tmp_path, caplog):
    _, model = adapted("qwen2_moe", ["gate_proj", "up_proj", "down_proj"])
    model.save_pretrained(tmp_path)
    caplog.clear()
    PeftModel.from_pretrained(built("qwen2_moe"), tmp_path)
    assert "no expert gets" not in caplog.text


@pytest.mark.parametrize("expression", [r".*\.experts", r".*layers\.1\.mlp\.experts"])
def test_an_expression_stays_an_expression(expression):
    found, model = adapted("qwen3_moe", expression)
    assert len(found) == (1 if "1" in expression else 2)
    assert model.peft_config["default"].target_modules == expression


def test_a_name_that_is_a_whole_path_is_that_module_alone():
    base = nn.Module()
    base.experts = build_experts(*QWEN3_MOE)
    base.block = Holder(build_experts(*QWEN3_MOE))
    model = get_peft_model(base, MoELoraConfig(r=2, target_modules="experts"))
    found = [n for n, m in model.named_modules() if isinstance(m, MoELoraLayer)]
    assert found == ["base_model.model.experts"]


def test_a_string_that_is_no_name_and_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="not found in the base model"):
        adapted("qwen3_moe", "expert")
