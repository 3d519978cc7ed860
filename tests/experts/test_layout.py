"""What the layout of an experts module says about the names of its parameters."""

import pytest

from helpers import experts_paths, tiny_model
from peft_moe_lora.experts.layout import read_layout


@pytest.mark.parametrize(
    ("family", "first"),
    [("qwen3_moe", "gate_up_proj"), ("gpt_oss", "gate_up_proj"), ("nemotron_h", "up_proj")],
)
def test_a_parameter_of_experts_belongs_to_one_projection(family, first):
    model = tiny_model(family)
    layout = read_layout(model.get_submodule(experts_paths(model)[0]))
    assert layout.projection_of == {first: "gate_up", "down_proj": "down"}
