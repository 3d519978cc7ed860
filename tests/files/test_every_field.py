"""Every field with every strange value: refused by its name, or right from the first call to disk.

Values are given in Python and in adapter_config.json.
"""

import copy
import json
import math
from dataclasses import fields, replace
from types import MappingProxyType

import pytest
import torch
from peft import (
    LoftQConfig,
    LoraConfig,
    LoraRuntimeConfig,
    PeftModel,
    VeloraConfig,
    get_peft_model,
)
from peft.tuners.lora import ArrowConfig, BdLoraConfig, EvaConfig

from helpers import assert_unchanged, outputs, relative_error, snapshot, tiny_model
from peft_moe_lora import MoELoraConfig, convert_adapter
from peft_moe_lora.files.field_rules import RULES

FIELDS = sorted(RULES)
FEATURES = [name for name, rule in RULES.items() if rule.feature]
DEEP = []
for _ in range(5000):
    DEEP = [DEEP]
# fmt: off
IN_JSON = [
    None, True, False, 0, 1, -1, 1.5, 2**31, 2**63, 10**400, math.nan, math.inf,
    "", "experts", "no_such", "all-linear", "none", "(", "\0", "a\x1b[2J", "x" * 3000,
    [], [""], ["experts"], ["no_such"], ["experts", None], [None], [-1], [0, 0], [2**63], [[]],
    [[0, 1]], {}, {"": 1}, {"no_such": 1}, {"experts": None}, {"experts": {}}, {"experts": "x"},
    {"experts": [0]}, {"embed_tokens": []}, {"top_k": 2},
]
IN_PYTHON = [
    *IN_JSON, DEEP, (1, 2), ("experts",), {"experts"}, frozenset(["experts"]), range(2), b"x",
    object(), object, {1: 2}, {("a",): 1}, {"experts": (0, 1)}, {"experts": range(2)}, 1j,
    iter([1]), torch.ones(2), torch.tensor(1), dict.fromkeys("a").keys(), lambda: 3,
    MappingProxyType({"experts": 2}), ArrowConfig(), BdLoraConfig(), EvaConfig(), LoftQConfig(),
    VeloraConfig(), LoraRuntimeConfig(), LoraRuntimeConfig(ephemeral_gpu_offload="yes"), LoraConfig,
]
# fmt: on
GIVEN = {"r": 2, "target_modules": ["experts", "q_proj"], "init_lora_weights": False}


def test_every_field_has_a_rule():
    """A field that a new release of PEFT adds needs one; until then it must stay unset."""
    assert {field.name for field in fields(MoELoraConfig)} <= set(FIELDS)


@pytest.mark.parametrize("name", FIELDS)
def test_a_strange_value_is_refused_by_name_or_can_be_saved(name):
    for value in IN_PYTHON:
        try:
            config = MoELoraConfig(**{**GIVEN, name: value})
        except ValueError as error:
            assert_named(name, error)
        else:
            json.dumps(config.to_dict(), default=list)
            assert replace(config) == config


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("value", [{}, [], 0, "", {"top_k": 2}, True, [[0, 1]], [1]], ids=repr)
def test_a_feature_that_is_not_off_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        MoELoraConfig(**{**GIVEN, name: value})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base model, an adapter's folder, and the outputs that it gives."""
    base = tiny_model()
    adapted = get_peft_model(copy.deepcopy(base), MoELoraConfig(**GIVEN))
    folder = tmp_path_factory.mktemp("saved")
    adapted.save_pretrained(folder)
    assert relative_error(outputs(adapted), outputs(base)) > 0.1
    return base, folder, outputs(adapted)


def with_field(folder, to, name, value):
    """A copy of an adapter's folder with another value of one field."""
    to.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "adapter_config.json").read_text())
    (to / "adapter_config.json").write_text(json.dumps(config | {name: value}))
    return to


def assert_named(name, error):
    message = str(error)
    assert name in message
    assert message.isprintable()
    assert 20 < len(message) < 2000


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "peft_type"])
def test_a_strange_value_in_a_file_is_refused_by_name_or_read(tmp_path, name):
    written = MoELoraConfig(**GIVEN).to_dict() | {"target_modules": ["experts", "q_proj"]}
    for value in IN_JSON:
        (tmp_path / "adapter_config.json").write_text(json.dumps(written | {name: value}))
        try:
            config = MoELoraConfig.from_pretrained(tmp_path)
        except ValueError as error:
            assert_named(name, error)
        else:
            json.dumps(config.to_dict(), default=list)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("arrow_config", {}),
        ("use_bdlora", {}),
        ("alora_invocation_tokens", []),
        ("layer_replication", [[0, 1]]),
        ("rank_pattern", None),
        ("alpha_pattern", None),
        ("modules_to_save", [""]),
        ("fast_linear", None),
        ("task_type", "no_such"),
        ("loftq_config", None),
    ],
    ids=str,
)
def test_every_door_reads_the_field_right_or_refuses_it(saved, tmp_path, name, value):
    base, folder, expected = saved
    damaged = with_field(folder, tmp_path / "damaged", name, value)
    model = copy.deepcopy(base)
    before = snapshot(model)
    try:
        found = outputs(PeftModel.from_pretrained(model, damaged))
    except ValueError as error:
        assert_named(name, error)
        assert_unchanged(model, before)
        with pytest.raises(ValueError, match=name):
            convert_adapter(damaged, tmp_path / "out", to="peft", base_config=base.config)
    else:
        assert relative_error(found, expected) == 0
        convert_adapter(damaged, tmp_path / "out", to="moe_lora", base_config=base.config)
        found = outputs(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out"))
        assert relative_error(found, expected) == 0


# what behaves like a list is saved as one
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("target_modules", frozenset(["experts", "q_proj"])),
        ("target_modules", dict.fromkeys(["experts", "q_proj"]).keys()),
        ("exclude_modules", ("v_proj",)),
        ("modules_to_save", frozenset(["lm_head"])),
        ("layers_to_transform", range(2)),
        ("trainable_token_indices", (3, 5)),
        ("trainable_token_indices", {"embed_tokens": (3, 5)}),
        ("rank_pattern", MappingProxyType({"experts": 3})),
        ("target_projections", ("down",)),
    ],
    ids=lambda part: part if isinstance(part, str) else type(part).__name__,
)
def test_other_collections_are_saved_and_read_again(saved, tmp_path, name, value):
    base, _, _ = saved
    adapted = get_peft_model(copy.deepcopy(base), MoELoraConfig(**{**GIVEN, name: value}))
    adapted.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert relative_error(outputs(adapted), outputs(base)) > 0.1
    assert relative_error(outputs(again), outputs(adapted)) == 0
