"""A and B of linear layers and routers in a model that transformers has divided.

    y = W x + scaling * B A x

Every process holds A and B whole. Where it holds some rows of W ("colwise"), it uses the same rows
of B, and the gradient of A x is summed over the processes. Where it holds some columns of W and of
x ("rowwise"), it uses the same columns of A, and A x is summed.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .gradients import Sum, local, summed
from .sharding import indices_along, selected
from .share import Share, distributed_config, groups_along, own_seeds, size_of


@dataclass(frozen=True)
class Factor:
    """What a process uses of A or B.

    Attributes:
        share: what the process holds of the model.
        how: how the gradient is summed.
        dim: the dimension along which it uses a part.
        indices: the part; None for all.
        inputs: the groups over which the gradient of the input is summed.
        outputs: the groups over which the output is summed.
        same_rows: the groups of the processes that have the same rows of the input.
    """

    share: Share
    how: Sum
    dim: int = 0
    indices: torch.Tensor | None = None
    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()
    same_rows: tuple[Any, ...] = ()

    def seed(self, drawn: torch.Tensor) -> torch.Tensor:
        """The seed of the input's mask, from the one that this process has drawn.

        It is the same in all processes that have the same input. Processes with other columns of
        the input have masks of their own.
        """
        for group in self.same_rows:
            dist.broadcast(drawn, group_src=0, group=group)
        if self.indices is not None:
            return own_seeds(drawn, dist.get_rank())
        return drawn

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The part of a parameter that the process uses."""
        return selected(local(parameter, self.how), self.dim, self.indices)

    def entered(self, x: torch.Tensor) -> torch.Tensor:
        """The input."""
        return summed(x, Sum(self.inputs, 1))

    def left(self, y: torch.Tensor) -> torch.Tensor:
        """The output."""
        if not self.outputs:
            return y
        return _SummedOutput.apply(y, self.outputs)


class _SummedOutput(torch.autograd.Function):
    """A sum over process groups, which every process uses alike: its gradient is passed on."""

    @staticmethod
    def forward(ctx: Any, summand: torch.Tensor, groups: tuple[Any, ...]) -> torch.Tensor:
        total = summand.clone()
        for group in groups:
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]  # torch: any number
        return gradient, None


def factors_of(model: nn.Module, module: nn.Module, share: Share) -> dict[str, Factor]:
    """What a process uses of lora_A and lora_B, by these names.

    Args:
        model: the model.
        module: a linear layer or a router.
        share: what the process holds of the model.
    """
    rows, columns = _part(module)
    together = groups_along(model, "tp")
    of_part = Sum((*together, *share.of_all.groups), share.of_all.batches)
    A = Factor(share, share.of_all, same_rows=together)
    B = Factor(share, share.of_all)
    if columns is not None:
        A = Factor(share, of_part, 1, columns, outputs=together, same_rows=together)
    if rows is not None:
        B = Factor(share, of_part, 0, rows, inputs=together)
    return {"lora_A": A, "lora_B": B}


def fault_of(model: nn.Module, path: str, module: nn.Module) -> str | None:
    """Why a linear layer of a divided model cannot get a LoRA; None if it can.

    Args:
        model: the model.
        path: path of the layer.
        module: the layer.
    """
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__} is not a torch.nn.Linear"
    rows, columns = _part(module)
    style = _style(model, path)
    expected = {(False, False): None, (True, False): "colwise", (False, True): "rowwise"}
    if style == expected.get((rows is not None, columns is not None), "none"):
        return None
    return f"the plan of transformers divides it as {style!r}"


def _part(module: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The rows and the columns of a weight with which this process computes; None for all."""
    weight: Any = module.weight
    return indices_along(weight, 0, "tp"), indices_along(weight, 1, "tp")


def _style(model: nn.Module, path: str) -> str | None:
    """How the plan of transformers divides a module by features; None if it does not."""
    if size_of(distributed_config(model), "tp_size") == 1:
        return None
    from transformers.integrations.tensor_parallel import replace_layer_number_by_wildcard

    plan: Any = model.tp_plan
    return plan.get(replace_layer_number_by_wildcard(path))
