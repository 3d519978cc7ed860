"""backend="materialize": the model's own experts implementation, run on W + scaling * B A.

The base module and its parameters do not change. The implementation gets a copy of the module
object, and in this copy the updated weights replace the parameters.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn

from ..config import MATERIALIZE
from ..experts.layout import ExpertsLayout
from ..functional import Projection
from ..ops import Activation, QuantizedWeight
from .materialize import materialize

logger = logging.getLogger(__name__)

# name of the experts implementation that this package registers with transformers; all other
# backends run through it, and do not add B A to the weights
IMPLEMENTATION = "moe_lora"

# hidden_act in the model's config -> the fused activations that compute the same as sonicmoe
_SONICMOE_KINDS = {"silu": ("silu",), "gelu": ("gelu", "gelu_tanh"), "relu": ()}


def check_implementation(name: str | None, module: nn.Module, layout: ExpertsLayout) -> None:
    """Check, before its first call, that an experts implementation can run a module here.

    Args:
        name: as in `config._experts_implementation`. None and unknown names are not checked here;
            transformers checks them.
        module: the experts module; its shapes, dtypes and attributes are read, not its weights.
        layout: layout of the module.
    Raises:
        ValueError: if the weights are not plain parameters, if the class is not on transformers'
            experts interface, or if the implementation is this package's own.
        RuntimeError: if the implementation needs other hardware or a missing package, or does not
            support the module's layout. The message gives the reason.
    """
    _check_module(module, layout)
    if name == IMPLEMENTATION:
        raise ValueError(
            f'backend="{MATERIALIZE}" runs the experts implementation that the model\'s config '
            f'names, but the config names "{IMPLEMENTATION}", which is this package\'s own; set '
            "another with model.set_experts_implementation(...), or use another backend."
        )
    obstacle = None
    if name == "sonicmoe":
        obstacle = _sonicmoe_obstacle(module, layout)
    elif name == "deepgemm":
        obstacle = _deepgemm_obstacle(module, layout)
    if obstacle is not None:
        raise RuntimeError(
            f'backend="{MATERIALIZE}" runs the model\'s own experts implementation, and "{name}" '
            f"cannot run here: {obstacle} Choose another with "
            "model.set_experts_implementation(...), or use another backend."
        )


def _check_module(module: nn.Module, layout: ExpertsLayout) -> None:
    cls = type(module).__name__
    if layout.family is not None:
        raise ValueError(
            f'backend="{MATERIALIZE}" runs an implementation of transformers\' experts interface, '
            f"but {cls} is not on that interface; use another backend."
        )
    for name, projection in layout.projections.items():
        plain = projection.weight in module._parameters
        if not plain or isinstance(layout.weight(module, name), QuantizedWeight):
            raise ValueError(
                f'backend="{MATERIALIZE}" replaces plain parameters by W + scaling * B A, but '
                f"{cls}.{projection.weight} is not a plain parameter (it is quantized or "
                "parametrized); use another backend."
            )


def run_implementation(
    module: nn.Module,
    layout: ExpertsLayout,
    config: Any,
    up: Projection,
    down: Projection,
    *rows: torch.Tensor,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Run a module's own forward with the updated weights.

    Args:
        module: the experts module; it is not changed.
        layout: layout of the module.
        config: the model's config, which names the implementation; None for a class that does not
            dispatch to implementations.
        up: the gate_up projection; if it has no lora_A, the module's own parameter is used.
        down: the down projection; if it has no lora_A, the module's own parameter is used.
        rows: the module's arguments: hidden_states [T, H], top_k_index [T, top_k] and
            top_k_weights [T, top_k].
    Returns: the module's output [T, H], and the updated weights.
    """
    updated = {}
    for stored, projection in ((layout.gate_up, up), (layout.down, down)):
        if projection.lora_A is not None:
            updated[stored.weight] = materialize(projection)
    _log_cost(
        tuple(
            (name, tuple(weight.shape), weight.numel() * weight.element_size())
            for name, weight in updated.items()
        )
    )
    if layout.transposed:
        updated = {name: weight.transpose(1, 2) for name, weight in updated.items()}
    # a copy of the object with other parameters; __init__ would allocate new parameters
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__, _parameters={**module._parameters, **updated})
    if config is not None:
        copy.__dict__["config"] = config
    return type(module).forward(copy, *rows), tuple(updated.values())


