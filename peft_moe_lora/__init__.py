"""Per-expert LoRA for Mixture-of-Experts models, as a PEFT tuner; importing it registers the tuner."""

from .config import MoELoraConfig
from .conversion import convert_adapter, inspect_adapter, verify_adapter
from .loading import load_peft_adapter
from .merging import merge_adapter
from .model import MoELoraModel
from .registration import register

__all__ = [
    "MoELoraConfig",
    "MoELoraModel",
    "convert_adapter",
    "inspect_adapter",
    "load_peft_adapter",
    "merge_adapter",
    "verify_adapter",
]
__version__ = "0.1.0"

register()
