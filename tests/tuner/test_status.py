"""`get_layer_status` and `get_model_status` say of experts what they say of linear layers."""

import copy
from dataclasses import asdict

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_layer_status, get_model_status, get_peft_model

from helpers import R, adapter_parameters, moe_lora, tiny_model
from peft_moe_lora import MoELoraConfig, dequantize_experts, quantize_experts

EXPERTS = "model.model.layers.1.mlp.experts"
LINEAR = "model.model.layers.1.self_attn.q_proj"


def ours(**settings):
    """Experts of layer 1 with two adapters, of which the second has some experts."""
    targets = {"target_modules": ["layers.1.mlp.experts"]}
    model = moe_lora(tiny_model(), False, "first", **targets, **settings)
    some = {"layers.1.mlp.experts": [1, 2]}
    model.add_adapter("second", MoELoraConfig(r=2, expert_indices=some, **targets))
    return model


def theirs():
    """PEFT's own adapters on a linear layer."""
    targets = {"target_modules": ["layers.1.self_attn.q_proj"]}
    model = get_peft_model(tiny_model(), LoraConfig(r=R, **targets), "first")
    model.add_adapter("second", LoraConfig(r=2, **targets))
    return model


def freeze_a(model):
    for name, parameter in adapter_parameters(model, "first").items():
        if "lora_A" in name:
            parameter.requires_grad = False


# what happens to both models -> how
# fmt: off
EVENTS = {
    "nothing": lambda model: None,
    "another adapter": lambda model: model.set_adapter("second"),
    "both adapters": lambda model: model.base_model.set_adapter(["first", "second"]),
    "one adapter merged": lambda model: model.merge_adapter(["second"]),
    "both merged": lambda model: model.merge_adapter(["first", "second"]),
    "merged and taken out": lambda model: [model.merge_adapter(), model.unmerge_adapter()],
    "disabled": lambda model: model.base_model.disable_adapter_layers(),
    "disabled and enabled": lambda model: [
        model.base_model.disable_adapter_layers(), model.base_model.enable_adapter_layers()
    ],
    "frozen": lambda model: model.set_requires_grad("first", False),
    "frozen in part": freeze_a,
    "an adapter deleted": lambda model: model.delete_adapter("first"),
    "a mixture added": lambda model: model.add_weighted_adapter(
        ["first", "second"], [1.0, 1.0], "third", "cat"
    ),
    "offloaded": lambda model: cpu_offload(model, execution_device=torch.device("cpu")),
    "on no device": lambda model: model.to("meta"),
}
# fmt: on


@pytest.mark.parametrize("event", EVENTS)
def test_experts_have_the_status_of_a_linear_layer(event):
    statuses = []
    for model in (ours(), theirs()):
        EVENTS[event](model)
        (layer,) = [asdict(status) for status in get_layer_status(model)]
        statuses.append((layer, asdict(get_model_status(model))))
    (layer, whole), (right_layer, right_whole) = statuses
    assert layer.pop("name") == EXPERTS
    assert right_layer.pop("name") == LINEAR
    assert layer.pop("module_type") == "MoELoraLayer"
    assert right_layer.pop("module_type") == "lora.Linear"
    assert layer == right_layer
    differ = ("adapter_model_type", "peft_types", "trainable_params", "total_params")
    kept = [{k: v for k, v in each.items() if k not in differ} for each in (whole, right_whole)]
    assert kept[0] == kept[1]
    assert whole["adapter_model_type"] == "MoELoraModel"
    assert whole["peft_types"] == dict.fromkeys(right_whole["peft_types"], "MOE_LORA")


def test_the_methods_and_a_model_without_a_peft_model_say_the_same():
    model = ours()
    assert model.get_layer_status() == get_layer_status(model)
    assert model.get_model_status() == get_model_status(model)
    base = tiny_model()
    base.add_adapter(MoELoraConfig(r=R, target_modules=["layers.1.mlp.experts"]), "first")
    (layer,) = get_layer_status(base)
    assert layer.name == EXPERTS.removeprefix("model.")
    assert layer.available_adapters == ["first"]
    assert get_model_status(base).num_adapter_layers == 1


def test_routers_and_linear_layers_beside_experts_are_listed():
    model = moe_lora(tiny_model(), target_modules=["experts", "gate", "q_proj"])
    kinds = {
        status.name.rpartition(".")[2]: status.module_type for status in get_layer_status(model)
    }
    assert kinds == {
        "experts": "MoELoraLayer",
        "gate": "lora.MoELoraRouter",
        "q_proj": "lora.Linear",
    }
    assert get_model_status(model).num_adapter_layers == 6


@pytest.mark.parametrize("setting", [{}, {"format": "int8"}], ids=str)
def test_quantized_weights_are_counted_as_weights(setting, capsys):
    model = ours()
    trainable, total = model.get_nb_trainable_parameters()
    assert total == sum(parameter.numel() for parameter in model.parameters())
    model = quantize_experts(model, **setting)
    for each in (model, copy.deepcopy(model)):
        assert each.get_nb_trainable_parameters() == (trainable, total)
        assert get_model_status(each).total_params == total
        each.print_trainable_parameters()
        assert f"all params: {total:,}" in capsys.readouterr().out
    assert PeftModel.get_nb_trainable_parameters(dequantize_experts(model))[1] == total
