"""An experts module without an adapter: its own frozen weights, computed by this package's kernels.

`model.set_experts_implementation("moe_lora")` asks for it on any model on transformers' experts
interface. An adapted module asks for it while its adapters are disabled or merged. The kernels
compute no gradient of the weights: a module that trains its own weights runs an implementation of
transformers, and so does one to whose weights PEFT's own code adds updates.
"""

import logging
from functools import cache

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from ..experts.decoding import decoders
from ..experts.layout import ExpertsLayout
from ..experts.stored import UnsupportedExperts
from ..functional import Projection
from ..ops import QuantizedWeight
from . import own
from .implementations import IMPLEMENTATION
from .known import layout_of
from .offload import fetched

logger = logging.getLogger(__name__)

# what transformers chooses where nobody names an implementation
_DEFAULT = "grouped_mm"

# why an implementation of transformers runs; the names are ours, the class and the other's
_TRAINED = (
    'experts_implementation="%s" computes no gradient of the experts\' own weights, and %s trains '
    'them: "%s" runs instead. Freeze them with requires_grad_(False) to use the kernels.'
)
_UPDATED_BY_PEFT = (
    'experts_implementation="%s" reads the weights alone, and PEFT adds updates of '
    'target_parameters to those of %s in each call: "%s" runs instead. Call '
    "peft_moe_lora.apply_to_peft() to compute both with the kernels."
)


def compute_frozen(
    module: nn.Module,
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    layout: ExpertsLayout | None = None,
    named: str | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Compute an experts module on transformers' interface without an adapter.

    Args:
        module: the experts module, whose parameters are plain local tensors during this call.
        rows: hidden_states [T, H] float, top_k_index [T, top_k] integer, where ids outside 0..E-1
            are skipped, and top_k_weights [T, top_k] float.
        layout: layout of the module; read from it if None.
        named: the implementation that the model's config names; it runs if the module's own weights
            are trained. transformers' default runs instead of None and of "moe_lora".
        backend: one of BACKENDS.
    Returns: [T, H], dtype of hidden_states.
    Raises:
        UnsupportedExperts: if the weights are stored in an unknown way, or are not here.
    """
    if any(is_update_of_peft(part) for part in decoders(module)):
        _log_once(_UPDATED_BY_PEFT, type(module).__name__, _DEFAULT)
        return own.implementation(_DEFAULT, module)(module, *rows)
    if layout is None:
        layout = layout_of(module)
    with fetched(decoders(module)):
        up = _projection(module, layout, "gate_up", rows[0])
        down = _projection(module, layout, "down", rows[0])
        if _is_trained(module, up, down):
            if named in (None, IMPLEMENTATION):
                named = _DEFAULT
            _log_once(_TRAINED, type(module).__name__, named)
            return own.implementation(named, module)(module, *rows)
        return own.compute(module, layout, rows, up, down, backend=backend)


def is_update_of_peft(parametrization: nn.Module) -> bool:
    """Whether a parametrization is one by which PEFT's own code adds updates to a weight."""
    return type(parametrization).__module__ == ParamWrapper.__module__


def _projection(module: nn.Module, layout: ExpertsLayout, name: str, x: torch.Tensor) -> Projection:
    """A projection of the module, if its weight is whole and on the device of x."""
    weight = layout.weight(module, name)
    where = f"{type(module).__name__}.{layout.projection(name).weight}"
    if isinstance(weight, QuantizedWeight):
        weight.check_device(x.device)
    elif type(weight) not in (torch.Tensor, nn.Parameter) or weight.device != x.device:
        raise UnsupportedExperts(
            f'experts_implementation="{IMPLEMENTATION}" needs {where} as a plain tensor on the '
            f"device of its input, {x.device}, but it is a {type(weight).__name__} on "
            f"{weight.device}. Call the model, not its experts alone, or choose another "
            "implementation with model.set_experts_implementation(...)."
        )
    return Projection(weight, layout.bias(module, name))


def _is_trained(module: nn.Module, up: Projection, down: Projection) -> bool:
    """Whether the module trains weights of its own.

    A module in training counts under no_grad too, where gradient checkpointing computes it first.
    """
    if not (torch.is_grad_enabled() or module.training):
        return False
    tensors = (up.weight, up.bias, down.weight, down.bias)
    return any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


# torch.compile calls it while it traces
@torch.compiler.assume_constant_result
def _log_once(why: str, cls: str, named: str) -> bool:
    """Say, once for each class in a process, that an implementation of transformers runs."""
    _warn(why, cls, named)
    return True


@cache
def _warn(why: str, cls: str, named: str) -> None:
    logger.warning(why, IMPLEMENTATION, cls, named)
