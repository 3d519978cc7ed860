"""The guide's table says of every family in transformers what an adapter on it does."""

import pytest
import transformers
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import SwitchTransformersConfig

from families.families_table import LINEAR, families, read, table, undecorated, written
from families.off_interface import BUILD
from helpers import Holder, interface_families, modeling_module
from peft_moe_lora import MoELoraConfig

AGAIN = "run python tests/families/families_table.py"


def test_the_table_is_what_the_modules_say():
    version, text = written()
    if version == transformers.__version__:
        assert text == table(families()), AGAIN
    told = read(text)
    found = families()
    # another version has other families; those of both are the same, except aria, which was off
    # the interface before 5.18
    both = (told.keys() & found.keys()) - ({"aria"} if "aria" in BUILD else set())
    differing = {name: (told[name], found[name]) for name in both if told[name] != found[name]}
    assert not differing, AGAIN
    assert len(both) >= 50


def test_no_family_is_left_out():
    in_the_table = {name.partition(" ")[0] for name in families()}
    assert {family for family, _ in interface_families()} <= in_the_table
    assert {family for family, _ in undecorated().values()} <= in_the_table


def test_a_table_is_read_as_it_was_written():
    assert read(table(families())) == families()


@pytest.mark.parametrize(
    "family", [name for name, (told, _) in families().items() if told == LINEAR]
)
def test_experts_that_are_linear_layers_get_pefts_own_lora(family):
    assert family in ("nllb_moe", "switch_transformers")
    config = SwitchTransformersConfig(d_model=8, d_ff=16, num_experts=3)
    config.moe_token_dropout, config.activation_dropout, config.activation_function = (
        0.0,
        0.0,
        "relu",
    )
    arguments = (config, 16) if family == "nllb_moe" else (config,)
    (name,) = (name for name, (other, _) in undecorated().items() if other == family)
    model = Holder(getattr(modeling_module(family), name)(*arguments))
    names = ["fc1", "fc2"] if family == "nllb_moe" else ["wi", "wo"]
    model = get_peft_model(model, MoELoraConfig(r=2, target_modules=names))
    assert (
        sum(isinstance(module, LoraLayer) for module in model.modules()) == 2 * config.num_experts
    )
