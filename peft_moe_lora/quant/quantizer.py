"""The quantizer that transformers' loader calls while it loads a checkpoint.

The loader reads the shards, renames their tensors, stacks the tensors of the experts and places
them in the model. `ExpertsQuantizer` quantizes each stack as soon as it is complete. `registration`
registers it with transformers.
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

# what the loader passes: parameter name -> tensor, or a list with one tensor
Tensors = MutableMapping[str, torch.Tensor | list[torch.Tensor]]


class ExpertsQuantizationConfig(QuantizationConfigMixin):
    """The settings of `load_quantized`, in the form that transformers' loader takes.

    Args:
        experts, blocksize, double_quant: as in `load_quantized`.
        linear: bitsandbytes' config for the linear layers, also as a dict; None does not quantize
            them.
    """

    def __init__(
        self,
        experts: str,
        blocksize: int = 64,
        double_quant: bool = True,
        linear: BitsAndBytesConfig | dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        # transformers' enum has no member for this method
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
    """Quantizes stacks of experts; with `linear`, bitsandbytes quantizes the linear layers."""

    quantization_config: ExpertsQuantizationConfig

    def __init__(self, quantization_config: ExpertsQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.linear: HfQuantizer | None = None
        if quantization_config.linear is not None:
            # imported here, because it imports bitsandbytes, which may not be installed
            from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

            self.linear = Bnb4BitHfQuantizer(quantization_config.linear, pre_quantized=False)

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def quantized_element_size(self) -> float:
        """Bytes per weight, scales included; the loader plans its memory with this number."""
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
        # MXFP4 blocks are quantized already
        if self.quantization_config.experts == MXFP4:
            return False
        if _is_stack(model, param_name):
            return True
        return self.linear is not None and self.linear.param_needs_quantization(model, param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """The conversions from tensors to parameters that the model does not define itself."""
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
            model: the model that owns the parameters.
            missing_keys: the parameters that are not loaded yet.
            kwargs: further arguments of the loader, passed on to bitsandbytes.
        Returns: the other tensors, as bitsandbytes returns them.
        """
        settings = self.hf_quantizer.quantization_config
        others = {}
        for name in list(input_dict):
            # no reference to the dense stack stays, so it is freed before the next one is quantized
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
        assert linear is not None, "only a quantizer for linear layers asks for other tensors"
        operation = linear.get_quantize_ops()
        return operation.convert(others, model=model, missing_keys=missing_keys, **kwargs)


class _KeepPacked(ConversionOps):
    """Stores published MXFP4 blocks [E, N, K / 32, 16] and scales [E, N, K / 32] unchanged."""

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
            model: the model that owns the parameter.
            full_layer_name: full name of the parameter.
            missing_keys: the parameters that are not loaded yet.
            kwargs: further arguments of the loader, not used.
        Returns: {}, because no tensor is left for the loader to place.
        Raises:
            ValueError: if the blocks do not have the parameter's shape.
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
                f"{weight.shape}; the checkpoint and its config do not belong together. Download "
                "both again."
            )
        _place(model, full_layer_name, weight, missing_keys)
        return {}


def is_quantizable(module: nn.Module) -> bool:
    """Whether a module holds experts as stacks that can be quantized."""
    return is_experts(module) and type(module).__name__ not in FAMILIES


def _is_stack(model: nn.Module, name: str) -> bool:
    module, last = get_module_from_name(model, name)
    return last in STACKS and is_quantizable(module)


def _only(value: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """The tensor; the loader may pass it as a list with one tensor."""
    if isinstance(value, list):
        return value[0]
    return value


def _place(
    model: PreTrainedModel, name: str, weight: QuantizedWeight, missing_keys: set[str] | None
) -> None:
    """Store a quantized weight in its module, and mark it as loaded."""
    module, last = get_module_from_name(model, name)
    store(module, last, weight)
    listed = parametrizations(module, last)
    # the loader initializes every tensor and module without this attribute
    for tensor in (*listed.parameters(), *listed.buffers()):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # the loader's own attribute
    module._is_hf_initialized = True
    if missing_keys is not None:
        missing_keys.discard(name)
