"""The quantizer that transformers' loader calls while it loads a checkpoint.

The loader reads the shards, renames their tensors, stacks the tensors of the experts and places
them in the model. `ExpertsQuantizer` quantizes each stack as soon as it is complete. `registration`
registers it with transformers.
"""

import logging
from collections.abc import MutableMapping, Sequence
from typing import Any, cast

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from ..experts.decoding import parametrizations, store
from ..experts.families import STACKS
from ..experts.stored import MXFP4_BLOCKSIZE
from ..ops.quantize import KNOWN_FORMATS, code_of, quantize
from ..ops.quantized import Codes4bit, QuantizedWeight
from .checkpoint import REMEDY, check_checkpoint, check_stack, first_of, is_stack

logger = logging.getLogger(__name__)

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
        # what is wrong with the tensors read so far; the loader swallows an operation's errors
        self.problems: list[str] = []
        # the model and its files, until the files' headers are checked
        self._to_check: tuple[PreTrainedModel, Sequence[str]] | None = None
        self.linear: HfQuantizer | None = None
        if quantization_config.linear is not None:
            # imported here, because they import bitsandbytes, which may not be installed
            from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
            from transformers.quantizers.quantizer_bnb_8bit import Bnb8BitHfQuantizer

            linear: type[HfQuantizer] = Bnb4BitHfQuantizer
            if quantization_config.linear.load_in_8bit:
                linear = Bnb8BitHfQuantizer
            self.linear = linear(quantization_config.linear, pre_quantized=False)

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def quantized_element_size(self) -> float:
        """Bytes per weight, scales included; the loader plans its memory with this number."""
        return KNOWN_FORMATS[self.quantization_config.experts].element_size

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """False: only the adapter was trained, so only the adapter is saved."""
        logger.warning(
            "a model with experts in 4 or 8 bits is not saved, only its adapter is; before saving "
            "the model, call dequantize_experts(model)."
        )
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
        if is_stack(model, param_name):
            return True
        return self.linear is not None and self.linear.param_needs_quantization(model, param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """The conversions from tensors to parameters that the model does not define itself."""
        if self.quantization_config.experts != MXFP4:
            return []
        return [
            WeightConverter(
                [f"{name}_blocks", f"{name}_scales"], name, operations=[_KeepPacked(self)]
            )
            for name in STACKS
        ]

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], *args: Any
    ) -> list[WeightTransform]:
        """The loader's conversions, after the checkpoint's headers were checked with them.

        The loader asks for them before it reads a tensor. transformers 5.17 passes no model in
        `args`.
        """
        conversions = super().update_weight_conversions(weight_conversions, *args)
        if self._to_check is not None:
            check_checkpoint(*self._to_check, conversions)
            self._to_check = None
        return conversions

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> PreTrainedModel:
        if checkpoint_files is not None:
            self._to_check = (model, checkpoint_files)
        if self.linear is not None:
            self.linear._process_model_before_weight_loading(
                model, checkpoint_files=checkpoint_files, **kwargs
            )
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        if self.problems:
            raise ValueError("\n".join(self.problems))
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
            if not is_stack(model, name):
                others[name] = tensor
                continue
            try:
                check_stack(name, _parameter(model, name), _only(tensor))
                weight = quantize(
                    _only(tensor),
                    settings.experts,
                    blocksize=settings.blocksize,
                    double_quant=settings.double_quant,
                )
            except ValueError as error:
                self.hf_quantizer.problems.append(str(error))
                _skip(model, name, missing_keys)
                continue
            finally:
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

    def __init__(self, hf_quantizer: ExpertsQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> "_KeepPacked":
        """Itself: the loader copies each operation, but there is one list of problems."""
        return self

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
        """
        found = {name.rpartition("_")[2]: _only(tensor) for name, tensor in input_dict.items()}
        module, _ = get_module_from_name(model, full_layer_name)
        parameter = _parameter(model, full_layer_name)
        rows = parameter
        if module.is_transposed:
            rows = parameter.transpose(1, 2)
        try:
            _check_packed(full_layer_name, rows, found["blocks"], found["scales"])
        except ValueError as error:
            self.hf_quantizer.problems.append(str(error))
            _skip(model, full_layer_name, missing_keys)
            return {}
        blocks = found["blocks"]
        E, N, groups, _ = blocks.shape
        weight = Codes4bit(
            format=MXFP4,
            stored_shape=(E, N, MXFP4_BLOCKSIZE * groups),
            dtype=parameter.dtype,
            transposed=module.is_transposed,
            packed=blocks.contiguous().view(-1),
            code=code_of(MXFP4, blocks.device),
            scales=found["scales"].contiguous().view(-1),
            blocksize=MXFP4_BLOCKSIZE,
            low_first=True,
        )
        _place(model, full_layer_name, weight, missing_keys)
        return {}


def _check_packed(
    name: str, rows: torch.Tensor, blocks: torch.Tensor, scales: torch.Tensor
) -> None:
    """Raise if MXFP4 blocks and scales are not those of the parameter `name`.

    Args:
        name: the parameter's full name.
        rows: the parameter as [E, N, K], maybe on the meta device.
        blocks, scales: as the checkpoint holds them.
    """
    E, N, K = rows.shape
    if K % MXFP4_BLOCKSIZE:
        raise ValueError(
            f"{name} has rows of {K} values by the configuration, but MXFP4 needs a multiple of "
            f"{MXFP4_BLOCKSIZE}. {REMEDY}"
        )
    groups = K // MXFP4_BLOCKSIZE
    needed = {"blocks": (E, N, groups, MXFP4_BLOCKSIZE // 2), "scales": (E, N, groups)}
    for part, tensor in (("blocks", blocks), ("scales", scales)):
        if tuple(tensor.shape) != needed[part] or tensor.dtype != torch.uint8:
            raise ValueError(
                f"{name} [E, N, K] = {list(rows.shape)} needs {part} {list(needed[part])} of "
                "torch.uint8 by the configuration, but the checkpoint holds "
                f"{list(tensor.shape)} of {tensor.dtype}. {REMEDY}"
            )
    # the largest exponent stands for NaN
    bad = torch.nonzero((scales == 255).flatten(1).any(1)).flatten().tolist()
    if bad:
        raise ValueError(
            f"{name} [E, N, K] = {list(rows.shape)} must be finite, but scales of the experts "
            f"{first_of(bad)} are NaN. {REMEDY}"
        )


def _only(value: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """The tensor; the loader may pass it as a list with one tensor."""
    if isinstance(value, list):
        return value[0]
    return value


def _parameter(model: PreTrainedModel, name: str) -> torch.Tensor:
    """A parameter by its full name; the loader's models are on the meta device."""
    module, last = get_module_from_name(model, name)
    return getattr(module, last)


def _skip(model: PreTrainedModel, name: str, missing_keys: set[str] | None) -> None:
    """Mark a parameter as loaded; the model will be refused, so nothing takes its place."""
    _parameter(model, name)._is_hf_initialized = True  # type: ignore[attr-defined]  # see _place
    if missing_keys is not None:
        missing_keys.discard(name)


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
