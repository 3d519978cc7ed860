"""Which `Activation` computes what an experts module computes between its projections.

The answer is found by running the module's own code on a few numbers, the probe, and comparing the
result with that of every candidate. Names of classes and functions decide nothing.
"""

from collections.abc import Callable, Iterator
from operator import attrgetter

import torch
from torch import nn

from ..ops import Activation
from ..ops.activation import KINDS
from .families import FAMILIES

# names of the attributes that hold an activation's constants; the first that is a number is used
LIMIT_NAMES = ("limit", "swiglu_limit")
ALPHA_NAMES = ("alpha", "swiglu_alpha")
# points of the probe, and the largest of them where the module has no clamp
POINTS = 24
REACH = 8.0

OwnActivation = Callable[[torch.Tensor], torch.Tensor]


def own_activation(module: nn.Module, gated: bool) -> OwnActivation:
    """What the module itself computes between its projections, [M, N] -> [M, I].

    Args:
        module: an experts module.
        gated: whether the pre-activation holds a gate and an up half, N = 2I.
    """
    apply_gate = getattr(module, "_apply_gate", None)
    if gated and apply_gate is not None:
        return apply_gate
    name = "act_fn"
    family = FAMILIES.get(type(module).__name__)
    if family is not None:
        name = family.act_fn
    act_fn = attrgetter(name)(module)
    if not gated:
        return act_fn

    def act_times_up(pre: torch.Tensor) -> torch.Tensor:
        gate, up = pre.chunk(2, dim=-1)
        return act_fn(gate) * up

    return act_times_up


def fused_activation(module: nn.Module, gated: bool) -> Activation | None:
    """The `Activation` that computes what the module computes, or None if there is none.

    Args:
        module: an experts module.
        gated: as in `own_activation`.
    """
    act_fn = getattr(module, "act_fn", None)
    if isinstance(act_fn, nn.Module) and next(act_fn.parameters(), None) is not None:
        # the parameters of an activation that is trained may change after the probe
        return None
    limit = _first_float(module, LIMIT_NAMES)
    alpha = _first_float(module, ALPHA_NAMES)
    with torch.no_grad():
        probe = _probe(gated, limit)
        own = _run(own_activation(module, gated), probe)
        if own is None:
            return None
        for candidate in _candidates(gated, limit, alpha):
            if _agree(own, candidate(probe)):
                return candidate
    return None


def _probe(gated: bool, limit: float | None) -> torch.Tensor:
    """The fp64 numbers that activations are compared on, on the CPU: [24, 1], or [576, 4] if gated.

    They reach beyond the module's clamp on both sides, so that a candidate without a clamp differs.
    """
    reach = REACH
    # a limit this large stands for no clamp
    if limit is not None and limit <= 1e4:
        reach = 1.5 * limit
    points = torch.linspace(-reach, reach, POINTS, dtype=torch.float64, device="cpu")
    if not gated:
        return points[:, None]
    # [g0, g1, u0, u1], every gate value with every up value. Two columns of each show whether the
    # module takes gate and up as halves or as alternating columns
    pairs = torch.cartesian_prod(points, points)
    return torch.stack((pairs, pairs.roll(7, 0)), -1).flatten(1)


def _run(activation: OwnActivation, probe: torch.Tensor) -> torch.Tensor | None:
    """What a module's activation returns for the probe; None if it cannot run on it."""
    try:
        own = activation(probe.clone())
    # an activation may need more columns, another dtype or another device
    except (RuntimeError, TypeError, AttributeError, NotImplementedError):
        return None
    if not isinstance(own, torch.Tensor):
        return None
    return own


def _candidates(gated: bool, limit: float | None, alpha: float | None) -> Iterator[Activation]:
    """The activations a module with these constants may have, the simplest first."""
    if not gated:
        for kind in KINDS:
            yield Activation(kind, gated=False)
        return
    limits: list[float | None] = [None]
    if limit is not None:
        limits.append(limit)
    for interleaved in (False, True):
        for bound in limits:
            for kind in KINDS:
                yield Activation(kind, interleaved=interleaved, limit=bound)
    if alpha is None:
        return
    for interleaved in (False, True):
        for bound in limits:
            yield Activation(
                "silu", interleaved=interleaved, limit=bound, alpha=alpha, up_shift=1.0
            )


def _agree(own: torch.Tensor, candidate: torch.Tensor) -> bool:
    if own.shape != candidate.shape:
        return False
    # 1e-5: a module may compute in fp32 inside, whatever dtype it is given
    return torch.allclose(own.double(), candidate, rtol=1e-5, atol=1e-5)


def _first_float(module: nn.Module, names: tuple[str, ...]) -> float | None:
    """The first of the attributes that is a number, or None."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int | float):
            return float(value)
    return None
