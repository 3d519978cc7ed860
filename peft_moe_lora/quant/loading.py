"""A model loaded with its experts quantized as they arrive: never more than one projection of one layer is dense.

transformers reads the shards, renames, stacks and places; the quantizer here takes each stack from its hands.
"""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..experts.decoding import store
from ..experts.families import FAMILIES
from ..experts.layout import is_experts
from ..experts.stored import is_stacked, stored_weight
from ..ops.quantize import BLOCKSIZES, FORMATS, code_of, quantize
from ..ops.quantized import Codes4bit, QuantizedWeight

METHOD = "peft_moe_lora"
MXFP4 = "mxfp4"
_STACKS = ("gate_up_proj", "up_proj", "down_proj")


def load_quantized(
    name_or_path: str,
    experts: str = "nf4",
    *,
    blocksize: int = 64,
    double_quant: bool = True,
    quantization_config: BitsAndBytesConfig | None = None,
    model_class=AutoModelForCausalLM,
    **kwargs,
) -> PreTrainedModel:
    """`from_pretrained` with quantized experts, which never holds the dense model.

    Every stack of experts is quantized on its device as soon as its shards are read; beside it, the tensors it was
    stacked from are alive, some three times its dense size. What is not experts loads as usual.

    Args:
        name_or_path: of the model.
        experts: "nf4", "fp4" or "int8" from an unquantized checkpoint; "mxfp4" for one published so (gpt-oss), whose
            packed blocks are kept as they are.
        blocksize, double_quant: as in `quantize_experts`.
        quantization_config: bitsandbytes' for the linear layers, in 4 bits; None leaves them as they are.
        model_class: whose `from_pretrained` loads.
        kwargs: for `from_pretrained`: dtype, device_map and so on.
    Returns: the model, ready for an adapter.
    Raises:
        ValueError: if the format does not exist or is not that of the checkpoint, or the model has no experts, or
            some that the checkpoint does not hold.
    """
    if experts not in (*FORMATS, MXFP4):
        raise ValueError(f"experts must be one of {(*FORMATS, MXFP4)}, got {experts!r}.")
    if blocksize not in BLOCKSIZES:
        raise ValueError(f"blocksize must be one of {BLOCKSIZES}, got {blocksize!r}.")
    if quantization_config is not None and not getattr(quantization_config, "load_in_4bit", False):
        raise ValueError(
            "quantization_config is for linear layers in 4 bits: BitsAndBytesConfig(load_in_4bit=True)."
        )
    config = kwargs.pop("config", None)
    if config is None:
        config = AutoConfig.from_pretrained(
            name_or_path, trust_remote_code=kwargs.get("trust_remote_code")
        )
    stored = getattr(config, "quantization_config", None) or {}
    method = (
        stored.get("quant_method")
        if isinstance(stored, dict)
        else getattr(stored, "quant_method", None)
    )
    ours = ExpertsQuantizationConfig(experts, blocksize, double_quant, quantization_config)
    if (method == MXFP4) != (experts == MXFP4) or method not in (None, MXFP4):
        remedy = {
            None: 'the checkpoint is not quantized; experts must be "nf4", "fp4" or "int8".',
            MXFP4: 'pass experts="mxfp4", which keeps it as it is, or load it with Mxfp4Config(dequantize=True) and '
            "quantize_experts(model).",
        }
        raise ValueError(
            f"{name_or_path} is stored in {getattr(method, 'value', method) or 'full precision'}, not in what "
            f"experts={experts!r} is made from: "
            + remedy.get(
                method,
                "load it with from_pretrained; the README says which formats adapters ride on.",
            )
        )
    if experts == MXFP4:
        # transformers has a kernel's layout of its own for it; this takes its place
        config.quantization_config = ours.to_dict()
        ours = None
    model = model_class.from_pretrained(
        name_or_path, config=config, quantization_config=ours, **kwargs
    )
    stacks = [(module, name) for module in model.modules() if _is_quantizable(module) for name in _STACKS
              if is_stacked(module, name)]  # fmt: skip
    left = [
        name
        for module, name in stacks
        if not isinstance(stored_weight(module, name), QuantizedWeight)
    ]
    if left or not stacks:
        raise ValueError(
            f"{name_or_path} has no routed experts that could be quantized."
            if not stacks
            else f"{name_or_path}: the checkpoint did not give {len(left)} of {len(stacks)} stacks of experts."
        )
    return model


class ExpertsQuantizationConfig(QuantizationConfigMixin):
    """What `load_quantized` tells the loader.

    Args:
        experts, blocksize, double_quant: as in `load_quantized`.
        linear: bitsandbytes' config for linear layers, or None.
    """

    def __init__(
        self, experts: str, blocksize: int = 64, double_quant: bool = True, linear=None, **_
    ):
        self.quant_method = METHOD
        self.experts, self.blocksize, self.double_quant = experts, blocksize, double_quant
        self.linear = BitsAndBytesConfig.from_dict(linear) if isinstance(linear, dict) else linear

    def to_dict(self) -> dict[str, Any]:
        """JSON's types."""
        return {**vars(self), "linear": None if self.linear is None else self.linear.to_dict()}


