"""What one process holds of the experts that transformers has divided among processes.

`DistributedConfig` of transformers gives every process a place in two meshes of the same processes:
(dp_replicate, fsdp, tp) for what is dense, and (dp_replicate, efsdp, ep) for experts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from .gradients import Sum
from .sharding import selected


class Features(NamedTuple):
    """The part of a projection that a process computes, of every expert alike.

    Attributes:
        rows: int64 indices of its rows among the N rows; None for all.
        columns: int64 indices of its columns among the K columns; None for all.
    """

    rows: torch.Tensor | None
    columns: torch.Tensor | None

    def of(self, A: torch.Tensor, B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The columns of A [., K] and the rows of B [N, .] that belong to the part."""
        return selected(A, 1, self.columns), selected(B, 0, self.rows)


@dataclass(frozen=True)
class Share:
    """The part of a layer's experts that this process holds.

    Attributes:
        mesh: one-dimensional mesh of the processes that together hold all experts.
        ids: the experts of this process.
        of_expert: gradients of parameters that are divided by experts.
        of_some: gradients of parameters that every process holds, but only the process that holds
            an expert computes.
        of_all: gradients of parameters that every process holds and computes.
        everyone: the groups of all processes, for what must be equal at the start.
        by_expert: whether a process holds some experts whole, and A and B of them alone; else it
            holds a part of every expert, and A and B whole.
        features: projection -> the part of it, where a process holds a part of every expert.
        same_rows: the groups of the processes that compute the same rows of an experts layer.
    """

    mesh: Any
    ids: range
    of_expert: Sum
    of_some: Sum
    of_all: Sum
    everyone: tuple[Any, ...]
    by_expert: bool = True
    features: Mapping[str, Features] = field(default_factory=dict)
    same_rows: tuple[Any, ...] = ()

    def seeds(self, drawn: torch.Tensor) -> torch.Tensor:
        """Seeds of the masks of dropout, from those that this process has drawn.

        Processes with the same rows get the same seeds, and the masks are those of one process.
        Where a process has other rows than the others, or other columns, the masks are its own.

        Args:
            drawn: [2, 2] int64, the seeds for gate_up and for down.
        """
        if not self.same_rows:
            return own_seeds(drawn, dist.get_rank())
        for group in self.same_rows:
            dist.broadcast(drawn, group_src=0, group=group)
        if "down" in self.features:
            drawn[1] = own_seeds(drawn[1], self.mesh.get_local_rank())
        return drawn

    def parameter(
        self, values: torch.Tensor, dim: int, chosen: Sequence[int] | None
    ) -> nn.Parameter:
        """A or B of a projection, expert-major along `dim`.

        Args:
            values: the whole values.
            dim: the dimension along which a process holds the part of its own experts.
            chosen: ids of the experts that have ranks; None for all. A parameter of some experts is
                held whole by every process.
        """
        from torch.distributed.tensor import Shard

        if chosen is None and self.by_expert:
            return self._placed(values, Shard(dim))
        return self.whole(values)

    def held(self, chosen: Sequence[int] | None) -> tuple[Sequence[int], Sum]:
        """Ids of the experts in this process's part of a parameter, and how gradients are summed.

        Args:
            chosen: as for `parameter`.
        """
        if chosen is None:
            return self.ids, self.of_expert
        return chosen, self.of_some

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


def own_seeds(seeds: torch.Tensor, rank: int) -> torch.Tensor:
    """Other seeds for each rank; they differ in many bits, because a mask hashes seed XOR slot."""
    return (seeds + rank * 0x9E3779B1) % (2**31 - 1)


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


def distributed_config(model: nn.Module) -> Any:
    """The DistributedConfig with which transformers has divided a model, else None."""
    if getattr(model, "_mesh_manager", None) is None:
        return None
    return getattr(getattr(model, "config", None), "distributed_config", None)


def size_of(config: Any, axis: str) -> int:
    """A size of a DistributedConfig; 1 if it is None, or if there is no configuration."""
    return getattr(config, axis, None) or 1


def groups_along(model: nn.Module, *axes: str) -> tuple[Any, ...]:
    """The process groups along axes of more than one process."""
    manager: Any = model._mesh_manager
    meshes = [manager.get_mesh(axis) for axis in axes]
    return tuple(mesh.get_group() for mesh in meshes if mesh.size() > 1)
