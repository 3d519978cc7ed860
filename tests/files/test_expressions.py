"""Expressions of a configuration are valid, and are matched in bounded time."""

import pytest

from peft_moe_lora import MoELoraConfig

RUNS_FOR_EVER = ["(a+)+b", "(.*)*x", "(a|a)*b", "(.*a){20}", "a?" * 40, ".*" * 9 + "x", "(.?){40}x"]
OF_EXPRESSIONS = {
    "target_modules": lambda e: e,
    "exclude_modules": lambda e: e,
    "rank_pattern": lambda e: {e: 2},
    "alpha_pattern": lambda e: {e: 2},
    "expert_indices": lambda e: {e: [0]},
    "modules_to_save": lambda e: [e],
    "layers_pattern": lambda e: [e],
}


@pytest.mark.parametrize("field", OF_EXPRESSIONS)
@pytest.mark.parametrize("expression", RUNS_FOR_EVER)
def test_an_expression_that_could_run_for_ever_is_refused(field, expression):
    with pytest.raises(ValueError, match=rf"{field}: .*run for ever"):
        MoELoraConfig(**{field: OF_EXPRESSIONS[field](expression)})


@pytest.mark.parametrize(
    "expression",
    [
        r".*\.(experts|gate|q_proj)",
        r"^(?!.*vision).*layers\.([0-9]|1[0-9])\.self_attn\.(q_proj|v_proj)$",
        r"model\.layers\.\d{1,3}\.mlp\.experts",
        # as other libraries write it
        r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|ffn)"
        r".*?(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp)\.(?:(?:q_proj|k_proj)))",
    ],
)
def test_an_ordinary_expression_is_taken(expression):
    assert MoELoraConfig(target_modules=expression).target_modules == expression
    MoELoraConfig(rank_pattern={expression: 2}, alpha_pattern={expression: 2})


def test_an_expression_of_many_characters_is_refused():
    with pytest.raises(ValueError, match="at most 100000 characters"):
        MoELoraConfig(target_modules="x" * 100_001)


@pytest.mark.parametrize("field", ["modules_to_save", "layers_pattern"])
def test_names_that_peft_puts_into_expressions_must_be_some(field):
    with pytest.raises(ValueError, match=rf"{field}: .* neither a path nor a regular expression"):
        MoELoraConfig(**{field: ["head("]})
