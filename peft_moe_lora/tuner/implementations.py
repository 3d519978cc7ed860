"""backend="materialize": the experts implementation the model was told to run with, on W + scaling * B A.

The base module and its parameters stay as they are: the implementation is given a view of the module in which the
written weights stand in the parameters' place.
"""

import logging
from collections.abc import Callable
from functools import cache

import torch
from torch import nn

from ..experts.layout import ExpertsLayout
from ..functional import Projection
from ..ops import Activation, QuantizedWeight
from .materialize import materialize

logger = logging.getLogger(__name__)

MATERIALIZE = "materialize"

# the experts implementation registered with transformers for the backends that apply A and B beside the weights
IMPLEMENTATION = "moe_lora"

# hidden_act in the model's config -> what sonicmoe computes for it
_SONICMOE_KINDS = {"silu": ("silu",), "gelu": ("gelu", "gelu_tanh"), "relu": ()}


def check_implementation(name: str | None, module: nn.Module, layout: ExpertsLayout) -> None:
    """See that an experts implementation can run here and on this module, before it is asked to.

    Args:
        name: as in `config._experts_implementation`; None and names we know nothing of are left to transformers.
        module: the experts module; its shapes, dtypes and attributes are read, never its weights.
        layout: of the module.
    Raises:
        ValueError: if the weights are not plain parameters, the class has a call of its own, or the implementation is
            ours.
        RuntimeError: with the reason, if hardware, a package or support for the module's layout is missing.
    """
    if layout.family is not None:
        raise ValueError(
            f'backend="{MATERIALIZE}" runs an implementation of transformers\' experts interface, which '
            f"{type(module).__name__} is not on; use another backend."
        )
    for name_of, projection in (("gate_up", layout.gate_up), ("down", layout.down)):
        plain = projection.weight in module._parameters
        if not plain or isinstance(layout.weight(module, name_of), QuantizedWeight):
            raise ValueError(
                f'backend="{MATERIALIZE}" writes W + scaling * B A in the place of a plain parameter, but '
                f"{type(module).__name__}.{projection.weight} is none (quantized or parametrized); "
                "use another backend."
            )
    if name == IMPLEMENTATION:
        raise ValueError(
            f'backend="{MATERIALIZE}" runs the experts implementation of the model\'s config, but that says '
            f'"{IMPLEMENTATION}"; name one with model.set_experts_implementation(...), or use another backend.'
        )
    obstacle = {"sonicmoe": _sonicmoe_obstacle, "deepgemm": _deepgemm_obstacle}.get(
        name, _no_obstacle
    )(module, layout)
    if obstacle:
        raise RuntimeError(
            f'backend="{MATERIALIZE}" runs the model\'s own experts implementation, and "{name}" cannot run here: '
            f"{obstacle} Choose another with model.set_experts_implementation(...), or another backend."
        )


def run_implementation(
    module: nn.Module,
    layout: ExpertsLayout,
    config,
    up: Projection,
    down: Projection,
    *args: torch.Tensor,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """The module's own forward, as `config` dispatches it, on the updated weights.

    Args:
        module: the experts module, unchanged afterwards.
        layout: of the module.
        config: the model's, which names the implementation; None where the class does not dispatch.
        up, down: the projections; one without lora_A stays the module's parameter.
        args: hidden_states [T, H], top_k_index [T, top_k], top_k_weights [T, top_k], as the module takes them.
    Returns: [T, H], and the weights that were written.
    """
    written = {side.weight: materialize(p) for side, p in ((layout.gate_up, up), (layout.down, down))
               if p.lora_A is not None}  # fmt: skip
    _log_cost(tuple((n, tuple(w.shape), w.numel() * w.element_size()) for n, w in written.items()))
    stored = {n: w.transpose(1, 2) if layout.transposed else w for n, w in written.items()}
    view = object.__new__(type(module))
    view.__dict__.update(module.__dict__, _parameters={**module._parameters, **stored})
    if config is not None:
        view.__dict__["config"] = config
    return type(module).forward(view, *args), tuple(stored.values())


def check_gradients(
    out: torch.Tensor, weights, hidden_states, top_k_index, top_k_weights, num_experts: int
) -> bool:
    """Whether it is now known that the implementation differentiates with respect to its weights.

    Args:
        out: [T, H], what it returned, with gradients enabled.
        weights: those it was given.
    Returns: False where nothing can be known: no weight asks for a gradient, or no row was routed to an expert.
    Raises:
        RuntimeError: if out does not depend on the weights, so that A and B would silently stay as they are.
    """
    wanted = {w.grad_fn for w in weights if w.requires_grad}
    if not wanted:
        return False
    # what stands before the layer is not searched
    seen = {t.grad_fn for t in (hidden_states, top_k_weights)} - wanted
    waiting = [out.grad_fn]
    while waiting and wanted:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        wanted.discard(node)
        waiting += [following for following, _ in node.next_functions]
    if not wanted:
        return True
    if not ((top_k_index >= 0) & (top_k_index < num_experts)).any():
        return False
    raise RuntimeError(
        f'backend="{MATERIALIZE}": the model\'s experts implementation has no backward (its output does not depend on '
        "the weights it was given), so the adapter cannot be trained with it; choose another with "
        "model.set_experts_implementation(...), or call it under torch.no_grad()."
    )


def _no_obstacle(module: nn.Module, layout: ExpertsLayout) -> str:
    return ""


def _sonicmoe_obstacle(module: nn.Module, layout: ExpertsLayout) -> str:
    from transformers.integrations.sonicmoe import is_sonicmoe_loadable

    if not layout.gated:
        return f"it needs a gate, which {type(module).__name__} has not."
    if getattr(module, "has_post_expert_norm", False):
        return f"it knows no norm after the experts, as {type(module).__name__} has."
    # it computes hidden_act(gate) * up by the config's word and never asks the module
    name = getattr(module.config, "hidden_act", "silu").lower()
    if layout.activation is None:
        same = (
            name in _SONICMOE_KINDS
            and type(module)._apply_gate.__module__ == "transformers.integrations.moe"
        )
    else:
        interleaved = not module.is_concatenated
        same = layout.activation in [
            Activation(kind, interleaved=interleaved) for kind in _SONICMOE_KINDS.get(name, ())
        ]
    if not same:
        own = layout.activation or "a gate of its own"
        return f"it computes {name}(gate) * up where {type(module).__name__} has {own}."
    return _load_obstacle(is_sonicmoe_loadable)


def _deepgemm_obstacle(module: nn.Module, layout: ExpertsLayout) -> str:
    from transformers.integrations.deepgemm import is_deepgemm_loadable

    if getattr(module, "has_post_expert_norm", False):
        return f"it knows no norm after the experts, as {type(module).__name__} has."
    dtype = module._parameters[layout.gate_up.weight].dtype
    if dtype != torch.bfloat16:
        return f"it needs bf16 weights, got {dtype}."
    return _load_obstacle(is_deepgemm_loadable)


def _load_obstacle(is_loadable: Callable[..., bool]) -> str:
    try:
        is_loadable(raise_error=True)
    except ImportError as error:
        return str(error)
    return ""


@cache
def _log_cost(written: tuple) -> None:
    """Once per layer shape."""
    logger.warning(
        'backend="%s" writes %.1f MiB of weights per layer and call (%s) and keeps them until the layer\'s backward, '
        "which holds as much again as their gradient; gradient checkpointing keeps one layer's at a time.",
        MATERIALIZE,
        sum(size for *_, size in written) / 2**20,
        ", ".join(f"{name} {list(shape)}" for name, shape, _ in written),
    )
