"""Loads a model with quantized experts; only one projection of one layer is dense at a time."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from ..experts.families import STACKS
from ..experts.stored import is_stacked, stored_weight
from ..files.text import quoted
from ..ops.quantize import BLOCKSIZES, FORMATS
from ..ops.quantized import QuantizedWeight
from .checkpoint import REMEDY, is_quantizable
from .quantizer import MXFP4, ExpertsQuantizationConfig
from .saving import forbid_saving


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

    Every stack of experts is quantized on its device as soon as its shards are read. At that moment
    the tensors that were stacked are in memory too: about three times the dense size of one stack.
    All other parameters are loaded as usual.

    Args:
        name_or_path: the model's name on the hub, or its folder.
        experts: "nf4", "fp4" or "int8" for an unquantized checkpoint; "mxfp4" for a checkpoint in
            MXFP4 (gpt-oss), whose packed blocks are kept unchanged.
        blocksize, double_quant: as in `quantize_experts`.
        quantization_config: bitsandbytes' config for the linear layers, in 4 or 8 bits; None
            does not quantize them.
        model_class: the class whose `from_pretrained` loads the model.
        kwargs: further arguments of `from_pretrained`: dtype, device_map and others.
    Returns: the model, ready for an adapter.
    Raises:
        ValueError: if the format is unknown or cannot be made from the checkpoint, if a keyword
            divides the model among processes, if the model has no experts, or if the checkpoint
            does not hold each of them exactly once, in the configuration's shapes, in a floating
            dtype and finite. Names, dtypes and shapes of the files are checked before a tensor is
            read.
    """
    _check_settings(experts, blocksize, quantization_config)
    _check_undivided(kwargs)
    config = kwargs.pop("config", None)
    if config is None:
        trusted = kwargs.get("trust_remote_code")
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trusted)
    _check_format(name_or_path, _stored_format(config), experts)
    settings = ExpertsQuantizationConfig(experts, blocksize, double_quant, quantization_config)
    given: ExpertsQuantizationConfig | None = settings
    if experts == MXFP4:
        # the checkpoint's config names transformers' own quantizer, which repacks the weights for
        # its kernel; our quantizer replaces it
        config.quantization_config = settings.to_dict()
        given = None
    model = model_class.from_pretrained(
        name_or_path, config=config, quantization_config=given, **kwargs
    )
    _check_loaded(name_or_path, model)
    forbid_saving(model, settings)
    return model


def _check_undivided(kwargs: Mapping[str, Any]) -> None:
    """Raise if the loader is asked to divide the model, because stacks are quantized whole."""
    for name in ("distributed_config", "tp_plan", "tp_size", "device_mesh"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"{name}={quoted(kwargs[name])}: load_quantized quantizes whole stacks of experts, "
                "but transformers would give it the part of one process; leave it unset, and "
                "train with one whole model in each process (DDP)."
            )


def _check_settings(
    experts: str, blocksize: int, quantization_config: BitsAndBytesConfig | None
) -> None:
    if experts not in (*FORMATS, MXFP4):
        raise ValueError(f"experts must be one of {(*FORMATS, MXFP4)}, got {experts!r}.")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize!r}.")
    if quantization_config is None:
        return
    for setting in ("load_in_4bit", "load_in_8bit"):
        if getattr(quantization_config, setting, False):
            return
    raise ValueError(
        "quantization_config must be for linear layers in 4 or 8 bits, "
        "BitsAndBytesConfig(load_in_4bit=True) or BitsAndBytesConfig(load_in_8bit=True); got "
        f"{type(quantization_config).__name__} with neither of the two."
    )


def _stored_format(config: Any) -> str | None:
    """The quantization method that a checkpoint's config names; None if it is not quantized."""
    stored = getattr(config, "quantization_config", None) or {}
    method = getattr(stored, "quant_method", None)
    if isinstance(stored, dict):
        method = stored.get("quant_method")
    # transformers may have converted the name to a member of its enum
    return getattr(method, "value", method)


def _check_format(name_or_path: str, stored: str | None, experts: str) -> None:
    """Raise if the format `experts` cannot be made from a checkpoint stored as `stored`."""
    needed = None
    if experts == MXFP4:
        needed = MXFP4
    if stored == needed:
        return
    remedy = {
        None: f"the checkpoint is not quantized; experts must be one of {FORMATS}.",
        MXFP4: 'pass experts="mxfp4", which keeps it as it is, or load it with '
        "Mxfp4Config(dequantize=True) and quantize_experts(model).",
    }
    other = (
        "load it with from_pretrained; docs/guides/quantized-bases.md lists the formats that "
        "adapters support."
    )
    raise ValueError(
        f"{name_or_path} is stored in {stored or 'full precision'}, and experts={experts!r} cannot "
        f"be made from it: {remedy.get(stored, other)}"
    )


def _check_loaded(name_or_path: str, model: nn.Module) -> None:
    """Raise if a model has no experts, or if some of its stacks are still dense."""
    stacks = 0
    dense = []
    for path, module in model.named_modules():
        if not is_quantizable(module):
            continue
        for name in STACKS:
            if is_stacked(module, name):
                stacks += 1
                weight = stored_weight(module, name)
                if not isinstance(weight, QuantizedWeight):
                    dense.append(f"{path}.{name} {list(weight.shape)}")
    if not stacks:
        raise ValueError(f"{name_or_path} has no routed experts that could be quantized.")
    if dense:
        raise ValueError(
            f"{name_or_path}: the checkpoint does not hold {len(dense)} of {stacks} stacks of "
            f"experts: {', '.join(dense[:4])}. {REMEDY}"
        )
