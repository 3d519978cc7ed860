"""Adapters of experts that transformers divides among processes (`DistributedConfig(ep_size=...)`).

Each of the ep_size processes of a group holds count = E / ep_size experts, and A and B of these
experts: A as `Shard(0)`, B as `Shard(1)` of the group's mesh, which expert-major order makes whole
experts. What belongs to all experts alike, as a router's A and B, every process holds whole.

The gradient of a parameter is summed over the processes that hold it and saw other rows, and
divided by the number of batches of a step, as the mean over batches demands.
"""

from typing import Any

from torch import nn

from ..experts.layout import ExpertsLayout, is_experts
from ..experts.stored import UnsupportedExperts
from .gradients import Sum
from .share import Share, distributed_config, groups_along, size_of


def share_of(model: nn.Module, module: nn.Module) -> Share | None:
    """How the experts of a model are divided; None if every process holds all of them.

    Args:
        model: the model.
        module: the experts module, or a router, that gets an adapter.
    """
    if not is_divided_by_experts(model):
        return None
    manager: Any = model._mesh_manager
    mesh = manager.get_mesh("ep")
    together = groups_along(model, "ep")
    copies = groups_along(model, "dp_replicate", "efsdp")
    config = distributed_config(model)
    batches = config.dp_size
    same_rows = ()
    # the other implementations send every process the rows of its own experts alone
    if config.ep_implementation == "all_reduce":
        same_rows = together
    count = 0
    if is_experts(module):
        # transformers has set the number of this process's experts
        count = module.num_experts  # type: ignore[assignment]  # nn.Module: a tensor or a module
    first = mesh.get_local_rank() * count
    return Share(
        mesh=mesh,
        ids=range(first, first + count),
        of_expert=Sum(copies, batches),
        of_some=Sum((*together, *copies), batches),
        of_all=Sum(groups_along(model, "dp_replicate", "fsdp"), batches),
        everyone=(*together, *copies),
        same_rows=same_rows,
    )


def is_divided_by_experts(model: nn.Module) -> bool:
    """Whether transformers has divided the experts of a model among processes."""
    return size_of(distributed_config(model), "ep_size") > 1


def check_experts(model: nn.Module, path: str, module: nn.Module, layout: ExpertsLayout) -> None:
    """Check that transformers has divided an experts module as this package expects.

    Args:
        model: the model.
        path: path of the experts module.
        module: the module.
        layout: its layout.
    Raises:
        UnsupportedExperts: if it has not, or if the class is not on transformers' experts
            interface.
    """
    size = size_of(distributed_config(model), "ep_size")
    count = getattr(module, "num_experts", None)
    divided = getattr(module, "_is_expert_parallel", False)
    if divided and layout.decorated and count is not None and count * size == layout.num_experts:
        return
    raise UnsupportedExperts(
        f"{path}: ep_size={size}, but transformers has not divided the {layout.num_experts} "
        f"experts of {type(module).__name__} so that an adapter can follow: the class is not on "
        "its experts interface, or its plan does not name the module. Load the model without "
        "ep_size, add the adapter, and shard it with torch.distributed.fsdp.fully_shard."
    )
