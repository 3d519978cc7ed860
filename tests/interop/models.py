"""Tiny models with PEFT's own `LoraConfig(target_parameters=...)` on their experts."""

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper

from helpers import R, experts_paths, fill_adapter, tiny_model

FAMILIES = ["qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3", "nemotron_h"]
STACKS = ("gate_up_proj", "up_proj", "down_proj")


def stacks_of(model):
    """Names of the stacked weights of a model's experts."""
    experts = model.get_submodule(experts_paths(model)[0])
    return [name for name in STACKS if hasattr(experts, name)]


def lora_config(model, stacks=None, **config):
    names = stacks or stacks_of(model)
    config = {"r": R, "lora_alpha": 2 * R, "target_modules": [], **config}
    # whole paths, because PEFT finds a quantized parameter by its whole path alone
    paths = [path.replace(".base_layer", "") for path in experts_paths(model)]
    targets = [f"{path}.{name}" for path in paths for name in names]
    return LoraConfig(target_parameters=targets, **config)


def with_peft_lora(base, stacks=None, randomize=True, **config):
    """`base` with PEFT's LoRA on its experts, of random A and B."""
    model = get_peft_model(base, lora_config(base, stacks, **config))
    if randomize:
        fill_adapter(model)
    return model


def peft_model(family="qwen3_moe", stacks=None, **config):
    return with_peft_lora(tiny_model(family), stacks, **config)


def wrapped(model):
    """{(path of the experts, name of a weight): its wrapper}."""
    return {
        (name.replace(".base_layer", ""), module.parameter_name): module
        for name, module in model.named_modules()
        if isinstance(module, ParamWrapper)
    }


def pairs(model):
    """A and B of every wrapper, in an order that does not depend on how wrappers are nested."""
    found = []
    for _, wrapper in sorted(wrapped(model).items()):
        found += [wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight]
    return found


def copy_pairs(source, target):
    """Give `target` the A and B of `source`."""
    with torch.no_grad():
        for theirs, mine in zip(pairs(source), pairs(target), strict=True):
            mine.copy_(theirs)
