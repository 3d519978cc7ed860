"""transformers asks a model's quantizer whether it may save the model.

Codes and scales have names of their own, so a checkpoint that held them would be read without its
experts, which would then be drawn at random. Adapters are saved as before.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .quantizer import ExpertsQuantizationConfig, ExpertsQuantizer


def forbid_saving(model: nn.Module, settings: ExpertsQuantizationConfig) -> None:
    """Let transformers refuse to save a model, and the models within it.

    Args:
        model: a model whose experts are quantized.
        settings: how they are.
    """
    for whole in _models(model):
        other = getattr(whole, "hf_quantizer", None)
        if not isinstance(other, ExpertsQuantizer):
            quantizer = ExpertsQuantizer(settings)
            # of the linear layers
            quantizer.linear = other
            whole.hf_quantizer = quantizer


def allow_saving(model: nn.Module) -> None:
    """Undo `forbid_saving`, for a model whose experts are dense again."""
    # the model itself last, because those within it share its config
    for whole in reversed(list(_models(model))):
        quantizer = getattr(whole, "hf_quantizer", None)
        if not isinstance(quantizer, ExpertsQuantizer):
            continue
        quantizer.remove_quantization_config(whole)
        linear = quantizer.linear
        if linear is not None:
            whole.hf_quantizer = linear
            whole.config.quantization_config = linear.quantization_config
            whole.quantization_method = linear.quantization_config.quant_method
            whole.is_quantized = True


# transformers sets attributes of these models that their class does not annotate
def _models(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            yield module
