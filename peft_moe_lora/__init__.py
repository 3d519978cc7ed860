"""Per-expert LoRA for Mixture-of-Experts models, as a PEFT tuner; importing it registers the tuner."""

from .config import MoELoraConfig
from .model import MoELoraModel
from .registration import register

__all__ = ["MoELoraConfig", "MoELoraModel"]
__version__ = "0.1.0"

register()
