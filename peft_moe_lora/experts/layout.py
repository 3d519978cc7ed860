"""How an experts module stores its weights and what it computes, and which modules are routers, read from the modules.

transformers' experts interface gives most classes the same attributes (`has_gate`, `is_transposed`, ...); where they
are missing, the shapes tell, or the class's row in `families`. What `_apply_gate` computes is found by running it on
a few numbers, not by its name.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..ops import Activation
from ..ops.activation import KINDS
from ..ops.quantized import QuantizedWeight
from .families import FAMILIES, Family
from .stored import FLOATS, UnsupportedExperts, is_stacked, stored_weight

# the two of an experts module, which a configuration may choose from
PROJECTIONS = ("gate_up", "down")
# and the one of a module that is one projection alone, in the order of files
EVERY_PROJECTION = (*PROJECTIONS, "linear")

# modules that hold routed experts in a form of their own, and what is missing to adapt them
NOT_YET = {
    "Mxfp4GptOssExperts": 'its packed weights are laid out for a kernel of its own; load_quantized with "mxfp4" keeps '
    "them as they are published",
}

# routers that read the weight of a linear layer and never call it, so that nothing around the layer has a say
READ_NOT_CALLED = {"LongcatFlashTopkRouter": "classifier"}


@dataclass(frozen=True)
class ProjectionLayout:
    """One projection of every expert.

    Attributes:
        weights: names of the parameters that, one below another, are the N rows; one in most families. Each is
            [E, n, K], [E, K, n] where transposed, or [E * n, K]; what lies beyond the E experts belongs to none.
        bias: name of the [E, N] bias parameter, or None.
        in_features: K.
        out_features: N.
        transposed: whether the last two dimensions are stored the other way round.
    """

    weights: tuple[str, ...]
    bias: str | None
    in_features: int
    out_features: int
    transposed: bool = False

    @property
    def weight(self) -> str:
        """Name of the parameter, the first of several."""
        return self.weights[0]


@dataclass(frozen=True)
class ExpertsLayout:
    """What the adapter has to know of an experts module.

    Attributes:
        num_experts: E.
        projections: "gate_up" into the experts, N = 2I where gated, and "down" out of them; where a module is one
            projection alone, "linear".
        gated: whether the pre-activation holds a gate and an up half.
        activation: the fused form of what stands between the projections; None: the module's own code runs there.
        decorated: whether the class dispatches through transformers' experts interface.
        family: how the module is called, where that is not experts(hidden_states, top_k_index, top_k_weights).
    """

    num_experts: int
    projections: Mapping[str, ProjectionLayout]
    gated: bool
    activation: Activation | None
    decorated: bool
    family: Family | None = None

    @property
    def gate_up(self) -> ProjectionLayout:
        return self.projections["gate_up"]

    @property
    def down(self) -> ProjectionLayout:
        return self.projections["down"]

    @property
    def first(self) -> ProjectionLayout:
        """What hidden states go into."""
        return next(iter(self.projections.values()))

    @property
    def last(self) -> ProjectionLayout:
        """What comes out of it leaves the module."""
        return [*self.projections.values()][-1]

    @property
    def transposed(self) -> bool:
        """Whether the weights into the experts are stored [E, K, N]."""
        return self.first.transposed

    def projection(self, name: str) -> ProjectionLayout:
        return self.projections[name]

    def targeted(self, target_projections: list[str]) -> list[str]:
        """The projections a configuration means here; a module that is one alone is chosen by its own name."""
        return [
            name
            for name in self.projections
            if name in target_projections or len(self.projections) == 1
        ]

    def parts(self, module: nn.Module, name: str) -> tuple[torch.Tensor | QuantizedWeight, ...]:
        """[E, n, K] views of a projection's parameters, one below another its N rows, however they are stored."""
        layout = self.projections[name]
        stacks = [self._stack(self.stored(module, weight)) for weight in layout.weights]
        return tuple(w.transpose(1, 2) if layout.transposed else w for w in stacks)

    def stored(self, module: nn.Module, weight: str) -> torch.Tensor | QuantizedWeight:
        """A parameter as it is stored, never decoded; those of a family's own form are dense."""
        return stored_weight(module, weight) if self.family is None else attrgetter(weight)(module)

    def _stack(self, weight: torch.Tensor | QuantizedWeight) -> torch.Tensor | QuantizedWeight:
        if weight.ndim == 2:
            return weight.unflatten(0, (self.num_experts, -1))
        return weight if weight.shape[0] == self.num_experts else weight[: self.num_experts]

    def weight(self, module: nn.Module, name: str) -> torch.Tensor | QuantizedWeight:
        """[E, N, K] view of a projection that is one parameter; not decoded where it is quantized."""
        (weight,) = self.parts(module, name)
        return weight

    def bias(self, module: nn.Module, name: str) -> torch.Tensor | None:
        """[E, N] bias of a projection, or None."""
        bias = self.projections[name].bias
        return None if bias is None else getattr(module, bias)


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds routed experts, supported or not."""
    # three stacks hold experts that every token passes, as inkling's shared ones: they take no expert ids
    return type(module).__name__ in {*FAMILIES, *NOT_YET} or (
        is_stacked(module, "down_proj")
        and (is_stacked(module, "gate_up_proj") or is_stacked(module, "up_proj"))
        and not is_stacked(module, "gate_proj")
    )


def is_router(module: nn.Module, parent: nn.Module | None = None) -> bool:
    """Whether the module multiplies by a 2-D weight in a forward of its own, as routers do by their [E, H].

    Such a weight is a bare parameter of a class that is no linear layer; or the module is a linear layer whose class
    has another forward (phimoe, llama4): then it counts as a router where its parent holds experts beside it.
    """
    if isinstance(module, nn.Linear):
        beside = () if parent is None else parent.children()
        return type(module).forward is not nn.Linear.forward and any(
            is_experts(getattr(sibling, "base_layer", sibling)) for sibling in beside
        )
    weight = getattr(module, "weight", None)
    other = isinstance(module, nn.Embedding | Conv1D) or hasattr(module, "in_features")
    return (
        not other
        and isinstance(weight, nn.Parameter)
        and weight.is_floating_point()
        and weight.ndim == 2
    )


def linear_features(module: nn.Module) -> tuple[int, int] | None:
    """(in-features, out-features) of a linear layer, an embedding or a router; None of any other module."""
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return module.in_features, module.out_features
    return (module.weight.shape[1], module.weight.shape[0]) if is_router(module) else None


def read_layout(module: nn.Module) -> ExpertsLayout:
    """The layout of an experts module; reads shapes and attributes, never the weights.

    Raises:
        UnsupportedExperts: naming the class and what is missing.
    """
    name = type(module).__name__
    if name in NOT_YET:
        raise UnsupportedExperts(
            f"{name} is not supported yet: {NOT_YET[name]}. Take it out of target_modules."
        )
    if name in FAMILIES:
        return _read_family(module, FAMILIES[name])
    gated = getattr(module, "has_gate", is_stacked(module, "gate_up_proj"))
    up_name = "gate_up_proj" if gated else "up_proj"
    if not (is_stacked(module, up_name) and is_stacked(module, "down_proj")):
        raise UnsupportedExperts(
            f"{name} has no 3-D {up_name} and down_proj parameters, so its experts cannot be told apart; "
            "take it out of target_modules."
        )
    up, down = stored_weight(module, up_name), stored_weight(module, "down_proj")
    decorated = hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    if not decorated:
        _check_signature(module)
    transposed = module.is_transposed if decorated else _is_transposed(name, up, down, gated)
    (E, N, K), (_, H, width) = (
        t.transpose(1, 2).shape if transposed else t.shape for t in (up, down)
    )
    if (H, N) != (K, 2 * width if gated else width):
        raise UnsupportedExperts(
            f"{name} needs {up_name} [E, {'2I' if gated else 'I'}, H] and down_proj [E, H, I]"
            f"{' transposed' if transposed else ''}; got {tuple(up.shape)} and {tuple(down.shape)}."
        )
    has_bias = getattr(module, "has_bias", getattr(module, f"{up_name}_bias", None) is not None)
    return ExpertsLayout(
        num_experts=E,
        projections={
            "gate_up": ProjectionLayout(
                (up_name,), f"{up_name}_bias" if has_bias else None, K, N, transposed
            ),
            "down": ProjectionLayout(
                ("down_proj",), "down_proj_bias" if has_bias else None, width, H, transposed
            ),
        },
        gated=gated,
        activation=None
        if getattr(module, "has_post_expert_norm", False)
        else fused_activation(module, gated),
        decorated=decorated,
    )


def _read_family(module: nn.Module, family: Family) -> ExpertsLayout:
    taken = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if taken != family.arguments:
        raise UnsupportedExperts(
            f"{type(module).__name__}.forward takes {taken}, not {family.arguments} as in transformers, so it is "
            "another class of that name. Take it out of target_modules."
        )
    names = [name for weights in family.weights.values() for name in weights]
    _check_dtypes(module, *names)
    # the last projection's parameter has rows of the E experts alone; a 2-D one does not tell how many they are
    stack = attrgetter(names[-1])(module)
    E = module.num_experts if stack.ndim == 2 else stack.shape[0]
    projections = {}
    for name, weights in family.weights.items():
        shapes = [attrgetter(weight)(module).shape for weight in weights]
        sizes = [
            (shape[0] // E, shape[1]) if len(shape) == 2 else tuple(shape[1:]) for shape in shapes
        ]
        sizes = [(n, K) if name not in family.transposed else (K, n) for n, K in sizes]
        rows = sum(n for n, _ in sizes)
        projections[name] = ProjectionLayout(
            weights, None, sizes[0][1], rows, name in family.transposed
        )
    gated = "gate_up" in projections
    # an activation is fused with one product, and runs between the products where gate and up are two
    fused = gated and len(family.weights["gate_up"]) == 1
    return ExpertsLayout(
        num_experts=E,
        projections=projections,
        gated=gated,
        activation=fused_activation(module, gated) if fused else None,
        decorated=False,
        family=family,
    )


def _check_dtypes(module: nn.Module, *names: str) -> None:
    for name in names:
        dtype = attrgetter(name)(module).dtype
        if dtype not in FLOATS:
            raise UnsupportedExperts(
                f"{type(module).__name__}.{name} is stored as {dtype}; adapters need fp32, bf16 or fp16 experts: "
                "load the model dequantized."
            )


def own_activation(module: nn.Module, gated: bool):
    """The module's own [M, N] -> [M, I] between its projections."""
    if gated and hasattr(module, "_apply_gate"):
        return module._apply_gate
    family = FAMILIES.get(type(module).__name__)
    act_fn = attrgetter("act_fn" if family is None else family.act_fn)(module)
    if not gated:
        return act_fn

    def act_times_up(pre: torch.Tensor) -> torch.Tensor:
        gate, up = pre.chunk(2, dim=-1)
        return act_fn(gate) * up

    return act_times_up