class ExpertsQuantizer(HfQuantizer):
    """The loader's hand: stacks of experts go through `_Quantize`, linear layers to bitsandbytes where asked for."""

    def __init__(self, quantization_config: ExpertsQuantizationConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)
        self.linear = None
        if quantization_config.linear is not None:
            from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

            self.linear = Bnb4BitHfQuantizer(quantization_config.linear, pre_quantized=False)

    is_trainable = True
    # bytes of one weight, for the memory that is set aside
    quantized_element_size = property(
        lambda self: 1.01 if self.quantization_config.experts == "int8" else 0.57
    )

    def is_serializable(self, *args, **kwargs) -> bool:
        """No: save the adapter, which is what was trained."""
        return False

    def validate_environment(self, *args, **kwargs) -> None:
        if self.linear is not None:
            self.linear.validate_environment(*args, **kwargs)

    def update_device_map(self, device_map):
        return device_map if self.linear is None else self.linear.update_device_map(device_map)

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        packed = self.quantization_config.experts == MXFP4
        return not packed and (
            _is_stack(model, param_name)
            or (self.linear is not None and self.linear.param_needs_quantization(model, param_name))
        )

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """How tensors become parameters that the model's own conversions do not give."""
        if self.quantization_config.experts != MXFP4:
            return []
        return [
            WeightConverter([f"{name}_blocks", f"{name}_scales"], name, operations=[_KeepPacked()])
            for name in _STACKS
        ]

    def _process_model_before_weight_loading(self, model, **kwargs):
        if self.linear is not None:
            self.linear._process_model_before_weight_loading(model, **kwargs)
        return model

    def _process_model_after_weight_loading(self, model, **kwargs):
        return (
            model
            if self.linear is None
            else self.linear._process_model_after_weight_loading(model, **kwargs)
        )


class _Quantize(ConversionOps):
    """Quantize what was just stacked, and put it in the module."""

    def __init__(self, hf_quantizer: ExpertsQuantizer):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict, model=None, missing_keys=None, **kwargs) -> dict:
        settings, others = self.hf_quantizer.quantization_config, {}
        for name in list(input_dict):
            value = input_dict.pop(name)
            if not _is_stack(model, name):
                others[name] = value
                continue
            stack = value[0] if isinstance(value, list) else value
            weight = quantize(
                stack,
                settings.experts,
                blocksize=settings.blocksize,
                double_quant=settings.double_quant,
            )
            _place(model, name, weight, missing_keys)
            del value, stack
        if others:
            linear = self.hf_quantizer.linear.get_quantize_ops()
            others = linear.convert(others, model=model, missing_keys=missing_keys, **kwargs)
        return others


class _KeepPacked(ConversionOps):
    """MXFP4 blocks [E, N, K / 32, 16] and scales [E, N, K / 32], as they were published."""

    def convert(
        self, input_dict, model=None, full_layer_name=None, missing_keys=None, **kwargs
    ) -> dict:
        found = {
            name.rpartition("_")[2]: v[0] if isinstance(v, list) else v
            for name, v in input_dict.items()
        }
        module, name = get_module_from_name(model, full_layer_name)
        blocks, scales = found["blocks"], found["scales"]
        E, N, groups, _ = blocks.shape
        weight = Codes4bit(
            format=MXFP4, stored_shape=(E, N, 32 * groups), dtype=getattr(module, name).dtype,
            packed=blocks.contiguous().view(-1), code=code_of(MXFP4, blocks.device), low_first=True, blocksize=32,
            scales=scales.contiguous().view(-1), transposed=module.is_transposed,
        )  # fmt: skip
        if weight.shape != tuple(getattr(module, name).shape):
            raise ValueError(
                f"{full_layer_name} is {tuple(getattr(module, name).shape)}, its blocks {weight.shape}."
            )
        _place(model, full_layer_name, weight, missing_keys)
        return {}


def _is_stack(model, name: str) -> bool:
    module, last = get_module_from_name(model, name)
    return last in _STACKS and _is_quantizable(module)


def _is_quantizable(module) -> bool:
    """Whether a module holds experts in stacks, not in a family's own form."""
    return is_experts(module) and type(module).__name__ not in FAMILIES


def _place(model, name: str, weight: QuantizedWeight, missing_keys) -> None:
    module, last = get_module_from_name(model, name)
    store(module, last, weight)
    for tensor in (
        *module.parametrizations[last].parameters(),
        *module.parametrizations[last].buffers(),
    ):
        # else the loader draws it anew
        tensor._is_hf_initialized = True
    module._is_hf_initialized = True
    if missing_keys is not None:
        missing_keys.discard(name)
