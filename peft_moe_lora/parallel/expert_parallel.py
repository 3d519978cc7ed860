"""Adapters of experts that transformers divides among processes (`DistributedConfig(ep_size=...)`).

Each of the ep_size processes of a group holds count = E / ep_size experts, and A and B of these
experts: A as `Shard(0)`, B as `Shard(1)` of the group's mesh, which expert-major order makes whole
experts. What belongs to all experts alike, as a router's A and B, every process holds whole.

The gradient of a parameter is summed over the processes that hold it and saw other rows, and
divided by the number of batches of a step, as the mean over batches demands.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..config import MATERIALIZE, MoELoraConfig
from ..experts.layout import is_experts
from ..experts.routers import is_router
from ..files.text import quoted
from .sharding import is_sharded


class Sum(NamedTuple):
    """How a gradient becomes the same in several processes.

    Attributes:
        groups: the process groups over which it is summed, one after the other.
        batches: by what the sum is divided.
    """

    groups: tuple[Any, ...]
    batches: int


@dataclass(frozen=True)
class Share:
    """The experts of every layer that this process holds.

    Attributes:
        mesh: one-dimensional mesh of the processes that together hold all experts.
        ids: the experts of this process.
        of_expert: gradients of parameters that are divided by experts.
        of_some: gradients of parameters that every process holds, but only the process that holds
            an expert computes.
        of_all: gradients of parameters that every process holds and computes.
        everyone: the groups of all processes, for what must be equal at the start.
    """

    mesh: Any
    ids: range
    of_expert: Sum
    of_some: Sum
    of_all: Sum
    everyone: tuple[Any, ...]

    def divided(self, values: torch.Tensor, dim: int) -> nn.Parameter:
        """A parameter of which each process holds the experts' part, sharded over `dim`."""
        from torch.distributed.tensor import Shard

        return self._placed(values, Shard(dim))

    def whole(self, values: torch.Tensor) -> nn.Parameter:
        """A parameter that every process holds."""
        from torch.distributed.tensor import Replicate

        return self._placed(values, Replicate())

    def _placed(self, values: torch.Tensor, placement: Any) -> nn.Parameter:
        from torch.distributed.tensor import distribute_tensor

        placed = distribute_tensor(values, self.mesh, [placement], src_data_rank=None)
        return nn.Parameter(placed)

    def agree(self, values: torch.Tensor) -> None:
        """Overwrite a tensor by the values of the first process; every process must call this."""
        if values.is_meta:
            return
        for group in self.everyone:
            dist.broadcast(values, group_src=0, group=group)


def share_of(model: nn.Module, module: nn.Module) -> Share | None:
    """How the experts of a model are divided; None if every process holds all of them.

    Args:
        model: the model.
        module: the experts module, or a router, that gets an adapter.
    """
    config = _parallelism(model)
    if config is None:
        return None
    manager: Any = model._mesh_manager
    mesh = manager.get_mesh("ep")
    together = _groups(manager, "ep")
    copies = _groups(manager, "dp_replicate", "efsdp")
    count = 0
    if is_experts(module):
        # transformers has set the number of this process's experts
        count = module.num_experts  # type: ignore[assignment]  # nn.Module: a tensor or a module
    first = mesh.get_local_rank() * count
    return Share(
        mesh=mesh,
        ids=range(first, first + count),
        of_expert=Sum(copies, config.dp_size),
        of_some=Sum((*together, *copies), config.dp_size),
        of_all=Sum(_groups(manager, "dp_replicate", "fsdp"), config.dp_size),
        everyone=(*together, *copies),
    )


@contextmanager
def drawn_whole(parameter: nn.Parameter, share: Share | None) -> Iterator[torch.Tensor]:
    """Within this context, the whole values of a parameter are drawn; it takes its part of them.

    So the values do not depend on the number of processes, and are those of the first process.
    """
    if share is None:
        yield parameter
        return
    values = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    yield values
    share.agree(values)
    sharded: Any = parameter
    if not values.is_meta:
        from torch.distributed.tensor import distribute_tensor

        placed = distribute_tensor(values, share.mesh, sharded.placements, src_data_rank=None)
        sharded.detach().to_local().copy_(placed.to_local())


def is_divided_by_experts(model: nn.Module) -> bool:
    """Whether transformers has divided the experts of a model among processes."""
    return _parallelism(model) is not None


def _parallelism(model: nn.Module) -> Any:
    """The DistributedConfig of a model under expert parallelism, else None."""
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    if getattr(config, "ep_size", 1) in (None, 1) or getattr(model, "_mesh_manager", None) is None:
        return None
    return config


def _groups(manager: Any, *axes: str) -> tuple[Any, ...]:
    """The process groups along axes of more than one process."""
    meshes = [manager.get_mesh(axis) for axis in axes]
    return tuple(mesh.get_group() for mesh in meshes if mesh.size() > 1)


def check_may_be_adapted(
    model: nn.Module, config: MoELoraConfig, others: Mapping[str, nn.Module]
) -> None:
    """Check that expert parallelism supports an adapter.

    Args:
        model: the model.
        config: the adapter's configuration.
        others: path -> base module, of the targets that hold no experts.
    Raises:
        ValueError: if it does not. The message names the setting.
    """
    beside = [
        path for path, module in others.items() if not is_router(module, _parent(model, path))
    ]
    if config.target_modules == "all-linear":
        beside = ["all-linear"]
    for name, value in {
        "lora_dropout": config.lora_dropout,
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
        "bias": config.bias != "none",
        "backend": config.backend == MATERIALIZE,
        "target_modules": beside,
    }.items():
        if value:
            raise ValueError(
                f"{name}={quoted(getattr(config, name))}: under expert parallelism an adapter has "
                "A and B of experts and routers alone, without dropout, and runs on the fused "
                f"path; leave {name} unset or adapt experts and routers, or use FSDP2 without "
                "ep_size."
            )


def _parent(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


# ---- gradients -----------------------------------------------------------------------------------


def local(parameter: torch.Tensor, how: Sum) -> torch.Tensor:
    """This process's part of a parameter, whose gradient is summed as `how` says."""
    assert is_sharded(parameter), "under expert parallelism every A and B has a mesh"
    sharded: Any = parameter
    part = sharded.to_local()
    if not how.groups and how.batches == 1:
        return part
    return _Summed.apply(part, how)


class _Summed(torch.autograd.Function):
    """The identity, whose gradient is summed over process groups.

    It is part of the graph, and no hook of the parameter, because loading may replace parameters.
    """

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, how: Sum) -> torch.Tensor:
        ctx.how = how
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]  # torch: any number
        # fp32, because bf16 would round after every sum
        total = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        for group in ctx.how.groups:
            dist.all_reduce(total, group=group)
        return (total / ctx.how.batches).to(gradient.dtype), None
