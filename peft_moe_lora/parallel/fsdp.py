"""Models that FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded.

FSDP2 gathers the parameters of a module for its forward, and may keep them gathered afterwards.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from .sharding import is_divided, is_sharded

_REMEDY = "Or add the adapter first, and then shard the model with fully_shard."


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 manages parameters of a module."""
    # `fully_shard` marks every module whose parameters it manages, for Dynamo
    return any(getattr(child, "_is_fsdp_managed_module", False) for child in module.modules())


def reshard(module: nn.Module) -> None:
    """Let FSDP2 drop the gathered weights of a module, so that its parameters are shards again.

    FSDP2 may keep gathered weights after a forward. What is written into them is lost.
    """
    gathered = any(not is_sharded(parameter) for parameter in module.parameters())
    if gathered and is_fully_sharded(module):
        for sharded in _fully_sharded_around_or_in(module):
            sharded.reshard()


def _fully_sharded_around_or_in(module: nn.Module) -> Iterator[Any]:
    """The modules given to `fully_shard` that contain the module or are contained in it."""
    if not dist.is_available() or not dist.is_initialized():
        return
    # the only place where PyTorch remembers which modules were given to `fully_shard`: a module
    # does not know the modules that contain it
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    inside = set(module.modules())
    for sharded in list(_module_state_mapping):
        if not isinstance(sharded, FSDPModule):
            continue
        if sharded in inside or any(child is module for child in sharded.modules()):
            yield sharded


def check_beside(
    model: nn.Module, modules: Mapping[str, nn.Module], tokens: Collection[str]
) -> None:
    """Check that a sharded model can get what an adapter trains beside its targets.

    Args:
        model: the model.
        modules: path -> module, of the modules that it trains whole.
        tokens: paths of the embeddings of which it trains rows.
    Raises:
        ValueError: if rows of a sharded embedding are to be trained, or if a module that would be
            copied was given to `fully_shard` itself.
    """
    if not is_fully_sharded(model):
        return
    if tokens:
        raise ValueError(
            f"trainable_token_indices: FSDP2 has sharded {next(iter(tokens))}, but PEFT reads the "
            "rows of the whole embedding. Add the adapter first, and then shard the model with "
            "fully_shard."
        )
    from torch.distributed.fsdp import FSDPModule

    for path, module in modules.items():
        if any(isinstance(child, FSDPModule) for child in module.modules()):
            raise ValueError(
                f"modules_to_save: {path} was given to fully_shard, and what it returns cannot be "
                "copied. Shard it as a part of the module around it. " + _REMEDY
            )


def mesh_of(model: nn.Module) -> Any:
    """The mesh over which FSDP2 has sharded a model; None if it has not.

    Raises:
        ValueError: if FSDP1 has sharded the model, if a parameter is not sharded, if there are
            several meshes, or if the mesh has an axis over which batches are not divided.
    """
    if not is_fully_sharded(model):
        return None
    reshard(model)
    if not is_divided(model):
        raise ValueError("FSDP1 has sharded the model, but an adapter needs FSDP2. " + _REMEDY)
    mesh: Any = None
    for path, parameter in model.named_parameters():
        if not is_sharded(parameter):
            raise ValueError(
                f"FSDP2 has sharded a part of the model, but not {path}. Call fully_shard on the "
                "whole model before an adapter is added. " + _REMEDY
            )
        sharded: Any = parameter
        if mesh is None:
            mesh = sharded.device_mesh
        if sharded.device_mesh != mesh:
            raise ValueError(
                f"FSDP2 has sharded {path} over {sharded.device_mesh} and other parameters over "
                f"{mesh}, but an adapter that is added afterwards needs one mesh. " + _REMEDY
            )
        *outer, last = sharded.placements
        if any(not placement.is_replicate() for placement in outer) or last.is_partial():
            raise ValueError(
                f"{path} is divided among processes as {sharded.placements}, by tensor parallelism "
                "beside FSDP2, but an adapter that is added afterwards needs FSDP2 alone. "
                + _REMEDY
            )
    return mesh
