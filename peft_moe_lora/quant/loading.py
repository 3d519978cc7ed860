"""Loads a model with quantized experts; only one projection of one layer is dense at a time."""

from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from ..experts.families import STACKS
from ..experts.stored import is_stacked, stored_weight
from ..ops.quantize import BLOCKSIZES, FORMATS
from ..ops.quantized import QuantizedWeight
from .quantizer import MXFP4, ExpertsQuantizationConfig, is_quantizable


def load_quantized(
    name_or_path: str,
    experts: str = "nf4",
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    quantization_config: BitsAndBytesConfig | None = None,
    model_class: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> PreTrainedModel:
    """`from_pretrained` with quantized experts; the whole dense model is never in memory.

    Every stack of experts is quantized on its device as soon as its shards are read. While it is
    quantized, the tensors it was stacked from are in memory too: about three times its dense size.
    What is not experts loads as usual.

    Args:
        name_or_path: of the model.
        experts: "nf4", "fp4" or "int8" for an unquantized checkpoint; "mxfp4" for one published in
            MXFP4 (gpt-oss), whose packed blocks are kept as they are.
        blocksize, double_quant: as in `quantize_experts`.
        quantization_config: bitsandbytes' config for the linear layers, in 4 bits; None leaves them
            as they are.
        model_class: the class whose `from_pretrained` loads the model.
        kwargs: for `from_pretrained`: dtype, device_map and others.
    Returns: the model, ready for an adapter.
    Raises:
        ValueError: if the format does not exist or does not fit that of the checkpoint, if the
            model has no experts, or if the checkpoint does not hold all of them.
    """
    _check_settings(experts, blocksize, quantization_config)
    config = kwargs.pop("config", None)
    if config is None:
        trusted = kwargs.get("trust_remote_code")
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trusted)
    _check_format(name_or_path, _stored_format(config), experts)
    settings = ExpertsQuantizationConfig(experts, blocksize, double_quant, quantization_config)
    given: ExpertsQuantizationConfig | None = settings
    if experts == MXFP4:
        # the config of the checkpoint names transformers' own quantizer, which repacks the weights
        # for its kernel; ours takes its place
        config.quantization_config = settings.to_dict()
        given = None
    model = model_class.from_pretrained(
        name_or_path, config=config, quantization_config=given, **kwargs
    )
    _check_loaded(name_or_path, model)
    return model


def _check_settings(
    experts: str, blocksize: int, quantization_config: BitsAndBytesConfig | None
) -> None:
    if experts not in (*FORMATS, MXFP4):
        raise ValueError(f"experts must be one of {(*FORMATS, MXFP4)}, got {experts!r}.")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize!r}.")
    if quantization_config is None or getattr(quantization_config, "load_in_4bit", False):
        return
    raise ValueError(
        "quantization_config must be for linear layers in 4 bits, "
        f"BitsAndBytesConfig(load_in_4bit=True); got {type(quantization_config).__name__} without "
        "load_in_4bit."
    )


def _stored_format(config: Any) -> str | None:
    """The quantization method of a checkpoint by its config; None if it is not quantized."""
    stored = getattr(config, "quantization_config", None) or {}
    method = getattr(stored, "quant_method", None)
    if isinstance(stored, dict):
        method = stored.get("quant_method")
    # transformers may have made it a member of its enum
    return getattr(method, "value", method)


def _check_format(name_or_path: str, stored: str | None, experts: str) -> None:
    """Refuse a checkpoint that `experts` cannot be made from."""
    needed = None
    if experts == MXFP4:
        needed = MXFP4
    if stored == needed:
        return
    remedy = {
        None: 'the checkpoint is not quantized; experts must be "nf4", "fp4" or "int8".',
        MXFP4: 'pass experts="mxfp4", which keeps it as it is, or load it with '
        "Mxfp4Config(dequantize=True) and quantize_experts(model).",
    }
    other = "load it with from_pretrained; the README lists the formats that adapters support."
    raise ValueError(
        f"{name_or_path} is stored in {stored or 'full precision'}, from which experts={experts!r} "
        f"cannot be made: {remedy.get(stored, other)}"
    )


def _check_loaded(name_or_path: str, model: nn.Module) -> None:
    """Refuse a model that has no experts, or some that stayed dense."""
    stacks = 0
    dense = 0
    for module in model.modules():
        if not is_quantizable(module):
            continue
        for name in STACKS:
            if is_stacked(module, name):
                stacks += 1
                dense += not isinstance(stored_weight(module, name), QuantizedWeight)
    if not stacks:
        raise ValueError(f"{name_or_path} has no routed experts that could be quantized.")
    if dense:
        raise ValueError(
            f"{name_or_path}: the checkpoint did not give {dense} of {stacks} stacks of experts; "
            "download or save it again."
        )
