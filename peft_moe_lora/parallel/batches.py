"""Which processes see batches of their own, so that a sum over processes counts a token once."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .sharding import is_divided
from .share import distributed_config, groups_along


def every_process_runs(model: nn.Module) -> bool:
    """Whether a forward of a model needs all processes, so that all of them may count together."""
    if not dist.is_available() or not dist.is_initialized():
        return False
    return is_divided(model) or isinstance(model, nn.parallel.DistributedDataParallel)


def sum_over_batches(model: nn.Module) -> Callable[[torch.Tensor], None]:
    """A function that adds to counts, in place, those of the processes that see other batches.

    Processes that transformers has given the same batch (`tp_size`) count it once. Every process
    must call the function.

    Args:
        model: the model whose batches are counted.
    """
    groups = _groups(model)

    def add(counts: torch.Tensor) -> None:
        for group in groups:
            dist.all_reduce(counts, group=group)

    return add


def _groups(model: nn.Module) -> tuple[Any, ...]:
    """The process groups over which batches differ; None for the group of all processes."""
    if not dist.is_available() or not dist.is_initialized():
        return ()
    for module in model.modules():
        if distributed_config(module) is not None:
            return groups_along(module, "dp_replicate", "fsdp")
    return (None,)
