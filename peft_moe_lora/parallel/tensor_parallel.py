"""Adapters of experts whose features transformers divides (`DistributedConfig(tp_size=...)`).

Each of the tp_size processes holds some of the I inner features of every expert: their rows of
gate_up, and their columns of down. It holds A and B whole, and uses the same rows of B for gate_up
and the same columns of A for down. The outputs of all processes are summed, so a process computes a
summand of every gradient.
"""

from typing import Any

import torch
from torch import nn

from ..experts.layout import ExpertsLayout, is_experts, read_layout
from ..experts.stored import UnsupportedExperts
from .gradients import Sum
from .sharding import indices_along
from .share import Features, Share, distributed_config, groups_along, size_of


def share_of(model: nn.Module, module: nn.Module) -> Share | None:
    """The part of every expert that this process holds; None if it holds experts whole.

    Args:
        model: the model.
        module: the experts module, or a router, that gets an adapter.
    """
    if not is_divided_by_features(model):
        return None
    manager: Any = model._mesh_manager
    ids = range(0)
    features = {}
    summed = Sum((), 1)
    together = groups_along(model, "tp")
    if is_experts(module):
        layout = read_layout(module)
        ids = range(layout.num_experts)
        features = features_of(module, layout)
    if features:
        summed = Sum(together, 1)
    return Share(
        mesh=manager.get_mesh("tp"),
        ids=ids,
        of_expert=summed,
        of_some=summed,
        of_all=Sum((), 1),
        everyone=together,
        by_expert=False,
        features=features,
        same_rows=together,
    )


def is_divided_by_features(model: nn.Module) -> bool:
    """Whether transformers has divided a model by features alone, and by nothing else."""
    config = distributed_config(model)
    others = ("ep_size", "fsdp_size", "dp_replicate_size", "pp_size")
    return size_of(config, "tp_size") > 1 and all(size_of(config, axis) == 1 for axis in others)


def features_of(module: nn.Module, layout: ExpertsLayout) -> dict[str, Features]:
    """Projection -> the part of it that this process holds; empty if it holds all of them."""
    found = {}
    for name in layout.projections:
        for weight in layout.parts(module, name):
            _, rows, columns = (indices_along(weight, dim) for dim in range(3))
            if rows is not None or columns is not None:
                found[name] = Features(rows, columns)
    return found


def check_experts(model: nn.Module, path: str, module: nn.Module, layout: ExpertsLayout) -> None:
    """Check that transformers has divided an experts module as this package expects.

    Args:
        model: the model.
        path: path of the experts module.
        module: the module.
        layout: its layout.
    Raises:
        UnsupportedExperts: if it has not, or if the outputs of its parts do not add up to its
            output.
    """
    fault = _fault(module, layout)
    if fault is None:
        return
    size = size_of(distributed_config(model), "tp_size")
    raise UnsupportedExperts(
        f"{path}: {type(module).__name__} is divided among the processes of tp_size={size}, but "
        f"{fault}. Load the model without tp_size, add the adapter, and shard it with "
        "torch.distributed.fsdp.fully_shard; or use DistributedConfig(ep_size=...)."
    )


def _fault(module: nn.Module, layout: ExpertsLayout) -> str | None:
    """Why an adapter cannot follow how a module is divided; None if it can."""
    found = features_of(module, layout)
    # transformers sets the flag on modules whose forward or parameters it has replaced
    if not found and not getattr(module, "_is_hooked", False):
        return None
    if set(found) != {"gate_up", "down"} or not layout.decorated:
        return "an adapter needs rows of gate_up and columns of down on its experts interface"
    if "forward" not in vars(module):
        return "its plan sums no outputs"
    biases = [name for name, projection in layout.projections.items() if projection.bias]
    if biases:
        return f"the bias of {biases} would be added once by each process"
    if getattr(module, "has_post_expert_norm", False):
        return "a norm of its output needs the sum first"
    rows, others = found["gate_up"]
    others_too, columns = found["down"]
    if rows is None or columns is None or others is not None or others_too is not None:
        return "an adapter needs rows of gate_up and columns of down"
    expected = _rows_before(columns, layout.down.in_features, module, layout)
    if not torch.equal(rows, expected):
        return "the rows of its gate_up do not give the columns of its down"
    return None


def _rows_before(
    columns: torch.Tensor, width: int, module: nn.Module, layout: ExpertsLayout
) -> torch.Tensor:
    """The rows of gate_up from which the activation makes some columns of the input of down.

    Args:
        columns: indices among the I columns.
        width: I.
        module: the experts module.
        layout: its layout.
    """
    if not layout.gated:
        return columns
    if getattr(module, "is_concatenated", True):
        return torch.cat([columns, width + columns])
    # interleaved: gate and up of a column stand one after the other
    return torch.stack([2 * columns, 2 * columns + 1], dim=1).flatten()
