"""Whether the routes that train a whole model give the same logits and the same gradients."""

import sys
from typing import NamedTuple

import torch
from torch import nn

from checking import CheckFailed, relative_error
from models import ModelRoute, sharing_weights
from routes import to_expert_major, to_rank_major


class Bounds(NamedTuple):
    """How far a route may be from PEFT's.

    Attributes:
        logits: of |ours - PEFT's| / |PEFT's - base's| of the median token.
        gradients: of |ours - PEFT's| / |PEFT's| of every gradient.
    """

    logits: float
    gradients: float


# in bf16, rounding sends some tokens to other experts in one route than in another; in fp32 only
# the order of summation differs
BOUNDS = {torch.float32: Bounds(1e-3, 1e-3), torch.bfloat16: Bounds(0.1, 0.35)}


class Result(NamedTuple):
    """What one step gives.

    Attributes:
        logits: [batch, T, V] fp32.
        loss: the mean over the tokens.
        gradients: by the parameter's name; those of B are expert-major.
    """

    logits: torch.Tensor
    loss: float
    gradients: dict[str, torch.Tensor]


@torch.no_grad()
def fill_adapter(route: ModelRoute, rank: int, base: nn.Module) -> None:
    """Random A and B, each update about half as large as what it is added to."""
    generator = torch.Generator(next(iter(route.trained.values())).device).manual_seed(1)
    for name, parameter in route.trained.items():
        K = route.trained[name.replace("lora_B", "lora_A")].shape[1]
        # W x is about initializer_range * sqrt(K) |x|, A x about |x|, and scaling is 2
        std = 0.25 * base.config.initializer_range * (K / rank) ** 0.5
        if "lora_A" in name:
            std = K**-0.5
        parameter.normal_(std=std, generator=generator)


@torch.no_grad()
def copy_adapter(source: ModelRoute, target: ModelRoute, rank: int) -> None:
    """Give the target the values of the source, whose B are expert-major."""
    for name, parameter in target.trained.items():
        value = source.trained[name]
        if target.rank_major and ".experts.lora_B." in name:
            value = to_rank_major(value, rank)
        parameter.copy_(value)


def result_of(route: ModelRoute, ids: torch.Tensor, rank: int) -> Result:
    """Forward and backward of a route.

    Raises:
        CheckFailed: if a parameter of the adapter gets no gradient.
    """
    out = route.model(input_ids=ids, labels=ids)
    out.loss.backward()
    gradients = {}
    for name, parameter in route.trained.items():
        gradient = parameter.grad
        if gradient is None:
            raise CheckFailed(f"{name} gets no gradient")
        parameter.grad = None
        if route.rank_major and ".experts.lora_B." in name:
            gradient = to_expert_major(gradient, rank)
        gradients[name] = gradient
    return Result(out.logits.detach().float(), out.loss.item(), gradients)


def check(
    routes: dict[str, ModelRoute], base: nn.Module, rank: int, ids: torch.Tensor
) -> dict[str, float]:
    """Give the routes that have an adapter the same one, and compare them with the first of them.

    Args:
        base: the model without an adapter.
        rank: of the adapters.
        ids: [batch, T] token ids.
    Returns: the losses by route.
    Raises:
        CheckFailed: if two routes disagree, or if the adapter changes nothing.
    """
    adapted = {name: route for name, route in routes.items() if route.trained}
    if not adapted:
        return {}
    # expert-major where there is such a route, so that PEFT's values come from another order
    source = min(adapted.values(), key=lambda route: route.rank_major)
    fill_adapter(source, rank, base)
    for route in adapted.values():
        if route is not source:
            copy_adapter(source, route, rank)
    with torch.no_grad():
        plain = sharing_weights(base)(input_ids=ids).logits.float()
    results = {name: result_of(route, ids, rank) for name, route in adapted.items()}
    first = next(iter(results))
    share = relative_error(results[first].logits, plain)
    if not 0.1 <= share <= 10:
        raise CheckFailed(f"the adapter's share of the logits is {share:.2e}, not of order one")
    bounds = BOUNDS[next(base.parameters()).dtype]
    for name, result in results.items():
        compare_results(name, result, first, results[first], plain, bounds)
    return {name: result.loss for name, result in results.items()}


def compare_results(
    name: str, result: Result, first: str, right: Result, plain: torch.Tensor, bounds: Bounds
) -> None:
    """Compare a route with the first one, and say on stderr how far apart they are.

    Args:
        name, result: the route's.
        first, right: the first route's.
        plain: [batch, T, V] logits of the model without an adapter.
    Raises:
        CheckFailed: if they are further apart than the bounds allow.
    """
    size = (right.logits - plain).norm(dim=-1)
    logits = ((result.logits - right.logits).norm(dim=-1) / size).median()
    if not logits <= bounds.logits:
        raise CheckFailed(f"the logits of {name} are {logits:.1e} off those of {first}")
    errors = {key: relative_error(result.gradients[key], g) for key, g in right.gradients.items()}
    worst = max(errors, key=errors.__getitem__)
    if not errors[worst] <= bounds.gradients:
        raise CheckFailed(
            f"the gradient of {worst} in {name} is {errors[worst]:.1e} off that of {first}"
        )
    print(
        f"  {name}: loss {result.loss:.4f}; logits {logits:.1e} and gradients at most "
        f"{errors[worst]:.1e} from those of {first}",
        file=sys.stderr,
    )
