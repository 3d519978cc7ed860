"""Per-expert LoRA for Mixture-of-Experts models, as a PEFT tuner.

Importing this package registers the tuner with peft and transformers.
"""

from .config import MoELoraConfig
from .convert.consolidate import consolidate_checkpoint
from .convert.convert import convert_adapter
from .convert.inspect import inspect_adapter
from .convert.load import load_peft_adapter
from .convert.merge import merge_adapter
from .convert.verify import verify_adapter
from .functional.checkpointing import keep_experts
from .interop.apply import apply_to_peft
from .planning.plan import Plan, plan
from .quant.in_place import dequantize_experts, quantize_experts
from .quant.loading import load_quantized
from .registration import register
from .stats.callback import ExpertLoadCallback
from .stats.load import ExpertLoad, expert_load
from .stats.plot import plot_expert_load
from .stats.select import select_experts
from .tuner.model import MoELoraModel

__all__ = [
    "ExpertLoad",
    "ExpertLoadCallback",
    "MoELoraConfig",
    "MoELoraModel",
    "Plan",
    "apply_to_peft",
    "consolidate_checkpoint",
    "convert_adapter",
    "dequantize_experts",
    "expert_load",
    "inspect_adapter",
    "keep_experts",
    "load_peft_adapter",
    "load_quantized",
    "merge_adapter",
    "plan",
    "plot_expert_load",
    "quantize_experts",
    "select_experts",
    "verify_adapter",
]
__version__ = "0.1.0"

register()
