"""Options of an adapter_config.json that a conversion does not carry."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..config import MoELoraConfig
from ..files.field_rules import OF_OTHERS, is_off
from ..files.tensor_file import RefusedError
from ..files.text import quoted

# options that change the computation and that no format can express
_OF_THE_COMPUTATION = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "layer_replication",
    "alora_invocation_tokens",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# beginnings of init_lora_weights that change the base's weights, to which A and B then belong
_OF_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse_options(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse options without which A and B mean something else.

    Raises:
        RefusedError: if there is one. The message names it.
    """
    for name in _OF_THE_COMPUTATION:
        if not is_off(config.get(name)):
            raise RefusedError(
                f"{path}: adapters with {name}={quoted(config[name])} cannot be converted, because "
                "no format can express it; merge the adapter with the program that trained it."
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OF_THE_BASE):
        raise RefusedError(
            f"{path}: init_lora_weights={quoted(start)} changed the weights of the base model, and "
            "A and B belong to those; save the adapter again with PEFT's "
            "path_initial_model_for_weight_conversion."
        )


def refuse_transposed(path: Path, config: Mapping[str, Any], linears: Collection[str]) -> None:
    """Refuse LoRA on layers that hold their weights transposed; of experts the field says nothing.

    Args:
        path: the adapter's file, for the message.
        config: its configuration.
        linears: paths of the layers beside experts that it adapts.
    Raises:
        RefusedError: if fan_in_fan_out is true and there are such layers.
    """
    if config.get("fan_in_fan_out") and linears:
        raise RefusedError(
            f"{path}: fan_in_fan_out=True says that the weights of {min(linears)} are transposed, "
            "which no format can express; merge the adapter with the program that trained it."
        )


def left_out(config: Mapping[str, Any]) -> list[str]:
    """A note on fields that are not known, which a conversion leaves out."""
    known = {field.name for field in fields(MoELoraConfig)}
    unknown = sorted(
        name for name, value in config.items() if value and name not in (*known, *OF_OTHERS)
    )
    if not unknown:
        return []
    return [f"fields of adapter_config.json that are not known are left out: {quoted(unknown)}"]
