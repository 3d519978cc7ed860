"""What PEFT offers for LoRA, cannot do for experts, and would do wrong or refuse without a remedy.

LoRA-FA and Riemannian preconditioning multiply gradients by inverses of A A^T and B^T B. These
products mix the experts, whose A and B are stacked in one parameter. Hotswapping copies a smaller
adapter into the first rows of A and the first columns of B, which belong to the first experts.
Subtracting an initial adapter appends its ranks to those of all experts.
"""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn
from weakref import WeakSet

from peft.utils.hotswap import hotswap_adapter_from_state_dict
from torch import nn
from torch.optim import Optimizer

# the modules of PEFT whose optimizers take A and B for the factors of one matrix
_OF_ONE_MATRIX = frozenset({"peft.optimizers.lorafa", "peft.optimizers.riemannian"})

# every adapted experts module that is alive in this process
_layers: WeakSet[nn.Module] = WeakSet()


def watch(layer: nn.Module) -> None:
    """Refuse the optimizers of `refuse_optimizer_of_one_matrix` for a layer's A and B.

    Args:
        layer: a `MoELoraLayer`.
    """
    _layers.add(layer)


def refuse_optimizer_of_one_matrix(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """A hook that runs before each step of every optimizer; `args` and `kwargs` are the step's.

    Raises:
        ValueError: if the optimizer is LoRA-FA or Riemannian, and holds A and B of experts.
    """
    if not any(kind.__module__ in _OF_ONE_MATRIX for kind in type(optimizer).__mro__):
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(A) in held and id(B) in held for A, B in _pairs()):
        return
    raise ValueError(
        f"{type(optimizer).__name__} needs A and B of one matrix in each parameter, but it was "
        "given lora_A and lora_B of experts, which stack the matrices of all experts of a layer; "
        "no step was made. Use an optimizer such as torch.optim.AdamW, or PEFT's "
        "create_loraplus_optimizer; if lora_A was frozen for this optimizer, "
        "model.set_adapter(name) makes it trainable again."
    )


def _pairs() -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """A and B of every adapter and projection of the watched layers."""
    for layer in _layers:
        sides: Any = layer
        yield from zip(sides.lora_A.parameters(), sides.lora_B.parameters(), strict=True)


class NoHotswap(list[str]):
    """The row of this tuner in PEFT's table of what hotswapping compares; reading it is refused.

    PEFT reads the row before it changes the model.
    """

    def __iter__(self) -> NoReturn:
        refuse_hotswap()


def refuse_hotswap_of_state_dict() -> None:
    """Refuse `hotswap_adapter_from_state_dict`, which asks for the state dict before it changes it.

    Raises:
        ValueError: if PEFT's function is among the callers.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is hotswap_adapter_from_state_dict.__code__:
            refuse_hotswap()
        frame = frame.f_back


def refuse_hotswap() -> NoReturn:
    """Raise the error of every way to hotswap."""
    raise ValueError(
        "hotswapping needs one matrix A and one matrix B a layer, but experts stack theirs, "
        "so an adapter of another rank would reach the wrong experts; nothing was changed. "
        "Call model.delete_adapter(name), model.load_adapter(path, adapter_name=name) and "
        "model.set_adapter(name) instead: the new adapter may have any rank and scaling."
    )


def refuse_subtraction() -> NoReturn:
    """Refuse PEFT's `subtract_mutated_init`, which stacks two adapters along their ranks."""
    raise ValueError(
        "subtract_mutated_init needs one matrix A and one matrix B a layer, but experts stack "
        "theirs; call save_pretrained(folder, path_initial_model_for_weight_conversion=initial) "
        "instead, which subtracts expert by expert."
    )
