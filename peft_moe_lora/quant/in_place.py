"""Experts in 4 and 8 bits: quantizing those of a model at hand, and giving them back dense."""

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..experts.decoding import Decoding, store, unstore
from ..experts.layout import PROJECTIONS, is_experts, read_layout
from ..experts.stored import stored_weight
from ..ops import QuantizedWeight
from ..ops.quantize import quantize
from ..tuner.layer import MoELoraLayer


def quantize_experts(
    model: nn.Module, format: str = "nf4", *, blocksize: int = 64, double_quant: bool = True
) -> nn.Module:
    """Store the routed experts of a model in 4 or 8 bits, projection by projection, where they lie.

    The formats are bitsandbytes', bit for bit: "nf4" and "fp4" in blocks of `blocksize` values, whose scales
    `double_quant` stores in 8 bits too (4.13 instead of 4.5 bits a weight at 64); "int8" with a scale a row. Biases,
    routers and all other layers stay as they are. The model runs as before, decoding a layer's whole stacks to do so;
    under an adapter only the experts that have rows are decoded.

    Args:
        model: changed in place; an adapter may already ride on its experts.
        format: "nf4", "fp4" or "int8".
        blocksize: values that share a scale, 32 to 4096, a power of two; not for int8.
        double_quant: not for int8.
    Returns: the model.
    Raises:
        ValueError: before anything is changed, if the model has no experts, or some that cannot be quantized: of an
            unsupported form, quantized already, on the meta device, or with an adapter merged in.
    """
    modules = _experts(model)
    for path, module in modules.items():
        for weight in _weights(module).values():
            if isinstance(weight, QuantizedWeight):
                raise ValueError(
                    f"{path} is stored in {weight.format} already; load the model unquantized."
                )
            if weight.is_meta:
                raise ValueError(
                    f"{path} is on the meta device; load its weights first, or use load_quantized."
                )
    for module in modules.values():
        for name, weight in _weights(module).items():
            store(
                module,
                name,
                quantize(weight, format, blocksize=blocksize, double_quant=double_quant),
            )
            del weight
    return model


def dequantize_experts(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Store the routed experts that `quantize_experts` or bitsandbytes quantized as dense parameters again.

    Args:
        model: changed in place.
        dtype: of the parameters; that in which they were computed by default.
    Returns: the model.
    Raises:
        ValueError: if the model has no experts, or some stay quantized because their module is made for that.
    """
    modules = _experts(model)
    for path, module in modules.items():
        for name, weight in _weights(module).items():
            if isinstance(weight, QuantizedWeight) and not parametrize.is_parametrized(
                module, name
            ):
                raise ValueError(
                    f"{path} ({type(module).__name__}) is made for {weight.format}; load the model dequantized."
                )
    for module in modules.values():
        for name, weight in _weights(module).items():
            if isinstance(weight, QuantizedWeight):
                unstore(module, name, weight.dense().contiguous().to(dtype or weight.dtype))
    return model


def _experts(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> experts module, of all that are not adapted or hold no merged adapter.

    Raises:
        ValueError: if there are none, or one has an adapter merged in.
    """
    for path, module in model.named_modules():
        if isinstance(module, MoELoraLayer) and module.merged:
            raise ValueError(
                f"{path} has {module.merged_adapters} merged in; unmerge_adapter() first."
            )
    # the wrapper shows its base's projections to nobody, so only base modules are found
    modules = {
        path: module
        for path, module in model.named_modules()
        if not isinstance(module, Decoding | MoELoraLayer) and is_experts(module)
    }
    if not modules:
        raise ValueError("the model has no routed experts to quantize.")
    for path, module in modules.items():
        if read_layout(module).family is not None:
            raise ValueError(
                f"{path} ({type(module).__name__}) stores its experts in a form of its own, which is not quantized "
                "here; quantize the model with its linear layers alone."
            )
    return modules


def _weights(module: nn.Module) -> dict[str, torch.Tensor | QuantizedWeight]:
    """Parameter name -> what it stores, of an experts module."""
    layout = read_layout(module)
    return {
        name: stored_weight(module, name)
        for name in (layout.projection(p).weight for p in PROJECTIONS)
    }
