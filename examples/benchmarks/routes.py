"""The ways to compute one experts layer with LoRA, and how any of them runs a step.

Every route works on the inputs and the frozen base weights of a `Problem`, and starts with the
values of its adapter.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from cases import MIB, Problem
from peft_moe_lora import MoELoraConfig, apply_to_peft
from timing import held_bytes, peak_bytes

Parameters = dict[str, torch.Tensor]


@dataclass
class Route:
    """One way to compute the layer.

    Attributes:
        forward: (x, top_k_index, top_k_weights) -> [T, H].
        adapter: its trainable parameters under the names of `Problem.adapter`; empty for a route
            without an adapter.
        rank_major: whether its B are rank-major, see `to_rank_major`.
    """

    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
    adapter: Parameters = field(default_factory=dict)
    rank_major: bool = False


def forward(problem: Problem, route: Route) -> torch.Tensor:
    """The layer's output."""
    return route.forward(problem.x, problem.top_k_index, problem.top_k_weights)


def step(problem: Problem, route: Route) -> torch.Tensor:
    """Forward and backward; the gradients are left in `.grad`."""
    out = forward(problem, route)
    out.backward(problem.dout)
    return out


def renew(problem: Problem, route: Route) -> None:
    """Drop the gradients, and give A and B a new version each, as an optimizer step does."""
    for tensor in (problem.x, problem.top_k_weights, *route.adapter.values()):
        tensor.grad = None
    for parameter in route.adapter.values():
        torch.autograd.graph.increment_version(parameter)


class Memory(NamedTuple):
    """MiB above what was allocated before.

    Attributes:
        held: after forward, the output included.
        kept: held without the output: what forward keeps for backward.
        peak: the most during forward and backward.
    """

    held: float
    kept: float
    peak: float


def measure_memory(problem: Problem, route: Route) -> Memory:
    """The memory of forward, and of a step."""
    device = problem.case.device
    renew(problem, route)
    held = held_bytes(partial(forward, problem, route), device)
    peak = peak_bytes(partial(step, problem, route), device)
    # the output is as large as x
    kept = held - problem.x.nbytes
    return Memory(held / MIB, kept / MIB, peak / MIB)


# ---- the adapter's parameters ------------------------------------------------------------------


def to_rank_major(B: torch.Tensor, r: int) -> torch.Tensor:
    """[N, r*E]: column e*r + j, our expert-major order, becomes column j*E + e, PEFT's order."""
    return B.unflatten(1, (-1, r)).transpose(1, 2).flatten(1)  # [N, E, r] -> [N, r, E]


def to_expert_major(B: torch.Tensor, r: int) -> torch.Tensor:
    """[N, r*E]: column j*E + e, PEFT's rank-major order, becomes column e*r + j, our order."""
    return B.unflatten(1, (r, -1)).transpose(1, 2).flatten(1)  # [N, r, E] -> [N, E, r]


