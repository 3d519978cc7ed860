"""PEFT's words in our configuration mean what they mean in PEFT, or an error says which does not.

`target_parameters` and patterns with names of parameters give the ranks, scalings and merged
weights of `LoraConfig`; "all-linear" also means the experts.
"""

import copy
import re

import pytest
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper

from families.off_interface import off_interface_model
from helpers import (
    R,
    assert_close,
    assert_unchanged,
    experts_adapter,
    experts_paths,
    fill_adapter,
    outputs,
    rank_major,
    relative_error,
    snapshot,
    tiny_model,
)
from peft_moe_lora import MoELoraConfig

TOLERANCE = 1e-5
GATE_UP = "mlp.experts.gate_up_proj"
DOWN = "experts.down_proj"
PROJECTION = {"gate_up_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down"}


def adapted(base, randomize=True, **fields):
    """A copy of `base` with our adapter of these fields, and PEFT's words in them."""
    model = get_peft_model(copy.deepcopy(base), MoELoraConfig(**{"r": R, **fields}))
    if randomize:
        fill_adapter(model)
    return model


def in_peft(base, ours, config):
    """A copy of `base` with PEFT's own adapter of a LoraConfig, and A and B of `ours`."""
    theirs = get_peft_model(copy.deepcopy(base), config)
    named = dict(ours.named_parameters())
    copied = set()
    for path, module in theirs.named_modules():
        if isinstance(module, ParamWrapper):
            clean = path.replace(".base_layer", "")
            projection = PROJECTION[module.parameter_name]
            A = named[f"{clean}.lora_A.default.{projection}"]
            B = rank_major(named[f"{clean}.lora_B.default.{projection}"], module.num_experts)
            key = projection
        elif f"{path}.lora_A.default.weight" in named and hasattr(module, "lora_A"):
            clean, key = path, "weight"
            A = named[f"{path}.lora_A.default.weight"]
            B = named[f"{path}.lora_B.default.weight"]
        else:
            continue
        for side, value in (("lora_A", A), ("lora_B", B)):
            weight = getattr(module, side)["default"].weight
            # `copy_` broadcasts silently where a shape is wrong
            assert weight.shape == value.shape, path
            weight.data.copy_(value.data)
            copied.add(f"{clean}.{side}.default.{key}")
    assert copied == {name for name in named if ".lora_" in name}
    return theirs


def assert_same_as_in_peft(base, ours, config):
    """`ours`, an adapted copy of `base`, is what a LoraConfig makes of `base` with its A and B."""
    theirs = in_peft(base, ours, config)
    # A and B of one layer change less than those of all
    assert relative_error(outputs(ours), outputs(base)) > 0.1
    assert_close(outputs(ours), outputs(theirs), TOLERANCE, "logits")
    merged = ours.merge_and_unload().state_dict()
    for name, weight in theirs.merge_and_unload().state_dict().items():
        assert_close(merged[name], weight, TOLERANCE, name)


def refusal(base, **fields):
    """The message of the error that refuses these fields; the model is left as it was."""
    model = copy.deepcopy(base)
    before = snapshot(model)
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the caller reads the message
        get_peft_model(model, MoELoraConfig(**{"r": R, **fields}))
    assert_unchanged(model, before)
    return str(error.value)


# ---- target_parameters ---------------------------------------------------------------------------

