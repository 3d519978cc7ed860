"""Quantizes the experts of a model in memory, and dequantizes them again."""

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..experts.decoding import Decoding, store, unstore
from ..experts.layout import PROJECTIONS, is_experts, read_layout
from ..experts.stored import Weight, stored_weight
from ..layers.layer import MoELoraLayer
from ..ops import QuantizedWeight
from ..ops.quantize import quantize
from ..parallel.sharding import is_sharded
from .checkpoint import experts_not_finite, first_of
from .quantizer import ExpertsQuantizationConfig
from .saving import allow_saving, forbid_saving


def quantize_experts(
    model: nn.Module, format: str = "nf4", *, blocksize: int = 64, double_quant: bool = True
) -> nn.Module:
    """Store the routed experts of a model in 4 or 8 bits, one projection after the other.

    The formats are those of bitsandbytes, bit for bit: "nf4" and "fp4" with one scale for each
    block of `blocksize` values, and "int8" with one scale for each row. With `double_quant` the
    scales of blocks are stored in 8 bits too: 4.13 bits per weight instead of 4.5 with a blocksize
    of 64.

    Biases, routers and all other layers do not change. The model runs as before, but each call of
    an experts module decodes its whole stacks. With an adapter, only the experts that have rows are
    decoded. transformers refuses to save the model, but not its adapters, until
    `dequantize_experts` was called.

    Args:
        model: changed in place; its experts may have an adapter.
        format: "nf4", "fp4" or "int8".
        blocksize: number of values that share a scale, a power of two from 32 to 4096; not used for
            int8.
        double_quant: whether to store the scales in 8 bits; not used for int8.
    Returns: the model.
    Raises:
        ValueError: if the model has no experts, or if some experts are in an unsupported form, are
            quantized already, are sharded or on the meta device, are not finite, or have an adapter
            merged in. The model is left unchanged.
    """
    modules = _experts(model)
    for path, module in modules.items():
        for weight in _weights(module).values():
            if isinstance(weight, QuantizedWeight):
                raise ValueError(
                    f"{path} is stored in {weight.format} already; load the model unquantized."
                )
            if is_sharded(weight):
                raise ValueError(
                    f"{path} is divided among processes, but stacks of experts are quantized "
                    "whole; quantize the model before it is sharded, and not one that was loaded "
                    "with distributed_config."
                )
            if weight.is_meta:
                raise ValueError(
                    f"{path} is on the meta device; load its weights first, or use load_quantized."
                )
    for path, module in modules.items():
        for name, weight in _weights(module).items():
            assert isinstance(weight, torch.Tensor), "quantized weights are refused above"
            bad = experts_not_finite(weight)
            if bad:
                raise ValueError(
                    f"{path}.{name} {list(weight.shape)} must be finite, but the experts "
                    f"{first_of(bad)} hold NaN or infinity; load the weights again."
                )
    for module in modules.values():
        for name in _names(module):
            # no variable keeps the dense stack alive, so `store` frees it
            weight = _quantized(stored_weight(module, name), format, blocksize, double_quant)
            store(module, name, weight)
    forbid_saving(model, ExpertsQuantizationConfig(format, blocksize, double_quant))
    return model


def dequantize_experts(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Store experts that `quantize_experts` or bitsandbytes quantized as dense parameters again.

    Args:
        model: changed in place.
        dtype: dtype of the parameters; by default the dtype in which they are computed.
    Returns: the model.
    Raises:
        ValueError: if the model has no experts, or if an experts module supports only its quantized
            format.
    """
    modules = _experts(model)
    for path, module in modules.items():
        for name, weight in _weights(module).items():
            if not isinstance(weight, QuantizedWeight):
                continue
            if not parametrize.is_parametrized(module, name):
                raise ValueError(
                    f"{path} ({type(module).__name__}) is made for {weight.format} and cannot hold "
                    "dense weights; load the model dequantized."
                )
    for module in modules.values():
        for name, weight in _weights(module).items():
            if isinstance(weight, QuantizedWeight):
                dense = weight.dense().contiguous()
                unstore(module, name, dense.to(dtype or weight.dtype))
    allow_saving(model)
    return model


def _experts(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> experts module; for an adapted layer, the base module.

    Raises:
        ValueError: if there are none, or if one cannot be quantized or has an adapter merged in.
    """
    modules = {}
    for path, module in model.named_modules():
        if isinstance(module, MoELoraLayer):
            if module.merged:
                raise ValueError(
                    f"{path} has {module.merged_adapters} merged in; call unmerge_adapter() first."
                )
        elif not isinstance(module, Decoding) and is_experts(module):
            modules[path] = module
    if not modules:
        raise ValueError("the model has no routed experts to quantize.")
    for path, module in modules.items():
        if read_layout(module).family is not None:
            raise ValueError(
                f"{path} ({type(module).__name__}) stores its experts in a form of its own, which "
                "cannot be quantized here; quantize only the model's linear layers."
            )
    return modules


def _names(module: nn.Module) -> list[str]:
    """Parameter names of an experts module's projections."""
    layout = read_layout(module)
    return [layout.projection(name).weight for name in PROJECTIONS]


def _weights(module: nn.Module) -> dict[str, Weight]:
    """Parameter name -> weight, dense or quantized, of an experts module."""
    return {name: stored_weight(module, name) for name in _names(module)}


def _quantized(weight: Weight, format: str, blocksize: int, double_quant: bool) -> QuantizedWeight:
    assert isinstance(weight, torch.Tensor), "the caller has refused quantized weights"
    return quantize(weight, format, blocksize=blocksize, double_quant=double_quant)
