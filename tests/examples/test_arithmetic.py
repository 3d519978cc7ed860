"""distributed/arithmetic.py: its table is in the docs, and its formulas count what layers hold."""

import sys
from pathlib import Path

import pytest

from helpers import adapter_parameters, moe_lora, tiny_model

sys.path.append(str(Path(__file__).parents[2] / "examples" / "distributed"))

import arithmetic


def test_the_docs_have_its_table():
    again = "run python examples/distributed/arithmetic.py"
    assert arithmetic.written() == arithmetic.table(), again


def test_an_adapter_has_as_many_parameters():
    model = moe_lora(tiny_model("qwen3_moe"), r=arithmetic.RANK)
    config = model.config
    tiny = arithmetic.Model(
        "tiny",
        parameters=0.0,
        layers=config.num_hidden_layers,
        E=config.num_experts,
        H=config.hidden_size,
        I=config.moe_intermediate_size,
        top_k=2,
    )
    held = sum(p.numel() for p in adapter_parameters(model).values())
    assert tiny.adapter_of_layer * tiny.layers == held
    experts = model.base_model.model.model.layers[0].mlp.experts.base_layer
    stacks = experts.gate_up_proj.numel() + experts.down_proj.numel()
    assert tiny.experts_of_layer == stacks


@pytest.mark.parametrize("model", arithmetic.MODELS, ids=lambda model: model.name)
def test_experts_are_most_of_a_model_and_no_more(model):
    share = model.experts_of_layer * model.layers / model.parameters
    assert 0.9 < share < 1