def check_gradients(
    out: torch.Tensor,
    weights: Sequence[torch.Tensor],
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    num_experts: int,
) -> bool:
    """Check that an experts implementation computes gradients of its weights.

    Args:
        out: [T, H], the output of the implementation, computed with gradients enabled.
        weights: the updated weights, an input of the implementation like the next three.
        hidden_states: [T, H] float.
        top_k_index: [T, top_k] integer.
        top_k_weights: [T, top_k] float.
        num_experts: E.
    Returns: True if it does; False if this call does not show it, because no weight requires a
        gradient or no row was routed to an expert.
    Raises:
        RuntimeError: if `out` does not depend on the weights, so that training would never change
            A and B.
    """
    wanted = {weight.grad_fn for weight in weights if weight.requires_grad}
    if not wanted:
        return False
    # the search stops at the layer's inputs
    before = {hidden_states.grad_fn, top_k_weights.grad_fn} - wanted
    if wanted <= _nodes_behind(out.grad_fn, before, wanted):
        return True
    routed = (top_k_index >= 0) & (top_k_index < num_experts)
    if not routed.any():
        return False
    raise RuntimeError(
        f'backend="{MATERIALIZE}": the model\'s experts implementation has no backward (in the '
        "autograd graph its output does not depend on its weights), so the adapter cannot be "
        "trained with it; choose another with model.set_experts_implementation(...), or call the "
        "model under torch.no_grad()."
    )


def _nodes_behind(start: Any, excluded: set[Any], wanted: set[Any]) -> set[Any]:
    """The nodes of `wanted` that can be reached from `start` in the autograd graph.

    Args:
        start: a node of the graph; None if the output requires no gradient.
        excluded: nodes that the search does not enter.
        wanted: the nodes to find; the search ends when all are found.
    """
    found: set[Any] = set()
    seen = set(excluded)
    waiting = [start]
    while waiting and found != wanted:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in wanted:
            found.add(node)
        waiting += [following for following, _ in node.next_functions]
    return found


def _sonicmoe_obstacle(module: nn.Module, layout: ExpertsLayout) -> str | None:
    """Why sonicmoe cannot run a module here; None if it can."""
    from transformers.integrations.sonicmoe import is_sonicmoe_loadable

    cls = type(module).__name__
    if not layout.gated:
        return f"it needs a gate, which {cls} does not have."
    if getattr(module, "has_post_expert_norm", False):
        return f"it supports no norm after the experts, and {cls} has one."
    # sonicmoe computes hidden_act(gate) * up, with hidden_act from the config; it never calls the
    # module's activation
    name = getattr(module.config, "hidden_act", "silu").lower()
    if not _is_sonicmoe_activation(name, module, layout):
        own = layout.activation or "a gate of its own"
        return f"it computes {name}(gate) * up, and {cls} has {own}."
    return _load_obstacle(is_sonicmoe_loadable)


def _is_sonicmoe_activation(name: str, module: nn.Module, layout: ExpertsLayout) -> bool:
    """Whether a module's activation is the one that sonicmoe computes for a hidden_act."""
    if name not in _SONICMOE_KINDS:
        return False
    if layout.activation is None:
        # the interface's own gate: act_fn(gate) * up
        gate: Any = type(module)
        return gate._apply_gate.__module__ == "transformers.integrations.moe"
    interleaved = not module.is_concatenated
    same = [Activation(kind, interleaved=interleaved) for kind in _SONICMOE_KINDS[name]]
    return layout.activation in same


def _deepgemm_obstacle(module: nn.Module, layout: ExpertsLayout) -> str | None:
    """Why DeepGEMM cannot run a module here; None if it can."""
    from transformers.integrations.deepgemm import is_deepgemm_loadable

    if getattr(module, "has_post_expert_norm", False):
        return f"it supports no norm after the experts, and {type(module).__name__} has one."
    dtype = layout.weight(module, "gate_up").dtype
    if dtype != torch.bfloat16:
        return f"it needs bf16 weights, got {dtype}."
    return _load_obstacle(is_deepgemm_loadable)


def _load_obstacle(is_loadable: Callable[..., bool]) -> str | None:
    """Why a package cannot be loaded; None if it can."""
    try:
        is_loadable(raise_error=True)
    except ImportError as error:
        return str(error)
    return None


@cache
def _log_cost(updated: tuple[tuple[str, tuple[int, ...], int], ...]) -> None:
    """Log the memory that the updated weights of one layer need; once for each layer shape.

    Args:
        updated: (name, shape, bytes) of each weight.
    """
    logger.warning(
        'backend="%s" writes %.1f MiB of weights per layer and call (%s). They stay in memory '
        "until the layer's backward, where their gradient needs as much memory again. With "
        "gradient checkpointing only the weights of one layer are in memory at a time.",
        MATERIALIZE,
        sum(size for _, _, size in updated) / 2**20,
        ", ".join(f"{name} {list(shape)}" for name, shape, _ in updated),
    )
