"""What PEFT offers for layers with one matrix A and one matrix B leaves experts alone.

Each of these functions reads A and B, or the update B A, of a single matrix. On experts, which
stack theirs, it raises an error before it changes anything.
"""

import pytest
from peft import (
    ArrowConfig,
    LoraConfig,
    PeftMixedModel,
    XLoraConfig,
    convert_to_lora,
    create_arrow_model,
    get_peft_model,
    get_peft_model_state_dict,
    initialize_lora_eva_weights,
    replace_lora_weights_loftq,
    save_as_lora,
)
from peft.tuners.lora.intruders import reduce_intruder_dimension

from helpers import H, assert_unchanged, moe_lora, snapshot, tiny_model, token_ids
from peft_moe_lora import MoELoraConfig

TARGETS = {"target_modules": ["experts", "gate", "q_proj"]}


def base(_=None):
    model = tiny_model(num_hidden_layers=1)
    model.config.use_cache = False
    return model


def xlora(folder):
    adapters = {"one": str(folder), "other": str(folder)}
    return XLoraConfig(task_type="CAUSAL_LM", hidden_size=H, adapters=adapters)


# function -> (its call on an adapted model and the folder of its adapter, what its error says)
# fmt: off
OF_ONE_MATRIX = {
    "reduce_intruder_dimension": (
        lambda model, folder: reduce_intruder_dimension(model, old_adapter_name="default"),
        "not using LoRA",
    ),
    "convert_to_lora": (lambda model, folder: convert_to_lora(model, rank=2), "MoELoraLayer"),
    "save_as_lora": (lambda model, folder: save_as_lora(folder / "new", model, rank=2), "MoELora"),
    "initialize_lora_eva_weights": (
        lambda model, folder: initialize_lora_eva_weights(model, [{"input_ids": token_ids()}]),
        "init_lora_weights='eva'",
    ),
    "replace_lora_weights_loftq": (
        lambda model, folder: replace_lora_weights_loftq(model, str(folder)),
        "safetensors|bnb|bitsandbytes",
    ),
    "subtract_mutated_init": (
        lambda model, folder: model.base_model.subtract_mutated_init(
            get_peft_model_state_dict(model), "default", {}
        ),
        "path_initial_model_for_weight_conversion",
    ),
    "get_delta_weight": (
        lambda model, folder: (
            model.base_model.model.model.layers[0].mlp.experts.get_delta_weight("default")
        ),
        "projection",
    ),
    "another tuner": (
        lambda model, folder: model.add_adapter("l", LoraConfig(target_modules=["q_proj"])),
        "different peft types",
    ),
    "Arrow": (
        lambda model, folder: model.add_adapter(
            "arrow", LoraConfig(target_modules=["q_proj"], arrow_config=ArrowConfig())
        ),
        "different peft types",
    ),
    "create_arrow_model": (
        lambda model, folder: create_arrow_model(base(), [str(folder)] * 2, ArrowConfig(top_k=1)),
        "weight",
    ),
    "XLora": (lambda model, folder: get_peft_model(base(), xlora(folder)), "not supported"),
    "PeftMixedModel": (
        lambda model, folder: PeftMixedModel(base(), MoELoraConfig(**TARGETS)),
        "not compatible",
    ),
}
# fmt: on


@pytest.mark.parametrize("name", OF_ONE_MATRIX)
def test_functions_of_one_matrix_leave_experts_alone(name, tmp_path):
    call, said = OF_ONE_MATRIX[name]
    model = moe_lora(base(), **TARGETS)
    model.save_pretrained(tmp_path)
    before = snapshot(model)
    with pytest.raises((ValueError, TypeError, AttributeError, FileNotFoundError), match=said):
        call(model, tmp_path)
    assert_unchanged(model, before)
    assert list(model.peft_config) == ["default"]