def fused_activation(module: nn.Module, gated: bool) -> Activation | None:
    """The `Activation` that computes what the module computes, or None; decided on numbers, not on names.

    The probe covers both sides of the module's clamp, so that an unclamped candidate cannot pass for a clamped one.
    """
    act_fn = getattr(module, "act_fn", None)
    if isinstance(act_fn, nn.Module) and next(act_fn.parameters(), None) is not None:
        return None  # an activation that learns is the model's own business
    limit = _first_float(module, "limit", "swiglu_limit")
    alpha = _first_float(module, "alpha", "swiglu_alpha")
    reach = 8.0 if limit is None or limit > 1e4 else 1.5 * limit
    probe = torch.linspace(-reach, reach, 24, dtype=torch.float64, device="cpu")
    if gated:
        # every gate value meets every up value, in two columns each: [g0, g1, u0, u1] also tells interleaved from not
        first = torch.cartesian_prod(probe, probe)
        probe = torch.stack((first, first.roll(7, 0)), -1).flatten(1)
    else:
        probe = probe[:, None]
    with torch.no_grad():
        own = _probe(own_activation(module, gated), probe)
        return next(
            (
                c
                for c in _candidates(gated, limit, alpha)
                if own is not None and _agree(own, c(probe))
            ),
            None,
        )


