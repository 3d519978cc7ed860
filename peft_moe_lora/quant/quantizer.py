"""What transformers' loader calls to quantize stacks of experts while it loads a checkpoint.

The loader reads the shards, renames their tensors, stacks those of the experts and places them. The
quantizer here takes each stack as soon as it is complete. `registration` makes the loader know it.
"""

from collections.abc import MutableMapping
from typing import Any, cast

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from ..experts.decoding import parametrizations, store
from ..experts.families import FAMILIES, STACKS
from ..experts.layout import is_experts
from ..experts.stored import MXFP4_BLOCKSIZE
from ..ops.quantize import KNOWN_FORMATS, code_of, quantize
from ..ops.quantized import Codes4bit, QuantizedWeight

METHOD = "peft_moe_lora"
MXFP4 = "mxfp4"

# what the loader hands over: parameter name -> tensor, or a list with one
Tensors = MutableMapping[str, torch.Tensor | list[torch.Tensor]]


class ExpertsQuantizationConfig(QuantizationConfigMixin):
    """The settings of `load_quantized`, as transformers' loader takes them.

    Args:
        experts, blocksize, double_quant: as in `load_quantized`.
        linear: bitsandbytes' config for the linear layers, or what its `to_dict` returned, or None.
    """

    def __init__(
        self,
        experts: str,
        blocksize: int = 64,
        double_quant: bool = True,
        linear: BitsAndBytesConfig | dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        # a method of our own, which transformers' enum does not have
        self.quant_method = cast(QuantizationMethod, METHOD)
        self.experts = experts
        self.blocksize = blocksize
        self.double_quant = double_quant
        if isinstance(linear, dict):
            linear = cast(BitsAndBytesConfig, BitsAndBytesConfig.from_dict(linear))
        self.linear = linear

    def to_dict(self) -> dict[str, Any]:
        """The settings in JSON's types."""
        settings = dict(vars(self))
        if self.linear is not None:
            settings["linear"] = self.linear.to_dict()
        return settings


class ExpertsQuantizer(HfQuantizer):
    """Quantizes stacks of experts, and lets bitsandbytes quantize linear layers if asked to."""

    quantization_config: ExpertsQuantizationConfig

    def __init__(self, quantization_config: ExpertsQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.linear: HfQuantizer | None = None
        if quantization_config.linear is not None:
            # imports bitsandbytes, which need not be installed
            from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

            self.linear = Bnb4BitHfQuantizer(quantization_config.linear, pre_quantized=False)

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def quantized_element_size(self) -> float:
        """Bytes of one weight with its part of the scales; the loader plans memory with it."""
        return KNOWN_FORMATS[self.quantization_config.experts].element_size

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """False: only the adapter was trained, so only the adapter is saved."""
        return False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if self.linear is not None:
            self.linear.validate_environment(*args, **kwargs)

    def update_device_map(self, device_map: dict[str, Any] | None) -> dict[str, Any] | None:
        if self.linear is None:
            return device_map
        return self.linear.update_device_map(device_map)

    def param_needs_quantization(
        self, model: PreTrainedModel, param_name: str, **kwargs: Any
    ) -> bool:
        # packed blocks are quantized already
        if self.quantization_config.experts == MXFP4:
            return False
        if _is_stack(model, param_name):
            return True
        return self.linear is not None and self.linear.param_needs_quantization(model, param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """The conversions of tensors to parameters that the model itself does not have."""
        if self.quantization_config.experts != MXFP4:
            return []
        return [
            WeightConverter([f"{name}_blocks", f"{name}_scales"], name, operations=[_KeepPacked()])
            for name in STACKS
        ]

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        if self.linear is not None:
            self.linear._process_model_before_weight_loading(model, **kwargs)
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        if self.linear is None:
            return model
        return self.linear._process_model_after_weight_loading(model, **kwargs)


class _Quantize(ConversionOps):
    """Quantizes complete stacks and stores them in their modules."""

    def __init__(self, hf_quantizer: ExpertsQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(  # type: ignore[override]  # the loader passes the other arguments by keyword
        self,
        input_dict: Tensors,
        *,
        model: PreTrainedModel,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Quantize the stacks of experts in `input_dict`, and remove them from it.

        Args:
            input_dict: full parameter name -> tensor.
            model: whose parameters these are.
            missing_keys: the parameters that the checkpoint has not given so far.
            kwargs: what else the loader passes, for bitsandbytes.
        Returns: the other tensors, as bitsandbytes returns them.
        """
        settings = self.hf_quantizer.quantization_config
        others = {}
        for name in list(input_dict):
            # no reference may stay: the dense stack is freed before the next one is quantized
            tensor = input_dict.pop(name)
            if not _is_stack(model, name):
                others[name] = tensor
                continue
            weight = quantize(
                _only(tensor),
                settings.experts,
                blocksize=settings.blocksize,
                double_quant=settings.double_quant,
            )
            del tensor
            _place(model, name, weight, missing_keys)
        if not others:
            return {}
        linear = self.hf_quantizer.linear
        assert linear is not None, "without a quantizer for linear layers, only stacks come here"
        operation = linear.get_quantize_ops()
        return operation.convert(others, model=model, missing_keys=missing_keys, **kwargs)


class _KeepPacked(ConversionOps):
    """Stores MXFP4 blocks [E, N, K / 32, 16] and scales [E, N, K / 32] as they were published."""

    def convert(  # type: ignore[override]  # the loader passes the other arguments by keyword
        self,
        input_dict: Tensors,
        *,
        model: PreTrainedModel,
        full_layer_name: str,
        missing_keys: set[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Store the two tensors of one stack.

        Args:
            input_dict: name -> tensor; the names end in "_blocks" and "_scales".
            model: whose parameter this is.
            full_layer_name: full name of the parameter.
            missing_keys: the parameters that the checkpoint has not given so far.
            kwargs: what else the loader passes, not used.
        Returns: {}, because nothing is left to place.
        Raises:
            ValueError: if the blocks are not of the parameter's shape.
        """
        found = {name.rpartition("_")[2]: _only(tensor) for name, tensor in input_dict.items()}
        blocks = found["blocks"]
        scales = found["scales"]
        module, name = get_module_from_name(model, full_layer_name)
        parameter = getattr(module, name)
        E, N, groups, _ = blocks.shape
        weight = Codes4bit(
            format=MXFP4,
            stored_shape=(E, N, MXFP4_BLOCKSIZE * groups),
            dtype=parameter.dtype,
            transposed=module.is_transposed,
            packed=blocks.contiguous().view(-1),
            code=code_of(MXFP4, blocks.device),
            scales=scales.contiguous().view(-1),
            blocksize=MXFP4_BLOCKSIZE,
            low_first=True,
        )
        if weight.shape != tuple(parameter.shape):
            raise ValueError(
                f"{full_layer_name} is {tuple(parameter.shape)}, but its blocks are "
                f"{weight.shape}; the checkpoint and its config do not belong together."
            )
        _place(model, full_layer_name, weight, missing_keys)
        return {}


def is_quantizable(module: nn.Module) -> bool:
    """Whether a module holds experts in stacks, not in a form of its family."""
    return is_experts(module) and type(module).__name__ not in FAMILIES


def _is_stack(model: nn.Module, name: str) -> bool:
    module, last = get_module_from_name(model, name)
    return last in STACKS and is_quantizable(module)


def _only(value: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """A tensor, which the loader may hand over as a list of one."""
    if isinstance(value, list):
        return value[0]
    return value


def _place(
    model: PreTrainedModel, name: str, weight: QuantizedWeight, missing_keys: set[str] | None
) -> None:
    """Store a quantized weight in its module, and tell the loader that it is loaded."""
    module, last = get_module_from_name(model, name)
    store(module, last, weight)
    listed = parametrizations(module, last)
    # the loader initializes whatever does not have this attribute
    for tensor in (*listed.parameters(), *listed.buffers()):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # the loader's own attribute
    module._is_hf_initialized = True
    if missing_keys is not None:
        missing_keys.discard(name)
