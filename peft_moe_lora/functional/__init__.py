"""out[t] = sum over slots of top_k_weights * down(act(gate_up(x[t]))), with gradients.

Each projection of an expert is W + scaling * B A. Rooms above call operations only through this
one, and it may import only ops. `backends` chooses the operations; `whole` and `steps` implement
forward and backward; `linear` does so for a linear layer. The base weights are frozen: no function
here computes a gradient for them or materializes W + scaling * B A.
"""

from collections.abc import Callable, Sequence

import torch

from ..ops import Activation
from .backends import BACKENDS, on_device_of, select_backend
from .linear import FrozenLinear, LinearUpdate, updated_linear
from .operators import is_autocast_enabled, without_autocast, without_autocast_of
from .projection import (
    Projection,
    gathered,
    per_expert,
    rank_to_expert_major,
    spread,
    whole_gradients,
)
from .steps import expert_linear, route, unfused_experts
from .whole import fused_experts

__all__ = [
    "BACKENDS",
    "FrozenLinear",
    "LinearUpdate",
    "Projection",
    "draw_seeds",
    "experts",
    "gathered",
    "is_autocast_enabled",
    "per_expert",
    "rank_to_expert_major",
    "rows_linear",
    "select_backend",
    "spread",
    "updated_linear",
    "whole_gradients",
    "without_autocast",
    "without_autocast_of",
]