def _probe(activation, probe: torch.Tensor) -> torch.Tensor | None:
    """What a module's activation makes of the probe; None where it does not run on two columns of fp64 on the CPU."""
    try:
        own = activation(probe.clone())
    except (RuntimeError, TypeError, AttributeError, NotImplementedError):
        return None
    return own if isinstance(own, torch.Tensor) else None


def _candidates(gated: bool, limit: float | None, alpha: float | None) -> list[Activation]:
    if not gated:
        return [Activation(kind, gated=False) for kind in KINDS]
    limits = [None] if limit is None else [None, limit]
    found = [
        Activation(kind, interleaved=i, limit=bound)
        for i in (False, True)
        for bound in limits
        for kind in KINDS
    ]
    if alpha is not None:
        found += [
            Activation("silu", True, i, bound, alpha, up_shift=1.0)
            for i in (False, True)
            for bound in limits
        ]
    return found


def _agree(own: torch.Tensor, candidate: torch.Tensor) -> bool:
    # 1e-5: a module may compute in fp32 inside, whatever it is given
    return own.shape == candidate.shape and torch.allclose(
        own.double(), candidate, rtol=1e-5, atol=1e-5
    )


def _first_float(module: nn.Module, *names: str) -> float | None:
    found = (getattr(module, name, None) for name in names)
    return next((float(value) for value in found if isinstance(value, int | float)), None)


def _is_transposed(name: str, up: torch.Tensor, down: torch.Tensor, gated: bool) -> bool:
    factor = 2 if gated else 1
    plain = up.shape[1] == factor * down.shape[2] and up.shape[2] == down.shape[1]
    transposed = up.shape[2] == factor * down.shape[1] and up.shape[1] == down.shape[2]
    if plain == transposed:
        raise UnsupportedExperts(
            f"{name} does not say whether its weights are transposed and the shapes {tuple(up.shape)} and "
            f"{tuple(down.shape)} do not tell; set is_transposed on the module."
        )
    return transposed


def _check_signature(module: nn.Module) -> None:
    parameters = inspect.signature(type(module).forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][
        1:
    ]
    if len(positional) < 3:
        raise UnsupportedExperts(
            f"{type(module).__name__}.forward takes {[p.name for p in positional]}; adapters ride on experts called "
            "as experts(hidden_states, top_k_index, top_k_weights). Take it out of target_modules."
        )
