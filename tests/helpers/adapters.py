"""Adapters with random A and B on a module or a model, and the two orders of B.

`lora_A` [r*E, K] is expert-major: rows e*r up to (e + 1)*r are A[e].
`lora_B` [N, r*E] is expert-major: columns e*r up to (e + 1)*r are B[e].
"""

import torch

from helpers.classes import Holder
from helpers.sizes import R


def moe_lora(model, randomize=True, adapter_name="default", **config):
    """`model` with an adapter of random A and B on its experts."""
    from peft import get_peft_model

    from peft_moe_lora import MoELoraConfig

    config = {"r": R, "lora_alpha": 2 * R, "target_modules": ["experts"], **config}
    model = get_peft_model(model, MoELoraConfig(**config), adapter_name=adapter_name)
    if randomize:
        fill_adapter(model, adapter_name)
    return model


def wrap(experts, randomize=True, adapter_name="default", **config):
    """`experts` in a `Holder`, with an adapter of random A and B on it."""
    return moe_lora(Holder(experts), randomize, adapter_name, **config)


def adapter_parameters(model, adapter_name="default"):
    """{name: parameter} of one adapter's A and B, on experts and on linear layers."""
    return {n: p for n, p in model.named_parameters() if ".lora_" in n and f".{adapter_name}" in n}


def fill_adapter(model, adapter_name="default", seed=1, gain=1.0):
    """Random A and B, none zero, that change every expert's output by about its own size."""
    generator = torch.Generator().manual_seed(seed)
    parameters = adapter_parameters(model, adapter_name)
    assert parameters, (
        f"no parameter of adapter {adapter_name!r} in {[n for n, _ in model.named_parameters()]}"
    )
    with torch.no_grad():
        for name, parameter in parameters.items():
            # A is [r*E, K]; the shape of B, [N, r*E], does not tell its fan-in: R stands for it
            fan_in = parameter.shape[1] if ".lora_A." in name else R
            std = gain * 0.5 * fan_in**-0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def experts_adapter(model, path="experts", adapter_name="default", prefix="base_model.model."):
    """{projection: (A, B)} of the experts module at `path`, by the documented parameter names."""
    named = dict(model.named_parameters())
    start_A = f"{prefix}{path}.lora_A.{adapter_name}."
    start_B = f"{prefix}{path}.lora_B.{adapter_name}."
    projections = [name.removeprefix(start_A) for name in named if name.startswith(start_A)]
    return {p: (named[start_A + p], named[start_B + p]) for p in projections}


def fold_scaling(model):
    """Multiply the scaling of PEFT's own LoRA layers into B; it becomes 1."""
    from peft.tuners.lora import LoraLayer

    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        Bs = {name: linear.weight for name, linear in layer.lora_B.items()}
        for name, B in {**Bs, **layer.lora_embedding_B}.items():
            B.data *= layer.scaling[name]
            layer.scaling[name] = 1.0


def rank_major(lora_B, num_experts):
    """Our B [N, r*E], column e*r + j, in the order of PEFT's ParamWrapper: column j*E + e."""
    r = lora_B.shape[1] // num_experts
    out = torch.empty_like(lora_B)
    for e in range(num_experts):
        for j in range(r):
            out[:, j * num_experts + e] = lora_B[:, e * r + j]
    return out


def expert_major(peft_B, num_experts):
    """The way back: PEFT's column j*E + e to our column e*r + j."""
    N, columns = peft_B.shape
    r = columns // num_experts
    return peft_B.reshape(N, r, num_experts).transpose(1, 2).reshape(N, columns)
