"""A second adapter beside a first: what it matches, what it leaves, what it may train with."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch import nn

from helpers import (
    QWEN3_MOE,
    Holder,
    R,
    assert_close,
    assert_share_of_order_one,
    assert_unchanged,
    build_experts,
    fill_adapter,
    moe_lora,
    outputs,
    random_rows,
    snapshot,
    tiny_model,
    wrap,
)
from peft_moe_lora import MoELoraConfig
from peft_moe_lora.layers.layer import MoELoraLayer


def test_a_bad_second_adapter_leaves_what_is_frozen_frozen():
    model = moe_lora(tiny_model(), target_modules=["experts", "q_proj"])
    for parameter in model.parameters():
        parameter.requires_grad = False
    model.get_parameter("base_model.model.model.norm.weight").requires_grad = True
    before = snapshot(model)
    # the first layer is adapted before a block of the second is found to be no linear layer
    bad = MoELoraConfig(r=R, target_modules=["experts", "q_proj", "layers.1.self_attn"])
    with pytest.raises(ValueError, match="Attention"):
        model.add_adapter("second", bad)
    assert_unchanged(model, before)


def test_a_second_adapter_with_the_same_saved_modules_loads(tmp_path):
    settings = {"modules_to_save": ["lm_head"]}
    saved = moe_lora(tiny_model(), adapter_name="second", **settings)
    fill_adapter(saved, "second", seed=7)
    head = saved.base_model.model.lm_head.modules_to_save["second"]
    nn.init.normal_(head.weight, std=head.in_features**-0.5)
    saved.save_pretrained(tmp_path)
    model = moe_lora(tiny_model(), **settings)
    first = outputs(model)
    model.load_adapter(tmp_path / "second", "second")
    assert torch.equal(outputs(model), first)
    model.set_adapter("second")
    assert torch.equal(outputs(model), outputs(saved))
    assert_share_of_order_one(outputs(model), first)


class TwoGates(nn.Module):
    """Two linear layers; the path of one is the beginning of the other's."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 6)
        self.gate_x = nn.Linear(6, 6)
        self.experts = build_experts(*QWEN3_MOE)

    def forward(self, x):
        return self.gate(x) + self.gate_x(x)


def test_an_adapted_module_does_not_hide_one_whose_name_begins_alike():
    model = get_peft_model(TwoGates(), MoELoraConfig(r=2, target_modules=["gate"]))
    model.add_adapter("second", MoELoraConfig(r=2, target_modules=["gate_x"]))
    assert list(model.base_model.model.gate.lora_A) == ["default"]
    assert list(model.base_model.model.gate_x.lora_A) == ["second"]


def test_every_experts_module_is_not_every_module_of_that_name():
    model = nn.ModuleDict(
        {"routed": Holder(build_experts(*QWEN3_MOE)), "dense": Holder(nn.Linear(6, 6))}
    )
    model = get_peft_model(model, MoELoraConfig(r=R))
    assert isinstance(model.base_model.model["routed"].experts, MoELoraLayer)
    assert type(model.base_model.model["dense"].experts) is nn.Linear
    assert model.peft_config["default"].target_modules == {"routed.experts"}


# ---- active together -----------------------------------------------------------------------------


def with_dropouts(*probabilities):
    """Experts with one active adapter for each probability."""
    names = [f"adapter{i}" for i in range(len(probabilities))]
    model = wrap(build_experts(*QWEN3_MOE), adapter_name=names[0], lora_dropout=probabilities[0])
    for seed, (name, p) in enumerate(zip(names[1:], probabilities[1:], strict=True), start=5):
        config = copy.deepcopy(model.peft_config[names[0]])
        config.lora_dropout = p
        model.add_adapter(name, config)
        fill_adapter(model, name, seed=seed)
    model.base_model.set_adapter(names)
    return model


def test_adapters_with_different_dropout_do_not_train_together():
    model, rows = with_dropouts(0.1, 0.5), random_rows()
    expected = model.eval()(*rows)
    with pytest.raises(ValueError, match=r"lora_dropout differs: \[0\.1, 0\.5\]"):
        model.train()(*rows)
    # without dropout there is nothing to disagree about
    assert torch.equal(model.eval()(*rows), expected)
    model.train().base_model.set_adapter("adapter1")
    assert model(*rows).isfinite().all()


def test_adapters_with_the_same_dropout_train_together():
    model, rows = with_dropouts(0.5, 0.5), random_rows()
    expected = model.eval()(*rows)
    model.train()
    torch.manual_seed(1)
    first = model(*rows)
    assert_share_of_order_one(first, expected, low=0.1)
    torch.manual_seed(1)
    assert_close(model(*rows), first)
