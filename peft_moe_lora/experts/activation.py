"""Finds the `Activation` that an experts module applies between its projections.

The module's own code runs on a few numbers, called the probe. Its result is compared with the
result of every candidate. Names of classes and functions are not used.
"""

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..ops import Activation
from ..ops.activation import KINDS
from .families import FAMILIES
from .hooks import is_hooked_by_others

# names of attributes with an activation's constants; the first attribute that is a number is used
LIMIT_NAMES = ("limit", "swiglu_limit")
ALPHA_NAMES = ("alpha", "swiglu_alpha")
# names of all attributes of a module that `activation_facts` reads
_REPLACEABLE = ("act_fn", "_apply_gate", *LIMIT_NAMES, *ALPHA_NAMES)
# number of points in the probe, and the largest point if the module has no clamp
POINTS = 24
REACH = 8.0
# points beyond the clamp of a module that says its limit nowhere; a larger limit is no clamp
FAR = (20.0, 200.0, 2e3, 2e4)

OwnActivation = Callable[[torch.Tensor], torch.Tensor]


def own_activation(module: nn.Module, gated: bool) -> OwnActivation:
    """The function that the module itself applies between its projections, [M, N] -> [M, I].

    Args:
        module: an experts module.
        gated: whether the pre-activation consists of a gate half and an up half, N = 2I.
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


def activation_facts(module: nn.Module) -> tuple[Any, ...]:
    """What a module's activation was read from, and code may replace; equal if nothing was.

    It is asked for in every forward: attributes of the class, and what an `act_fn` holds, do not
    count.
    """
    # not getattr: where a module lacks an attribute, it takes nn.Module microseconds to say so
    act_fn = module._modules.get("act_fn")
    hooked = act_fn is not None and is_hooked_by_others(act_fn)
    return act_fn, hooked, *map(module.__dict__.get, _REPLACEABLE)


def is_replica(module: nn.Module) -> bool:
    """Whether nn.DataParallel made a module, for one call; its `activation_facts` are of copies."""
    return "_is_replica" in module.__dict__


def fused_activation(module: nn.Module, gated: bool) -> Activation | None:
    """The `Activation` that computes the same as the module's own code, or None if there is none.

    Args:
        module: an experts module.
        gated: as in `own_activation`.
    """
    act_fn = getattr(module, "act_fn", None)
    if isinstance(act_fn, nn.Module) and _may_change(act_fn):
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


def _may_change(act_fn: nn.Module) -> bool:
    """Whether an activation may compute something else than it does for the probe.

    Training may change its parameters, modules in it may be replaced or, as dropout, act in
    training alone, and hooks may do anything.
    """
    has_parts = any(True for _ in act_fn.children())
    return has_parts or is_hooked_by_others(act_fn) or next(act_fn.parameters(), None) is not None


def _probe(gated: bool, limit: float | None) -> torch.Tensor:
    """The inputs on which activations are compared: fp64 on the CPU, [32, 1], [584, 4] if gated.

    They reach beyond the module's clamp on both sides, so that a candidate without a clamp gives
    another result.
    """
    reach = REACH
    # a larger limit means that there is no clamp
    if limit is not None and limit <= 1e4:
        reach = 1.5 * limit
    points = torch.linspace(-reach, reach, POINTS, dtype=torch.float64, device="cpu")
    far = points.new_tensor([sign * point for point in FAR for sign in (-1, 1)])
    if not gated:
        return torch.cat((points, far))[:, None]
    # columns [g0, g1, u0, u1], with every gate value beside every up value; two gate and two up
    # columns show whether the module takes gate and up as halves or as alternating columns
    pairs = torch.cartesian_prod(points, points)
    near = torch.stack((pairs, pairs.roll(7, 0)), -1).flatten(1)
    # beside 1 alone: a large factor would show the rounding of a module that computes in fp32
    one = torch.ones_like(far)
    return torch.cat((near, torch.stack((far, one, one, far), -1)))


def _run(activation: OwnActivation, probe: torch.Tensor) -> torch.Tensor | None:
    """The result of a module's activation for the probe; None if it cannot run on the probe."""
    try:
        own = activation(probe.clone())
    # an activation may need more columns, another dtype or another device
    except (RuntimeError, TypeError, AttributeError, NotImplementedError):
        return None
    if not isinstance(own, torch.Tensor):
        return None
    return own


def _candidates(gated: bool, limit: float | None, alpha: float | None) -> Iterator[Activation]:
    """The activations that a module with these constants may have, the simplest first."""
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
    # 1e-5: a module may compute in fp32, although its input is fp64
    return torch.allclose(own.double(), candidate, rtol=1e-5, atol=1e-5)


def _first_float(module: nn.Module, names: tuple[str, ...]) -> float | None:
    """The first of these attributes that is a number; None if there is none."""
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int | float):
            return float(value)
    return None