def experts(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    up: Projection,
    down: Projection,
    activation: Activation | Callable[[torch.Tensor], torch.Tensor],
    *,
    post_norm: Callable[[torch.Tensor], torch.Tensor] | None = None,
    backend: str = "auto",
    recompute: bool = False,
    seeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute a whole experts layer, with gradients.

    Args:
        hidden_states: [T, H] float; cast to the dtype of the weights.
        top_k_index: [T, top_k] integer; an id outside 0..E-1 is skipped.
        top_k_weights: [T, top_k] float; gets a gradient.
        up: the gate_up projection, [E, N, H] with N = 2I if gated.
        down: the down projection, [E, H, I].
        activation: an `Activation` runs inside the kernels; any other callable [M, N] -> [M, I]
            runs between them.
        post_norm: applied to the output rows of down, [M, H], before they are multiplied by the
            routing weights.
        backend: one of BACKENDS.
        recompute: backward computes the gate_up product again, and no [M, N] tensor is kept. Used
            only if an `Activation` runs inside the kernels.
        seeds: of the masks of dropout, from `draw_seeds`; drawn in the call by default.
    Returns: [T, H], dtype of hidden_states.
    Raises:
        ValueError: if the shapes do not agree, or if a base weight requires a gradient.
    """
    _check(hidden_states, top_k_index, top_k_weights, up, down)
    if seeds is None:
        seeds = draw_seeds(hidden_states.device, up, down)
    x = _in_dtype(hidden_states, up.weight.dtype)
    with on_device_of(x):
        if isinstance(activation, Activation) and post_norm is None and up.up_weight is None:
            up, down = _readable(up), _readable(down)
            # its operators disable autocast themselves
            out = fused_experts(
                x, top_k_index, top_k_weights, up, down, activation, seeds, backend, recompute
            )
        else:
            up, down = up.expert_major(), down.expert_major()
            with without_autocast(x.device.type):
                out = unfused_experts(
                    x, top_k_index, top_k_weights, up, down, activation, post_norm, seeds, backend
                )
    return _in_dtype(out, hidden_states.dtype)


def _readable(projection: Projection) -> Projection:
    """The projection with a B that the fused computation reads.

    A rank-major one is that of all experts, and contiguous.
    """
    lora_B = projection.lora_B
    if projection.rank_major and lora_B is not None:
        if projection.experts is not None or not lora_B.is_contiguous():
            return projection.expert_major()
    return projection


def _in_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x.to(dtype), which takes the host a microsecond where nothing changes."""
    if x.dtype == dtype:
        return x
    return x.to(dtype)


def rows_linear(
    x: torch.Tensor,
    expert_size: Sequence[int] | torch.Tensor,
    projection: Projection,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """y[m] = W[e] x[m] + bias[e] + scaling * B[e] A[e] x[m], for rows in expert order.

    Args:
        x: [M, K] float; cast to the dtype of the weights.
        expert_size: E integers of 0 or more, the number of rows of each expert, with the sum M; a
            list or a tensor. A tensor on a GPU is checked there, so the error comes later.
        projection: the projection, [E, N, K].
        backend: one of BACKENDS.
    Returns: [M, N], dtype of x.
    Raises:
        ValueError: if the shapes do not agree, if the sizes are not those of the rows, or if a base
            weight requires a gradient.
    """
    projection = projection.expert_major()
    E, _, K = projection.weight.shape
    sizes = torch.as_tensor(expert_size, device=x.device)
    if x.ndim != 2 or x.shape[1] != K or sizes.shape != (E,):
        raise ValueError(
            f"rows_linear needs x [M, {K}] and {E} expert sizes; "
            f"got {tuple(x.shape)} and {tuple(sizes.shape)}."
        )
    _check_sizes(expert_size, x.shape[0])
    _check_frozen(projection)
    seed = draw_seeds(x.device, projection)
    with on_device_of(x):
        expert = torch.repeat_interleave(
            torch.arange(E, device=x.device), sizes, output_size=x.shape[0]
        )
        y = expert_linear(x, projection, route(expert[:, None], E, backend), seed, 0, backend)
    return y.to(x.dtype)


def _check(
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
    up: Projection,
    down: Projection,
) -> None:
    E, _, H = up.weight.shape
    x = hidden_states.shape
    if len(x) != 2 or x[1] != H or down.weight.shape[:2] != (E, H):
        raise ValueError(
            f"experts needs hidden_states [T, H], gate_up [E, N, H] and down [E, H, I]; got "
            f"{[tuple(t.shape) for t in (hidden_states, up.weight, down.weight)]}."
        )
    selected = top_k_index.shape
    if selected != top_k_weights.shape or not selected or selected[0] != x[0]:
        raise ValueError(
            f"experts needs top_k_index and top_k_weights [T, top_k] with T = {x[0]}; got "
            f"{tuple(top_k_index.shape)} and {tuple(top_k_weights.shape)}."
        )
    _check_frozen(up, down)


def _check_sizes(expert_size: Sequence[int] | torch.Tensor, num_rows: int) -> None:
    needed = f"rows_linear needs expert sizes of 0 or more that add up to the {num_rows} rows of x"
    if isinstance(expert_size, torch.Tensor):
        # reading its values would wait for the device, and break a graph
        if expert_size.is_cuda or torch.compiler.is_compiling():
            fits = (expert_size >= 0).all() & (expert_size.sum() == num_rows)
            torch._assert_async(fits, f"{needed}.")
            return
        expert_size = expert_size.tolist()
    if min(expert_size) < 0 or sum(expert_size) != num_rows:
        raise ValueError(f"{needed}; got {list(expert_size)}.")


def _check_frozen(*projections: Projection) -> None:
    if not torch.is_grad_enabled():
        return
    frozen = [t for p in projections for t in (p.weight, p.up_weight, p.bias)]
    if any(t is not None and t.requires_grad for t in frozen):
        raise ValueError(
            "the experts' base weights are frozen and get no gradient here, "
            "but one has requires_grad=True; "
            "call requires_grad_(False) on it, or train it without an adapter on these experts. "
            "FSDP1 asks for it on every parameter: use FSDP2 (torch.distributed.fsdp.fully_shard)."
        )


def draw_seeds(device: torch.device, *projections: Projection) -> torch.Tensor | None:
    """Two seeds from the default generator, so that a recomputed forward draws the same masks.

    Args:
        device: where the seeds are.
        projections: those of the layer.
    Returns: [2, 2] int64 with one seed per row; None if no projection has dropout.
    """
    for projection in projections:
        if projection.dropout_p:
            # each row has 16 bytes, because kernels want tensors that are aligned to 16 bytes
            return torch.randint(2**31 - 1, (2, 2), device=device)
    return None
