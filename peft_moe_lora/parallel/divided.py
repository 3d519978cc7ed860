"""Models that transformers has divided among processes: by experts, or by features.

The only place that decides which of the two it is.
"""

from collections.abc import Mapping

from torch import nn

from ..config import MATERIALIZE, MoELoraConfig
from ..experts.layout import ExpertsLayout
from ..experts.routers import is_router
from ..experts.stored import UnsupportedExperts
from ..files.peft_words import names_all_linear
from ..files.text import quoted
from ..ops.quantized import QuantizedWeight
from . import expert_parallel, linears, tensor_parallel
from .share import Share


def is_divided(model: nn.Module) -> bool:
    """Whether adapters of a model are divided as transformers has divided it."""
    return _engine(model) is not None


def share_of(model: nn.Module, module: nn.Module) -> Share | None:
    """What this process holds of an experts module or a router; None if the model is not divided.

    Args:
        model: the model.
        module: the experts module, or a router, that gets an adapter.
    """
    return expert_parallel.share_of(model, module) or tensor_parallel.share_of(model, module)


def factors_of(model: nn.Module, module: nn.Module) -> dict[str, linears.Factor]:
    """What this process uses of lora_A and lora_B, by these names; empty in a model that is whole.

    Args:
        model: the model.
        module: a linear layer or a router.
    """
    share = share_of(model, module)
    if share is None:
        return {}
    return linears.factors_of(model, module, share)


def check_experts(model: nn.Module, path: str, module: nn.Module, layout: ExpertsLayout) -> None:
    """Check that an experts module of a divided model can get an adapter.

    Args:
        model: the model.
        path: path of the experts module.
        module: the module.
        layout: its layout.
    Raises:
        UnsupportedExperts: if it cannot.
    """
    weights = [weight for name in layout.projections for weight in layout.parts(module, name)]
    if any(isinstance(weight, QuantizedWeight) for weight in weights):
        raise UnsupportedExperts(
            f"{path}: quantized experts get no adapter under {_engine(model)}, because they are "
            "stored whole. Load the model without distributed_config, and train one whole model in "
            "each process (DDP)."
        )
    if expert_parallel.is_divided_by_experts(model):
        expert_parallel.check_experts(model, path, module, layout)
    if tensor_parallel.is_divided_by_features(model):
        tensor_parallel.check_experts(model, path, module, layout)


def check_settings(
    model: nn.Module, config: MoELoraConfig, others: Mapping[str, nn.Module]
) -> None:
    """Check that a divided model supports an adapter.

    Args:
        model: the model.
        config: the adapter's configuration.
        others: path -> base module, of the targets that hold no experts.
    Raises:
        ValueError: if it does not. The message names the setting.
    """
    for name, value in {
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "bias": config.bias != "none",
        "backend": config.backend == MATERIALIZE,
        "target_modules": names_all_linear(config.target_modules),
    }.items():
        if value:
            raise ValueError(
                f"{name}={quoted(getattr(config, name))}: under {_engine(model)} an adapter has "
                "A and B of experts, routers and linear layers that are named, "
                f"and runs on the fused path; leave {name} unset or name the targets, or use FSDP2 "
                "without distributed_config."
            )
    for path, module in others.items():
        if is_router(module, _parent(model, path)):
            continue
        fault = linears.fault_of(model, path, module)
        if fault is not None:
            raise ValueError(
                f"target_modules: {path} cannot get a LoRA under {_engine(model)}: {fault}. Take "
                "it out of target_modules, or use FSDP2 without distributed_config."
            )


def _engine(model: nn.Module) -> str | None:
    """What divides the experts of a model, in words; None if nothing does."""
    if expert_parallel.is_divided_by_experts(model):
        return "expert parallelism"
    if tensor_parallel.is_divided_by_features(model):
        return "tensor parallelism"
    return None


def _parent(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])