# what is given -> for which family; nothing in it is a word of our own
PEFTS = {
    "both projections": ("qwen3_moe", {"target_parameters": [GATE_UP, DOWN]}),
    "gate_up alone": ("qwen3_moe", {"target_parameters": [GATE_UP], "target_modules": []}),
    "down of one layer": ("gpt_oss", {"target_parameters": [f"layers.1.mlp.{DOWN}"]}),
    "transposed": ("gpt_oss", {"target_parameters": [GATE_UP, DOWN], "lora_alpha": 3}),
    "no gate": ("nemotron_h", {"target_parameters": ["experts.up_proj"], "target_modules": []}),
    # PEFT rewrites the configuration of a Mixtral
    "mixtral": ("mixtral", {"target_parameters": [GATE_UP, DOWN]}),
    "names beside": ("qwen3_moe", {"target_parameters": [DOWN], "target_modules": ["q_proj"]}),
    "a pattern beside": (
        "qwen3_moe",
        {"target_parameters": [GATE_UP, DOWN], "target_modules": r".*\.1\..*\.(q|o)_proj"},
    ),
    "all-linear beside": (
        "gpt_oss",
        {"target_parameters": [f"0.{GATE_UP}"], "target_modules": "all-linear"},
    ),
    "gate_up in one layer, down in another": (
        "qwen3_moe",
        {"target_parameters": [f"0.{GATE_UP}", f"1.mlp.{DOWN}"]},
    ),
    "both in one layer, down in another": (
        "gpt_oss",
        {
            "target_parameters": [f"0.{GATE_UP}", DOWN],
            "target_modules": ["q_proj"],
            "rank_pattern": {"1.mlp.experts.down_proj": 2},
        },
    ),
    "a rank for every parameter": (
        "qwen3_moe",
        {
            "target_parameters": [GATE_UP, DOWN],
            "rank_pattern": {"experts.gate_up_proj": 2, "experts.down_proj": 2},
            "alpha_pattern": {r"0\.mlp\.experts\.(gate_up|down)_proj": 5},
        },
    ),
    "a rank of a parameter and of a layer": (
        "nemotron_h",
        {
            "target_parameters": [DOWN],
            "target_modules": ["shared_experts.down_proj"],
            "rank_pattern": {"down_proj": 2},
        },
    ),
    "a rank of one of two layers": (
        "qwen3_moe",
        {
            "target_parameters": [DOWN],
            "target_modules": ["q_proj"],
            "rank_pattern": {f"1.mlp.{DOWN}": 3, "0.self_attn.q_proj": 1},
            "alpha_pattern": {"down_proj": 7},
            "use_rslora": True,
        },
    ),
}


@pytest.mark.parametrize("case", PEFTS)
def test_merged_weights_are_those_of_peft(case):
    family, fields = PEFTS[case]
    base = tiny_model(family)
    ours = adapted(base, **copy.deepcopy(fields))
    assert_same_as_in_peft(base, ours, LoraConfig(r=R, **copy.deepcopy(fields)))


@pytest.mark.parametrize("case", ["down of one layer", "a rank of one of two layers"])
def test_a_saved_adapter_names_modules_and_loads_again(case, tmp_path):
    family, fields = PEFTS[case]
    base = tiny_model(family)
    model = adapted(base, **copy.deepcopy(fields))
    model.save_pretrained(tmp_path)
    saved = MoELoraConfig.from_pretrained(tmp_path)
    assert saved.target_parameters is None
    assert saved.target_projections == ["down"]
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close(outputs(loaded), outputs(model), TOLERANCE, "logits")


def test_a_configuration_that_is_saved_before_its_first_model_keeps_the_words(tmp_path):
    MoELoraConfig(r=R, target_parameters=[DOWN]).save_pretrained(tmp_path)
    config = MoELoraConfig.from_pretrained(tmp_path)
    model = get_peft_model(tiny_model(), config)
    assert list(experts_adapter(model, experts_paths(tiny_model())[0])) == ["down"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"target_parameters": ["gate.weight"]}, "gate.weight.*target_modules instead"),
        ({"target_parameters": ["weight"]}, "'weight' names"),
        ({"target_parameters": ["experts.gate_up_pro"]}, "mean 'experts.gate_up_proj'"),
        ({"target_parameters": [DOWN], "target_modules": ["experts"]}, "target_modules names too"),
        (
            {"target_parameters": [DOWN], "exclude_modules": ["0.mlp.experts"]},
            "but exclude_modules",
        ),
        (
            {"target_parameters": [DOWN], "modules_to_save": ["experts"]},
            "but exclude_modules or modules_to",
        ),
        ({"target_parameters": [DOWN], "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_parameters": [DOWN], "target_projections": ["down"]}, "target_projections"),
        ({"target_modules": ["all-linear"], "layers_to_transform": [0]}, "layers_to_transform"),
        ({"target_modules": ["expert"]}, "mean 'experts'"),
        ({"target_modules": ["gate_up_proj"]}, "name it in target_parameters"),
        ({"target_modules": ["w1"]}, r"called \['experts'\].*transformers 4"),
        ({"target_modules": ["gate_proj", "up_proj"]}, "'gate_proj' matches no.*transformers 4"),
        ({"target_modules": ["self_atn.q_proj"]}, "mean 'self_attn.q_proj'"),
        ({"target_projections": ["gate_up_proj"]}, "mean 'gate_up'"),
        (
            {"target_modules": ["experts"], "rank_pattern": {"experts.down_proj": 2}},
            "rank_pattern gives .*'gate_up_proj': 4, 'down_proj': 2",
        ),
        (
            {"target_parameters": [GATE_UP, DOWN], "alpha_pattern": {GATE_UP: 2}},
            "alpha_pattern gives .*'gate_up_proj': 2, 'down_proj': 8",
        ),
    ],
    ids=str,
)
def test_what_an_adapter_cannot_hold_is_refused_by_name(fields, named):
    message = refusal(tiny_model(), **fields)
    assert re.search(named, message), message


