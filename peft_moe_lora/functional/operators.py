"""Functions as operators: one node each in the graph that torch.compile makes, a plain call elsewhere.

Beside how one is defined: how a routing is handed to one, and what autograd keeps and gives back.
"""

from collections.abc import Callable

import torch
from torch.autograd.function import once_differentiable

from ..ops import QuantizedWeight, Routing

ROUTING = (
    "Tensor expert_offsets, Tensor row_token, Tensor row_slot, Tensor slot_row, Tensor? tiles, "
    "int top_k, int block_m"
)


def define(
    name: str, signature: str, run: Callable, fake: Callable, autograd=None, setup_context=None
) -> Callable:
    """An operator for any device under torch.compile; eager, the same functions without the operator's overhead.

    Args:
        run: from the arguments to new tensors.
        fake: the same, of shapes alone.
        autograd, setup_context: its backward, and what that keeps.
    Returns: the call.
    """
    qualified = f"peft_moe_lora::{name}"
    torch.library.define(qualified, signature)
    torch.library.impl(qualified, "default", run)
    torch.library.register_fake(qualified, fake)
    operator, eager = getattr(torch.ops.peft_moe_lora, name), run
    if autograd is not None:
        torch.library.register_autograd(qualified, autograd, setup_context=setup_context)
        parts = {
            "forward": run,
            "setup_context": setup_context,
            "backward": once_differentiable(autograd),
        }
        eager = type(
            name, (torch.autograd.Function,), {k: staticmethod(f) for k, f in parts.items()}
        ).apply
    return lambda *args: (operator if torch.compiler.is_compiling() else eager)(*args)


def flat(routing: Routing) -> tuple:
    """A routing as an operator takes it."""
    r = routing
    return r.expert_offsets, r.row_token, r.row_slot, r.slot_row, r.tiles, r.top_k, r.block_m


def routing_of(offsets, row_token, row_slot, slot_row, tiles, top_k, block_m) -> Routing:
    """The inverse of `flat`."""
    return Routing(offsets, row_token, row_slot, slot_row, top_k, tiles, block_m)


def save_for_backward(ctx, *values) -> None:
    """`ctx.save_for_backward`; quantized weights, which are the model's own, stay as they are."""
    ctx.quantized = {i: v for i, v in enumerate(values) if isinstance(v, QuantizedWeight)}
    ctx.save_for_backward(*(None if i in ctx.quantized else v for i, v in enumerate(values)))


def saved_for_backward(ctx) -> tuple:
    """What `save_for_backward` was given."""
    saved = ctx.saved_tensors  # once: under checkpointing each reading unpacks, and may recompute
    return tuple(ctx.quantized.get(i, t) for i, t in enumerate(saved)) if ctx.quantized else saved


def as_stored(gradient: torch.Tensor | None, like: torch.Tensor | None) -> torch.Tensor | None:
    """A gradient in the dtype of the tensor it belongs to; None where either is."""
    return None if gradient is None or like is None else gradient.to(like.dtype)
