"""What layers are timed: those of a named shape, or those of a model's config.json.

A model is built on the meta device, and its experts modules are read. No weight is loaded.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from cases import Shape, shape_of
from expert_modules import qwen3_experts
from peft_moe_lora.experts.layout import ExpertsLayout, is_experts, read_layout
from peft_moe_lora.experts.stored import UnsupportedExperts

# names of top_k in the configs of transformers
TOP_K = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_top_k",
    "moe_topk",
    "moe_k",
)


class ModelLayer(NamedTuple):
    """One kind of experts layer.

    Attributes:
        name: of the shape or the model, with the layer's path where a model has several kinds.
        shape: of the layer.
        experts: makes its experts module, see `Case`.
    """

    name: str
    shape: Shape
    experts: Callable[[int, int, int, int], nn.Module]


def named_layer(name: str) -> ModelLayer:
    """Qwen3-MoE's layer of a shape that `shape_of` knows.

    Raises:
        ValueError: if it does not.
    """
    return ModelLayer(name, shape_of(name), qwen3_experts)


@cache
def layers_of(name: str) -> list[ModelLayer]:
    """One layer of each class and shape in a model.

    Args:
        name: of a folder with a config.json, or of a model on the hub.
    Raises:
        ValueError: if there is no such config, or its layers cannot be measured. The message says
            what can be done.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(f"{name!r} has no config that transformers reads: {error}") from error
    found: dict[tuple, tuple[str, nn.Module]] = {}
    for path, module in build(config).named_modules():
        if is_experts(module):
            kind = (type(module), *(parameter.shape for parameter in module.parameters()))
            found.setdefault(kind, (path, module))
    if not found:
        raise ValueError(f"{name!r} has no routed experts; name a Mixture-of-Experts model.")
    layers = []
    for path, module in found.values():
        layer_name = name
        if len(found) > 1:
            layer_name = f"{name}:{path}"
        layers.append(layer_of(layer_name, module, config))
    return layers


def build(config: PreTrainedConfig) -> nn.Module:
    """The model on the meta device: of the class that its config names, else a causal LM."""
    names = config.architectures or [""]
    model_class = getattr(transformers, names[0], None)
    with torch.device("meta"):
        if model_class is None:
            return AutoModelForCausalLM.from_config(config)
        return model_class(config)


def layer_of(name: str, module: nn.Module, config: PreTrainedConfig) -> ModelLayer:
    """The layer of an experts module.

    Raises:
        ValueError: if the benchmark has no reference for it.
    """
    try:
        layout = read_layout(module)
    except UnsupportedExperts as error:
        raise ValueError(f"{name}: {error}") from error
    check_reference(name, module, layout)
    top_k = top_k_of(name, getattr(module, "config", config.get_text_config()))
    shape = Shape(layout.num_experts, layout.gate_up.in_features, layout.down.in_features, top_k)
    # the sizes are those of the module
    return ModelLayer(name, shape, lambda *sizes: module)


def check_reference(name: str, module: nn.Module, layout: ExpertsLayout) -> None:
    """Refuse what `checking.reference` does not compute.

    Raises:
        ValueError: naming what it is.
    """
    reason = None
    activation = "act_fn"
    if layout.gated:
        activation = "_apply_gate"
    if layout.family is not None:
        reason = "stores or calls its experts in a way of its own"
    elif getattr(module, "has_post_expert_norm", False):
        reason = "has a norm after down"
    elif not hasattr(module, activation):
        reason = f"has no {activation}"
    if reason is not None:
        raise ValueError(
            f"{name}: {type(module).__name__} {reason}, which the reference of this benchmark does "
            "not compute. Time a SwiGLU layer of its size with --shapes E,H,I,top_k."
        )


def top_k_of(name: str, config: PreTrainedConfig) -> int:
    """Experts per token.

    Raises:
        ValueError: if the config has it under none of the names in TOP_K.
    """
    for field in TOP_K:
        top_k = getattr(config, field, None)
        if isinstance(top_k, int):
            return top_k
    raise ValueError(
        f"{name}: its config has none of {', '.join(TOP_K)}; give --shapes E,H,I,top_k."
    )
