"""Parameters that DeepSpeed's ZeRO divides among processes.

Outside of a forward and backward, a parameter under ZeRO-3 is an empty tensor in each process, with
the shape of the whole beside it. DeepSpeed gathers it when the module that holds it is called, or
when it is read in a forward. Everything else that reads or writes its values gathers it here.

Under ZeRO-2 and ZeRO-3 the optimizer trains copies, and writes them into the parameters.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# the module whose function replaces F.linear under ZeRO-3, and PyTorch's own function
_LINEAR_OF_DEEPSPEED = "deepspeed.runtime.zero.linear"
_LINEAR = torch._C._nn.linear
# where DeepSpeed counts the contexts of `GatheredParameters` around a parameter
_CONTEXTS = "_ds_z3_gathered_param_context_depth"


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO-3 manages a parameter."""
    return hasattr(parameter, "ds_id")


def partitions(module: nn.Module) -> bool:
    """Whether ZeRO-3 manages parameters of a module."""
    return any(is_partitioned(parameter) for parameter in module.parameters())


def check_may_be_adapted(model: nn.Module) -> None:
    """Check that no optimizer of DeepSpeed trains a model already.

    Raises:
        ValueError: if one does. It would not train a new adapter, nor make its values equal.
    """
    for path, parameter in model.named_parameters():
        if _is_prepared(parameter):
            raise ValueError(
                f"DeepSpeed has an optimizer for this model already ({path}): it would not train a "
                "new adapter, which would start differently in each process. Add or load the "
                "adapter first, and then call deepspeed.initialize or accelerator.prepare."
            )


# ---- values --------------------------------------------------------------------------------------


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], written: bool = False) -> Iterator[None]:
    """Within this context, parameters hold their whole values; every process must enter it.

    Parameters that are whole because of such a context around this one are left to it.

    Args:
        parameters: any parameters.
        written: keep what is written into them. Every process must write the same.
    """
    divided = [p for p in parameters if is_partitioned(p) and not getattr(p, _CONTEXTS, 0)]
    if not divided:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(divided, modifier_rank=0 if written else None):
        yield


def whole(parameter: nn.Parameter) -> torch.Tensor:
    """A copy of the whole values, on the CPU; every process must call this."""
    with gathered([parameter]):
        return parameter.detach().to("cpu", copy=True)


def write(parameter: nn.Parameter, values: torch.Tensor) -> None:
    """Replace the values of a parameter that ZeRO-3 manages; every process must call this."""
    with gathered([parameter], written=True), torch.no_grad():
        parameter.copy_(values)
    if _is_prepared(parameter):
        from deepspeed.utils import safe_set_local_fp32_param

        part: Any = parameter
        safe_set_local_fp32_param(parameter, part.ds_tensor)


def write_copy(parameter: Any, values: torch.Tensor) -> None:
    """Replace the values of the copy that the optimizer of ZeRO-2 trains, if it trains one."""
    if _is_prepared(parameter):
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, values.to(parameter.device, torch.float32))


def _is_prepared(parameter: Any) -> bool:
    """Whether the parameter's model has an optimizer of DeepSpeed."""
    # set by the optimizers of ZeRO-3, and of ZeRO-1 and ZeRO-2
    return hasattr(parameter, "_z3_optimizer") or hasattr(parameter, "_hp_mapping")


# ---- forward and backward ------------------------------------------------------------------------


@contextmanager
def linear_of_torch() -> Iterator[None]:
    """Within this context F.linear is PyTorch's own, where ZeRO-3 has replaced it.

    The replacement frees the weight between forward and backward. It multiplies within an autograd
    function, where nothing can be added to the product that gets a gradient.
    """
    replaced = F.linear
    if replaced is _LINEAR:
        # returns before it reads sys.modules: a graph of torch.compile would depend on their number
        yield
        return
    deepspeed = sys.modules.get(_LINEAR_OF_DEEPSPEED)
    if deepspeed is None or replaced is not deepspeed.zero3_linear_wrap:
        yield
        return
    F.linear = _LINEAR
    try:
        yield
    finally:
        F.linear = replaced


def check_gradients_arrive(parameters: Iterable[nn.Parameter], x: torch.Tensor) -> None:
    """Check that ZeRO-3 will see the gradients of parameters that a module uses.

    DeepSpeed gathers some modules with all that is in them (its leaf modules; blocks of experts are
    among them), and reduces their gradients when it knows the gradient of their inputs. Where no
    input needs one, this is before the gradients of the parameters are computed.

    Args:
        parameters: the trained parameters.
        x: the module's input.
    Raises:
        ValueError: if their gradients would be lost.
    """
    if x.requires_grad or not torch.is_grad_enabled():
        return
    for parameter in parameters:
        leaf = getattr(parameter, "ds_z3_leaf_module", None)
        if leaf is not None and parameter.requires_grad:
            raise ValueError(
                f"DeepSpeed's ZeRO-3 treats {type(leaf).__name__} as a leaf module, and its input "
                "needs no gradient here, so the gradients of the adapter in it would be lost. Call "
                "model.enable_input_require_grads() before training, or set "
                'zero_optimization.leaf_module to {"classes": []}.'
            )