def moe_lora_parameters(model: nn.Module) -> Parameters:
    """A and B of a model that peft_moe_lora adapts.

    Returns: parameters by <module>.lora_A.<projection>, at a linear layer <module>.lora_A.weight.
    """
    return {
        name.removeprefix("base_model.model.").replace(".default.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }


def peft_parameters(model: nn.Module) -> Parameters:
    """A and B of a model that PEFT adapts, under the names of `moe_lora_parameters`."""
    found = {}
    for path, module in model.named_modules():
        if not hasattr(module, "lora_A") or "default" not in module.lora_A:
            continue
        # the ParamWrappers of one experts module are nested: ...experts, ...experts.base_layer
        path = path.removeprefix("base_model.model.").removesuffix(".base_layer")
        name = getattr(module, "parameter_name", "weight").removesuffix("_proj")
        found[f"{path}.lora_A.{name}"] = module.lora_A["default"].weight
        found[f"{path}.lora_B.{name}"] = module.lora_B["default"].weight
    return found


def of_the_experts(parameters: Parameters, problem: Problem) -> Parameters:
    """The parameters of a `Block`'s adapter under the names of `Problem.adapter`, in its order."""
    return {name: parameters[f"experts.{name}"] for name in problem.adapter}


# ---- the routes --------------------------------------------------------------------------------


class Block(nn.Module):
    """The smallest model that holds an experts module."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self.config = experts.config

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        return self.experts(hidden_states, top_k_index, top_k_weights)


def transformers_block(problem: Problem) -> Block:
    """transformers' experts on the problem's own weights, frozen, on grouped_mm."""
    experts = copy.deepcopy(problem.experts)
    experts.config._experts_implementation = "grouped_mm"
    for name, projection in problem.layout.projections.items():
        stored = problem.weights[name]
        if projection.transposed:
            stored = stored.transpose(1, 2)
        setattr(experts, projection.weight, nn.Parameter(stored, requires_grad=False))
        if projection.bias:
            bias = nn.Parameter(problem.biases[name], requires_grad=False)
            setattr(experts, projection.bias, bias)
    return Block(experts)


def base_route(problem: Problem) -> Route:
    """transformers' experts without an adapter."""
    return Route(transformers_block(problem))


def frozen_route(problem: Problem) -> Route:
    """The same on this package's kernels, selected by name."""
    block = transformers_block(problem)
    block.experts.config._experts_implementation = "moe_lora"
    return Route(block)


def moe_lora_route(problem: Problem, **settings: object) -> Route:
    """peft_moe_lora as a user gets it; `settings` are further fields of its configuration."""
    r = problem.case.r
    alpha = problem.scaling * r
    config = MoELoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=problem.case.dropout,
        target_modules=["experts"],
        **settings,
    )
    model = get_peft_model(transformers_block(problem), config)
    adapter = of_the_experts(moe_lora_parameters(model), problem)
    with torch.no_grad():
        for name, parameter in adapter.items():
            parameter.copy_(problem.adapter[name])
    return Route(model.base_model.model, adapter)


def peft_route(problem: Problem, applied: bool = False) -> Route:
    """PEFT's own: a ParamWrapper for each of the two parameters.

    Args:
        applied: whether it computes as under `apply_to_peft()`.
    """
    r = problem.case.r
    projections = problem.layout.projections.values()
    config = LoraConfig(
        r=r,
        lora_alpha=problem.scaling * r,
        target_modules=[],
        target_parameters=[f"experts.{projection.weight}" for projection in projections],
        lora_dropout=0.0,
    )
    model = get_peft_model(transformers_block(problem), config)
    found = peft_parameters(model)
    adapter = {}
    for side in ("lora_A", "lora_B"):
        for name, projection in problem.layout.projections.items():
            stem = projection.weight.removesuffix("_proj")
            adapter[f"{side}.{name}"] = found[f"experts.{side}.{stem}"]
    with torch.no_grad():
        for name, parameter in adapter.items():
            value = problem.adapter[name]
            if "lora_B" in name:
                value = to_rank_major(value, r)
            parameter.copy_(value)
    if applied:
        apply_to(model)
    return Route(model.base_model.model, adapter, rank_major=True)


def apply_to(model: nn.Module) -> None:
    """What `apply_to_peft()` does to every model, to one: the models beside it stay PEFT's own."""
    with apply_to_peft():
        forward = ParamWrapper.forward
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            module.forward = MethodType(forward, module)


def low_rank(
    rows: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, ends: torch.Tensor
) -> torch.Tensor:
    """B[e] A[e] x[m], unscaled: [M, N].

    Args:
        rows: [M, K] in expert order.
        lora_A, lora_B: [r*E, K] and [N, r*E], expert-major.
        ends: [E] int32; the rows of expert e end at ends[e].
    """
    E = len(ends)
    A = lora_A.to(rows.dtype).unflatten(0, (E, -1))  # [E, r, K]
    B = lora_B.to(rows.dtype).unflatten(1, (E, -1)).permute(1, 2, 0).contiguous()  # [E, r, N]
    xa = F.grouped_mm(rows, A.transpose(1, 2), offs=ends)  # [M, K] @ [K, r] -> [M, r]
    return F.grouped_mm(xa, B, offs=ends)  # [M, r] @ [r, N] -> [M, N]


def torch_route(problem: Problem) -> Route:
    """What one writes by hand: the base product, the update beside it, one operation a step."""
    case = problem.case
    adapter = {name: p.clone().requires_grad_() for name, p in problem.adapter.items()}

    def linear(
        rows: torch.Tensor, name: str, expert: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        weight = problem.weights[name].transpose(1, 2)
        update = low_rank(rows, adapter[f"lora_A.{name}"], adapter[f"lora_B.{name}"], ends)
        y = F.grouped_mm(rows, weight, offs=ends) + problem.scaling * update
        if name in problem.biases:
            y = y + problem.biases[name][expert]
        return y

    def forward(
        x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        expert, order = top_k_index.flatten().sort()
        experts = torch.arange(case.E, device=x.device)
        ends = torch.searchsorted(expert, experts, right=True, out_int32=True)
        act = problem.activation(linear(x[order // case.top_k], "gate_up", expert, ends))
        y = linear(act, "down", expert, ends) * top_k_weights.flatten()[order, None]
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=x.device)
        return y[inverse].view(*top_k_index.shape, -1).sum(1)

    return Route(forward, adapter)


ROUTES: dict[str, Callable[[Problem], Route]] = {
    "moe_lora": moe_lora_route,
    "moe_lora-recompute": partial(moe_lora_route, recompute=True),
    "moe_lora-torch": partial(moe_lora_route, backend="torch"),
    "moe_lora-materialize": partial(moe_lora_route, backend="materialize"),
    "peft": peft_route,
    "peft-applied": partial(peft_route, applied=True),
    "torch": torch_route,
    "base": base_route,
    "frozen": frozen_route,
}
# the routes without an adapter
WITHOUT_ADAPTER = ("base", "frozen")
