"""Per-expert LoRA for Mixture-of-Experts models, as a PEFT tuner; importing it registers the tuner."""

from .config import MoELoraConfig
from .conversion import convert_adapter, inspect_adapter, verify_adapter
from .expert_statistics import ExpertLoad, expert_load, select_experts
from .loading import load_peft_adapter
from .merging import merge_adapter
from .model import MoELoraModel
from .plotting import plot_expert_load
from .quantization import dequantize_experts, quantize_experts
from .quantized_loading import load_quantized
from .registration import register
from .training_callback import ExpertLoadCallback

__all__ = [
    "ExpertLoad",
    "ExpertLoadCallback",
    "MoELoraConfig",
    "MoELoraModel",
    "convert_adapter",
    "dequantize_experts",
    "expert_load",
    "inspect_adapter",
    "load_peft_adapter",
    "load_quantized",
    "merge_adapter",
    "plot_expert_load",
    "quantize_experts",
    "select_experts",
    "verify_adapter",
]
__version__ = "0.1.0"

register()
