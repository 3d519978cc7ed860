"""Registers the tuner with peft, transformers and torch; no other file changes registries."""

from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from .config import MoELoraConfig
from .layers.dispatch import moe_lora_experts_forward
from .layers.implementations import IMPLEMENTATION
from .layers.refusals import NoHotswap, refuse_optimizer_of_one_matrix
from .quant.quantizer import METHOD, ExpertsQuantizationConfig, ExpertsQuantizer
from .tuner.model import MoELoraModel

NAME = "MOE_LORA"


def register() -> None:
    """Register the tuner with peft, and the experts implementation with transformers.

    PEFT's hotswapping and two of its optimizers cannot work on experts. A row in a table of PEFT
    and a hook of torch let this package refuse them.

    Calling it again changes nothing.
    """
    _extend_peft_type(NAME)
    if PeftType[NAME] not in PEFT_TYPE_TO_TUNER_MAPPING:
        register_peft_method(
            name=NAME.lower(), config_cls=MoELoraConfig, model_cls=MoELoraModel, prefix="lora_"
        )
        register_optimizer_step_pre_hook(refuse_optimizer_of_one_matrix)
    CONFIG_KEYS_TO_CHECK[PeftType[NAME]] = NoHotswap()
    # FP8 experts look their implementation up in a separate registry
    for interface in (ExpertsInterface, FP8ExpertsInterface):
        interface.register(IMPLEMENTATION, moe_lora_experts_forward)
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = ExpertsQuantizationConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = ExpertsQuantizer


def _extend_peft_type(name: str) -> None:
    """Add a member to the enum `PeftType`, where peft and transformers look up tuning methods.

    An enum accepts no new members, so its tables are extended in place. A plain string instead
    would break transformers, which reads `.value`. A separate enum would break saving with peft
    0.20.
    """
    if name in PeftType.__members__:
        return
    # type checkers do not know the tables, because they are private attributes
    members: Any = PeftType
    member: Any = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType.__members__)
    members._member_names_.append(name)
    members._member_map_[name] = member
    members._value2member_map_[name] = member
    # python 3.12: attribute access no longer falls back to the member map
    type.__setattr__(PeftType, name, member)
