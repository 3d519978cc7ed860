"""Parameters that are divided among processes, and what an adapter may do with them.

FSDP2 (`fully_shard`) and the parallelism of transformers hold a parameter as a DTensor: each
process stores a part of it, its shard.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..experts.layout import is_experts
from ..experts.stored import Weight

# what checkpoint wrappers of PyTorch add to the path of a module, but not to keys of a state dict
CHECKPOINT_WRAPPER = "_checkpoint_wrapped_module."
# what other wrappers of PyTorch add to the path of a module
_WRAPPERS = (CHECKPOINT_WRAPPER, "_fsdp_wrapped_module.", "_orig_mod.")

_SHARD_AFTERWARDS = (
    "load the model without distributed_config, add or load the adapter, and then shard the model "
    "with torch.distributed.fsdp.fully_shard."
)


class Shard(NamedTuple):
    """The part of a tensor that this process stores.

    Attributes:
        local: the part, a plain tensor; it shares memory with the tensor.
        indices: for each dimension, the int64 indices of the part in the whole tensor; None for
            all.
    """

    local: Weight
    indices: tuple[torch.Tensor | None, ...]


def path_without_wrappers(path: str) -> str:
    """The path of a module, without what FSDP1, checkpoint wrappers and torch.compile add to it."""
    for wrapper in _WRAPPERS:
        path = path.replace(wrapper, "")
    return path


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "device_mesh")


def is_divided(model: nn.Module) -> bool:
    """Whether a parameter of a model is a DTensor."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor. Every process must call this if the tensor is sharded."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    return sharded.full_tensor()


def placed(tensor: torch.Tensor, as_is: torch.Tensor) -> torch.Tensor:
    """A tensor, whole or sharded, with the placements of another one; every process must call."""
    other: Any = as_is
    if not is_sharded(as_is):
        return whole(tensor)
    sharded: Any = tensor
    if is_sharded(tensor) and sharded.device_mesh == other.device_mesh:
        return sharded.redistribute(placements=other.placements)
    from torch.distributed.tensor import distribute_tensor

    mesh = other.device_mesh
    return distribute_tensor(whole(tensor), mesh, other.placements, src_data_rank=None)


def shard_of(tensor: Weight) -> Shard:
    """The part of a tensor that this process stores; all of it if the tensor is not sharded.

    Raises:
        ValueError: if a process stores a summand of the tensor, not a part of it.
    """
    if not is_sharded(tensor):
        return Shard(tensor, (None,) * len(tensor.shape))
    sharded: Any = tensor
    indices = tuple(indices_along(tensor, dim) for dim in range(tensor.ndim))
    return Shard(sharded.to_local(), indices)


def indices_along(tensor: Weight, dim: int, axis: str | None = None) -> torch.Tensor | None:
    """The int64 indices along a dimension that this process stores of a tensor; None for all.

    Args:
        tensor: the tensor.
        dim: the dimension.
        axis: count only how this axis of the mesh divides the tensor; None for all axes.
    Raises:
        ValueError: as for `shard_of`.
    """
    if not is_sharded(tensor):
        return None
    sharded: Any = tensor
    from torch.distributed.tensor import Replicate, distribute_tensor

    placements: list[Any] = [Replicate()] * len(sharded.placements)
    names = sharded.device_mesh.mesh_dim_names or placements
    for index, placement in enumerate(sharded.placements):
        if axis is None or names[index] == axis:
            placements[index] = _along(placement, dim, tensor.ndim)
    if all(isinstance(placement, Replicate) for placement in placements):
        return None
    mesh = sharded.device_mesh
    whole = torch.arange(tensor.shape[dim], device=sharded.to_local().device)
    # the same placements give the same part of a list of indices
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()


def selected(tensor: torch.Tensor, dim: int, indices: torch.Tensor | None) -> torch.Tensor:
    """The entries of a tensor along a dimension; all of them if the indices are None."""
    if indices is None:
        return tensor
    return tensor.index_select(dim, indices.to(tensor.device))


def _along(placement: Any, dim: int, ndim: int) -> Any:
    """The placement of a vector that runs along one dimension of a tensor.

    Args:
        placement: of the tensor, in one dimension of a mesh.
        dim: the dimension.
        ndim: number of dimensions of the tensor.
    """
    from torch.distributed.tensor import Replicate, Shard

    if placement.is_replicate():
        return Replicate()
    if placement.is_partial():
        raise ValueError(
            f"every process stores a summand of a base weight ({placement}), but an adapter needs "
            "the weight or a part of it; save the adapter, and use it in one process."
        )
    if placement.dim % ndim != dim:
        return Replicate()
    factor = getattr(placement, "split_factor", None)
    if factor is None:
        return Shard(0)
    return type(placement)(0, split_factor=factor)


def anywhere(found: bool, tensor: Weight) -> bool:
    """Whether `found` is true in one of the processes that share a tensor; all of them must call.

    So every process raises the same error, and none waits for one that has raised it alone.
    """
    if not is_sharded(tensor):
        return found
    sharded: Any = tensor
    answer = torch.tensor(float(found), device=sharded.to_local().device)
    for axis in range(sharded.device_mesh.ndim):
        dist.all_reduce(answer, dist.ReduceOp.MAX, group=sharded.device_mesh.get_group(axis))
    return bool(answer)


# ---- before an adapter is added ------------------------------------------------------------------


def check_may_be_adapted(model: nn.Module) -> None:
    """Check that a model can get an adapter with its parameters as they are.

    Raises:
        ValueError: if experts are divided by tensor parallelism.
    """
    sharded = {
        path: module
        for path, module in model.named_modules()
        if any(is_sharded(parameter) for parameter in module.parameters(recurse=False))
    }
    for path, module in sharded.items():
        # transformers sets the flag on modules whose forward it has replaced
        if is_experts(module) and getattr(module, "_is_hooked", False):
            raise ValueError(
                f"the experts of {path} are divided among processes by tensor parallelism together "
                "with another kind of parallelism, or by a release of transformers without "
                "ep_size, but an adapter needs whole experts; use DistributedConfig(ep_size=...), "
                "or " + _SHARD_AFTERWARDS
            )
