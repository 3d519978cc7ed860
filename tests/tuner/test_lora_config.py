"""A LoraConfig becomes our configuration, and ours a LoraConfig, with the same adapted weights."""

import copy
import re
from dataclasses import fields

import pytest
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model

from helpers import R, fill_adapter, outputs, relative_error, tiny_families, tiny_model
from peft_moe_lora import MoELoraConfig
from peft_moe_lora.files.field_rules import RULES
from peft_moe_lora.files.peft_words import _LEFT
from tuner.test_pefts_words import DOWN, GATE_UP, assert_same_as_in_peft

WORDS = {
    "parameters": {"target_parameters": [GATE_UP, DOWN]},
    "parameters and layers": {
        "target_parameters": [DOWN],
        "target_modules": ["q_proj", "o_proj"],
        "rank_pattern": {"experts.down_proj": 2, "o_proj": 3},
        "alpha_pattern": {"0.mlp.experts.down_proj": 5},
        "use_rslora": True,
    },
    "a regular expression": {"target_parameters": [GATE_UP], "target_modules": r".*\.q_proj"},
}


@pytest.mark.parametrize("words", WORDS)
def test_a_lora_config_means_the_same_here(words):
    base = tiny_model()
    theirs = LoraConfig(r=R, lora_alpha=7, task_type="CAUSAL_LM", **copy.deepcopy(WORDS[words]))
    before = theirs.to_dict()
    config = MoELoraConfig.from_lora_config(theirs, backend="torch")
    assert (config.r, config.lora_alpha, config.task_type) == (R, 7, "CAUSAL_LM")
    assert config.backend == "torch"
    ours = get_peft_model(copy.deepcopy(base), config)
    fill_adapter(ours)
    assert theirs.to_dict() == before
    assert_same_as_in_peft(base, ours, theirs)


def test_the_lora_config_shares_no_value_with_ours():
    theirs = LoraConfig(target_modules=["experts"], rank_pattern={"experts": 2})
    ours = MoELoraConfig.from_lora_config(theirs)
    back = ours.to_lora_config()
    ours.rank_pattern["experts"] = 3
    ours.target_modules.add("gate")
    assert theirs.rank_pattern == {"experts": 2}
    assert theirs.target_modules == {"experts"}
    assert list(back.rank_pattern.values()) == [2]


OURS = {
    "every experts module": {},
    "down alone": {"target_projections": ["down"], "target_modules": ["experts", "q_proj"]},
    "one layer": {"target_modules": ["layers.1.mlp.experts"], "use_rslora": True},
    "ranks": {
        "target_modules": ["mlp.experts", "q_proj"],
        "rank_pattern": {"1.mlp.experts": 2, r".*\.0\..*q_proj": 3},
        "alpha_pattern": {r".*\.experts": 5},
    },
    "parameters": {"target_parameters": [DOWN], "target_modules": r".*\.v_proj"},
}


@pytest.mark.parametrize("attached", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("case", OURS)
def test_our_configuration_means_the_same_in_peft(case, attached):
    base = tiny_model()
    config = MoELoraConfig(r=R, **copy.deepcopy(OURS[case]))
    theirs = config.to_lora_config()
    ours = get_peft_model(copy.deepcopy(base), config)
    if attached:
        theirs = config.to_lora_config()
    fill_adapter(ours)
    assert type(theirs) is LoraConfig
    assert_same_as_in_peft(base, ours, theirs)


@pytest.mark.parametrize("family", tiny_families())
def test_there_and_back_adapts_the_same(family):
    base = tiny_model(family)
    there = MoELoraConfig(r=R, target_projections=["gate_up"]).to_lora_config()
    back = MoELoraConfig.from_lora_config(there)
    models = []
    for config in (MoELoraConfig(r=R, target_projections=["gate_up"]), back):
        model = get_peft_model(copy.deepcopy(base), config)
        fill_adapter(model)
        models.append(outputs(model))
    assert relative_error(models[0], outputs(base)) > 0.1
    assert relative_error(models[0], models[1]) == 0


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"target_modules": ["q_proj"], "use_dora": True}, "use_dora"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "init_lora_weights"),
        ({}, "target_modules=None"),
        ({"target_parameters": [DOWN], "layers_to_transform": [0]}, "layers_to_transform"),
    ],
    ids=str,
)
def test_what_has_no_meaning_on_experts_is_refused_by_name(config, named):
    with pytest.raises(ValueError, match=named):
        MoELoraConfig.from_lora_config(LoraConfig(**config))


@pytest.mark.parametrize("config", [IA3Config(), AdaLoraConfig(total_step=9)], ids=["ia3", "ada"])
def test_another_tuners_configuration_is_refused(config):
    with pytest.raises(TypeError, match=type(config).__name__):
        MoELoraConfig.from_lora_config(config)


def test_fields_that_are_left_out_are_fields_of_a_lora_config():
    assert {field.name for field in fields(LoraConfig)} > set(_LEFT)


def test_a_field_that_is_not_known_is_refused(monkeypatch):
    """A field that a new release of PEFT adds is looked at, before it is taken."""
    monkeypatch.delitem(RULES, "use_rslora")
    MoELoraConfig.from_lora_config(LoraConfig(target_modules=["experts"]))
    with pytest.raises(ValueError, match="use_rslora=True"):
        MoELoraConfig.from_lora_config(LoraConfig(target_modules=["experts"], use_rslora=True))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"expert_indices": {"experts": [1]}}, "expert_indices"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"layers_to_transform": 0}, "layers_to_transform=0"),
        ({"exclude_modules": ["0.mlp.experts"]}, "exclude_modules"),
        ({"exclude_modules": r".*\.0\..*", "target_modules": ["experts"]}, "exclude_modules"),
        ({"target_modules": r".*\.experts"}, "target_modules=.*regular expression"),
        ({"target_modules": ["all-linear", "gate"]}, "target_modules=.*all-linear"),
        ({"target_modules": ["experts", "down_proj"]}, "target_modules: 'down_proj'"),
        ({"rank_pattern": {r".*\.1\..*": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"experts|gate": 2}}, "alpha_pattern"),
        ({"target_parameters": [DOWN], "lora_dropout": 0.1}, "lora_dropout"),
    ],
    ids=str,
)
def test_what_a_lora_config_cannot_say_is_refused_by_name(config, named):
    with pytest.raises(ValueError, match=re.compile(named)):
        MoELoraConfig(**config).to_lora_config()


def test_all_linear_is_said_once_the_layers_are_named():
    base = tiny_model()
    config = MoELoraConfig(r=R, target_modules="all-linear")
    ours = get_peft_model(copy.deepcopy(base), config)
    fill_adapter(ours)
    assert_same_as_in_peft(base, ours, config.to_lora_config())


def test_what_does_not_concern_experts_is_said():
    config = MoELoraConfig(target_modules=["q_proj"], lora_dropout=0.1, layers_to_transform=[1])
    theirs = config.to_lora_config()
    assert (theirs.lora_dropout, theirs.layers_to_transform) == (0.1, [1])
    assert theirs.target_parameters is None
