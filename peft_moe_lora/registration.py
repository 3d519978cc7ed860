"""The only lines that touch the registries of peft and transformers."""

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from .quant.quantizer import METHOD, ExpertsQuantizationConfig, ExpertsQuantizer
from .tuner.config import MoELoraConfig
from .tuner.dispatch import moe_lora_experts_forward
from .tuner.implementations import IMPLEMENTATION
from .tuner.model import MoELoraModel

NAME = "MOE_LORA"


def register() -> None:
    """Make peft know the tuner and transformers the experts implementation; repeating it changes nothing."""
    _extend_peft_type(NAME)
    if PeftType[NAME] not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(
            name=NAME.lower(), config_cls=MoELoraConfig, model_cls=MoELoraModel, prefix="lora_"
        )
    # FP8 experts look implementations up in a registry of their own
    for interface in (ExpertsInterface, FP8ExpertsInterface):
        interface.register(IMPLEMENTATION, moe_lora_experts_forward)
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = ExpertsQuantizationConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = ExpertsQuantizer


def _extend_peft_type(name: str) -> None:
    """Add a member to the closed enum `PeftType`, which peft and transformers look methods up in.

    A plain string instead breaks transformers, which reads `.value`; an enum of our own breaks saving on peft 0.20.
    """
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_, member._value_, member.__objclass__ = name, name, PeftType
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # python 3.12: attribute access no longer falls back to the member map
    type.__setattr__(PeftType, name, member)
