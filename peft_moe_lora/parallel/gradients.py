"""Parameters of which a process uses a part, and whose gradient is summed over processes."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from .sharding import is_sharded


class Sum(NamedTuple):
    """How a gradient becomes the same in several processes.

    Attributes:
        groups: the process groups over which it is summed, one after the other.
        batches: by what the sum is divided.
    """

    groups: tuple[Any, ...]
    batches: int


def local(parameter: torch.Tensor, how: Sum) -> torch.Tensor:
    """This process's part of a parameter, whose gradient is summed as `how` says."""
    assert is_sharded(parameter), "in a divided model every A and B has a mesh"
    sharded: Any = parameter
    return summed(sharded.to_local(), how)


def summed(tensor: torch.Tensor, how: Sum) -> torch.Tensor:
    """The tensor itself, whose gradient is summed as `how` says."""
    if not how.groups and how.batches == 1:
        return tensor
    return _Summed.apply(tensor, how)


class _Summed(torch.autograd.Function):
    """The identity, whose gradient is summed over process groups.

    It is part of the graph, and no hook of the parameter, because loading may replace parameters.
    """

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, how: Sum) -> torch.Tensor:
        ctx.how = how
        return part.view_as(part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        # fp32, because bf16 would round after every sum
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        for group in ctx.how.groups:
            dist.all_reduce(total, group=group)
        return (total / ctx.how.batches).to(gradient.dtype), None