def test_a_bias_of_experts_is_no_projection():
    message = refusal(tiny_model("gpt_oss"), target_parameters=["experts.gate_up_proj_bias"])
    assert "gate_up_proj_bias, which holds no projection" in message


def test_peft_warns_of_an_entry_that_names_nothing():
    ranks = {"experts.down_proj": 2, "no.such.name": 3}
    with pytest.warns(RuntimeWarning, match=r"\['no.such.name'\]"):
        model = adapted(tiny_model(), target_parameters=[DOWN], rank_pattern=ranks)
    assert all(2 in layer.r.values() for layer in model.modules() if hasattr(layer, "r"))


def test_the_first_entry_that_names_a_module_or_its_parameter_counts():
    ranks = {"1.mlp.experts": 3, "experts.(gate_up|down)_proj": 2}
    model = adapted(tiny_model(), randomize=False, target_modules=["experts"], rank_pattern=ranks)
    found = {
        path: model.base_model.model.get_submodule(path).r for path in experts_paths(tiny_model())
    }
    assert [r["default"] for r in found.values()] == [2, 3]


@pytest.mark.parametrize(
    ("family", "parameters", "summary"),
    [
        ("dbrx", ["mlp.w1", "mlp.v1"], "2 experts modules, 10 experts, 10 projections adapted"),
        (
            "jetmoe",
            ["input_linear.weight"],
            "4 experts modules, 20 experts, 20 projections adapted",
        ),
    ],
)
def test_parameters_off_the_interface_have_their_own_names(family, parameters, summary):
    base = off_interface_model(family)
    model = adapted(base, randomize=False, target_parameters=parameters)
    assert model.base_model.summary().startswith(f"{summary}; ")


def test_a_projection_of_two_parameters_is_named_by_both():
    message = refusal(off_interface_model("dbrx"), target_parameters=["mlp.w1"])
    assert "name ['mlp.v1'] too" in message


# ---- "all-linear" --------------------------------------------------------------------------------


@pytest.mark.parametrize("words", ["all-linear", "All-Linear", ["all-linear"]], ids=str)
def test_all_linear_means_the_experts_too(words):
    model = adapted(tiny_model(), randomize=False, target_modules=words)
    assert model.base_model.summary() == (
        "2 experts modules, 10 experts, 20 projections adapted; 8 other layers: "
        "2 self_attn.k_proj, 2 self_attn.o_proj, 2 self_attn.q_proj, 2 self_attn.v_proj"
    )


def test_all_linear_stands_beside_other_names():
    model = adapted(tiny_model(), randomize=False, target_modules=["all-linear", "gate"])
    assert "10 experts" in model.base_model.summary()
    assert "2 routers: 2 mlp.gate; 8 other layers" in model.base_model.summary()


def test_the_parameters_that_are_named_say_which_experts_all_linear_leaves_out():
    words = {"target_modules": ["all-linear"], "target_parameters": [f"1.mlp.{DOWN}"]}
    model = adapted(tiny_model(), randomize=False, **words)
    assert "1 experts modules, 5 experts, 5 projections adapted; 8 other" in (
        model.base_model.summary()
    )


def test_all_linear_leaves_out_what_is_read_but_never_called():
    """The classifier of LongCat's router: a LoRA on it has no effect, and is an error by name."""
    model = adapted(off_interface_model("longcat_flash"), target_modules="all-linear")
    assert "2 experts modules" in model.base_model.summary()
    assert "classifier" not in model.base_model.summary()


def test_what_is_excluded_is_left_out_of_all_linear():
    words = {"target_modules": "all-linear", "exclude_modules": ["o_proj", "1.mlp.experts"]}
    model = adapted(tiny_model(), randomize=False, **words)
    assert "1 experts modules" in model.base_model.summary()
    assert "6 other layers" in model.base_model.summary()


# ---- older adapters ------------------------------------------------------------------------------


def test_a_saved_pattern_does_not_begin_to_name_parameters(tmp_path):
    """In a saved adapter, an entry that named no module keeps its meaning: none."""
    base = tiny_model()
    model = adapted(base, target_modules=["experts"])
    config = model.peft_config["default"]
    config.rank_pattern = {"experts.down_proj": 2}
    model.save_pretrained(tmp_path)
    assert MoELoraConfig.from_pretrained(tmp_path).rank_pattern == {"experts.down_proj": 2}
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_close(outputs(loaded), outputs(model), TOLERANCE, "logits")
