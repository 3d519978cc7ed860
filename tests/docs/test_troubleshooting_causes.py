"""What docs/troubleshooting.md names as a cause raises the message that it quotes."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import Qwen3Config, Qwen3ForCausalLM

from docs.messages import QUOTED, is_quoted_from
from helpers import tiny_model, token_ids
from peft_moe_lora import (
    MoELoraConfig,
    convert_adapter,
    expert_load,
    load_quantized,
    quantize_experts,
)


def adapted(**config):
    settings = {"r": 2, "target_modules": ["experts"], **config}
    return get_peft_model(tiny_model(), MoELoraConfig(**settings))


def dense():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads))


def saved(folder):
    adapted().save_pretrained(folder)
    return folder / "adapter_model.safetensors"


def a_misspelt_name(folder):
    adapted(target_modules=["expert"])


def no_experts(folder):
    get_peft_model(dense(), MoELoraConfig(target_modules=None))


def a_misspelt_parameter(folder):
    adapted(target_modules=None, target_parameters=["experts.gate_proj"])


def a_misspelt_layer(folder):
    adapted(expert_indices={"layers.99.mlp.experts": [0]})


def an_expert_that_is_not_there(folder):
    adapted(expert_indices={"experts": [99]})


def dora(folder):
    adapted(use_dora=True)


def pissa(folder):
    adapted(init_lora_weights="pissa")


def dropout_of_dense_updates(folder):
    adapted(backend="materialize", lora_dropout=0.1)


def kernels_on_a_cpu(folder):
    adapted(backend="triton")(input_ids=token_ids())


def a_trained_base(folder):
    adapted().requires_grad_(True)(input_ids=token_ids())


def a_bound_forward(folder):
    model = adapted()
    experts = model.get_submodule("base_model.model.model.layers.0.mlp.experts.base_layer")
    experts.forward = lambda hidden_states, *routing: hidden_states
    model(input_ids=token_ids())


def different_dropout(folder):
    model = adapted(lora_dropout=0.1)
    config = MoELoraConfig(r=2, target_modules=["experts"], lora_dropout=0.2)
    model.add_adapter("other", config)
    model.base_model.set_adapter(["default", "other"])
    model.train()(input_ids=token_ids())


def adapters_in_one_batch(folder):
    adapted().eval()(input_ids=token_ids(), adapter_names=["default", "default"])


def a_training_that_diverged(folder):
    model = adapted()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name).fill_(torch.nan)
    model.save_pretrained(folder / "diverged")


def another_rank(folder):
    saved(folder)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    PeftModel.from_pretrained(tiny_model(), folder)


def a_file_cut_short(folder):
    weights = saved(folder)
    weights.write_bytes(weights.read_bytes()[:100])
    convert_adapter(folder, folder / "out", to="peft", base_config=tiny_model().config)


def hotswapping(folder):
    saved(folder)
    hotswap_adapter(adapted(), folder, "default")


def a_full_destination(folder):
    saved(folder)
    convert_adapter(folder, folder, to="peft", base_config=tiny_model().config)


def an_unknown_base(folder):
    saved(folder)
    convert_adapter(folder, folder / "out", to="per_expert")


def an_adapter_without_experts(folder):
    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    convert_adapter(folder, folder / "out", to="moe_lora", base_config=tiny_model().config)


def the_base_of_another_adapter(folder):
    saved(folder)
    convert_adapter(folder, folder / "out", to="per_expert", base_config=dense().config)


def experts_quantized_twice(folder):
    quantize_experts(quantize_experts(tiny_model(hidden_size=64, moe_intermediate_size=64)))


def codes_of_a_dense_checkpoint(folder):
    tiny_model().save_pretrained(folder)
    load_quantized(folder, "mxfp4")


def the_load_of_a_dense_model(folder):
    expert_load(dense(), [token_ids()])


CAUSES = [
    a_misspelt_name,
    no_experts,
    a_misspelt_parameter,
    a_misspelt_layer,
    an_expert_that_is_not_there,
    dora,
    pissa,
    dropout_of_dense_updates,
    kernels_on_a_cpu,
    a_trained_base,
    a_bound_forward,
    different_dropout,
    adapters_in_one_batch,
    a_training_that_diverged,
    another_rank,
    a_file_cut_short,
    hotswapping,
    a_full_destination,
    an_unknown_base,
    an_adapter_without_experts,
    the_base_of_another_adapter,
    experts_quantized_twice,
    codes_of_a_dense_checkpoint,
    the_load_of_a_dense_model,
]


@pytest.mark.parametrize("cause", CAUSES, ids=lambda cause: cause.__name__)
def test_a_cause_raises(cause, tmp_path):
    with pytest.raises((ValueError, OSError, RuntimeError)) as caught:
        cause(tmp_path)
    quoted = [message for message in QUOTED if is_quoted_from(message, str(caught.value))]
    assert len(quoted) == 1, str(caught.value)
