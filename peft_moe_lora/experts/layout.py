"""How an experts module stores its weights and what it computes, read from the module.

transformers' experts interface gives most classes the same attributes: `has_gate`, `is_transposed`
and others. For a class without these attributes, the layout follows from the shapes of its
parameters, or from its row in `FAMILIES`.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import nn

from ..ops import Activation
from ..ops.quantized import QuantizedWeight
from .activation import fused_activation
from .families import FAMILIES, LIGER, NOT_YET, Family
from .stored import FLOATS, UnsupportedExperts, Weight, is_stacked, shape_of, stored_weight

# the projections of an experts module, which a configuration can choose from
PROJECTIONS = ("gate_up", "down")
# all projections, in the order of adapter files; a "linear" is the only projection of its module
EVERY_PROJECTION = (*PROJECTIONS, "linear")


@dataclass(frozen=True)
class ProjectionLayout:
    """One projection of every expert.

    Attributes:
        weights: names of the parameters; one in most families. Their rows, concatenated in this
            order, are the N rows. Each is [E, n, K], or [E, K, n] if transposed; in a 2-D
            parameter, the first two of these dimensions are flattened into one. Entries of a
            parameter after the E experts are not part of the projection.
        bias: name of the [E, N] bias parameter, or None.
        in_features: K.
        out_features: N.
        transposed: whether the parameters are stored as [E, K, n].
    """

    weights: tuple[str, ...]
    bias: str | None
    in_features: int
    out_features: int
    transposed: bool = False

    @property
    def weight(self) -> str:
        """Name of the parameter; if there are several, of the first one."""
        return self.weights[0]


@dataclass(frozen=True)
class ExpertsLayout:
    """What an adapter needs to know about an experts module.

    Attributes:
        num_experts: E.
        projections: name -> layout, in the order in which they are computed: "gate_up" (N = 2I if
            gated, else I) and "down"; or "linear", if the module is a single projection.
        gated: whether the pre-activation consists of a gate half and an up half.
        decorated: whether the class dispatches through transformers' experts interface.
        family: the class's row in `FAMILIES`; None if the module is called as
            experts(hidden_states, top_k_index, top_k_weights) and stores its weights as stacks.
        activation: the fused activation between the projections; None if the module's own code
            has to run instead.
    """

    num_experts: int
    projections: Mapping[str, ProjectionLayout]
    gated: bool
    decorated: bool
    family: Family | None = None
    activation: Activation | None = None

    @property
    def gate_up(self) -> ProjectionLayout:
        return self.projections["gate_up"]

    @property
    def down(self) -> ProjectionLayout:
        return self.projections["down"]

    @property
    def first(self) -> ProjectionLayout:
        """The projection that takes the hidden states."""
        return next(iter(self.projections.values()))

    @property
    def last(self) -> ProjectionLayout:
        """The projection whose output the module returns."""
        return list(self.projections.values())[-1]

    @property
    def transposed(self) -> bool:
        """Whether the first projection is stored as [E, K, N]."""
        return self.first.transposed

    @property
    def projection_of(self) -> dict[str, str]:
        """Name of each parameter that holds weights -> its projection."""
        return {
            weight: name
            for name, projection in self.projections.items()
            for weight in projection.weights
        }

    def projection(self, name: str) -> ProjectionLayout:
        return self.projections[name]

    def projection_storing(self, parameter: str) -> str | None:
        """The name of the projection that a parameter belongs to; None if it belongs to none.

        Args:
            parameter: name of a parameter of the experts module, as "gate_up_proj".
        """
        for name, projection in self.projections.items():
            if parameter in projection.weights:
                return name
        return None

    def targeted(self, target_projections: list[str]) -> list[str]:
        """The projections that get an adapter.

        Args:
            target_projections: names from PROJECTIONS. A module that is a single projection ignores
                them: its projection always gets an adapter.
        """
        if len(self.projections) == 1:
            return list(self.projections)
        return [name for name in self.projections if name in target_projections]

    def parts(self, module: nn.Module, name: str) -> tuple[Weight, ...]:
        """The parameters of a projection as [E, n, K] views, also if they are stored otherwise.

        Their rows, concatenated, are the N rows. A quantized parameter is not decoded.
        """
        layout = self.projections[name]
        found = []
        for parameter in layout.weights:
            stack = self._stack(self.stored(module, parameter))
            if layout.transposed:
                stack = stack.transpose(1, 2)
            found.append(stack)
        return tuple(found)

    def stored(self, module: nn.Module, parameter: str) -> Weight:
        """A parameter as it is stored; a quantized parameter is not decoded."""
        if self.family is None:
            return stored_weight(module, parameter)
        # `read_layout` has checked that the parameters of a family are dense
        return attrgetter(parameter)(module)

    def weight(self, module: nn.Module, name: str) -> Weight:
        """[E, N, K] view of a projection with one parameter, which is not decoded if quantized."""
        (weight,) = self.parts(module, name)
        return weight

    def bias(self, module: nn.Module, name: str) -> torch.Tensor | None:
        """[E, N] bias of a projection, or None."""
        bias = self.projections[name].bias
        if bias is None:
            return None
        return getattr(module, bias)

    def _stack(self, weight: Weight) -> Weight:
        """The E experts of a parameter, [E, rows, columns] as stored."""
        if isinstance(weight, QuantizedWeight):
            return weight
        if weight.ndim == 2:
            return weight.unflatten(0, (self.num_experts, -1))
        if weight.shape[0] == self.num_experts:
            return weight
        return weight[: self.num_experts]


def is_experts(module: nn.Module) -> bool:
    """Whether the module holds routed experts, supported or not."""
    name = type(module).__name__
    if name in FAMILIES or name in NOT_YET:
        return True
    # a module with three stacks holds shared experts (inkling): it gets no expert ids
    if not is_stacked(module, "down_proj") or is_stacked(module, "gate_proj"):
        return False
    return is_stacked(module, "gate_up_proj") or is_stacked(module, "up_proj")


def read_layout(module: nn.Module) -> ExpertsLayout:
    """The layout of an experts module, from its attributes and shapes; weights are not read.

    Raises:
        UnsupportedExperts: if the module is not supported. The message names its class and what is
            missing.
    """
    name = type(module).__name__
    if name in NOT_YET:
        raise UnsupportedExperts(
            f"{name} is not supported yet: {NOT_YET[name]}. Take it out of target_modules."
        )
    if type(module).__module__.startswith(LIGER):
        raise UnsupportedExperts(
            f"{name} stands in place of the model's own experts, because liger-kernel has replaced "
            "their class. Build the model before Liger's kernels are applied, or apply them with "
            "swiglu=False."
        )
    if name in FAMILIES:
        layout = _read_family(module, FAMILIES[name])
    else:
        layout = _read_stacks(module)
    return with_activation(layout, module)


def with_activation(layout: ExpertsLayout, module: nn.Module) -> ExpertsLayout:
    """The layout of a module with the activation that the module has now."""
    activation = None
    # if gate and up are two parameters, they are two products, and the activation runs after both
    one_product = len(layout.first.weights) == 1
    # if the experts' outputs are normalized, the module's own code runs between the projections
    normalized = getattr(module, "has_post_expert_norm", False)
    if "gate_up" in layout.projections and one_product and not normalized:
        activation = fused_activation(module, layout.gated)
    return replace(layout, activation=activation)


def _read_stacks(module: nn.Module) -> ExpertsLayout:
    """The layout of experts stored as two stacks, on transformers' experts interface or not."""
    name = type(module).__name__
    gated = getattr(module, "has_gate", is_stacked(module, "gate_up_proj"))
    up_name = "up_proj"
    if gated:
        up_name = "gate_up_proj"
    if not (is_stacked(module, up_name) and is_stacked(module, "down_proj")):
        raise UnsupportedExperts(
            f"{name} needs 3-D parameters {up_name} and down_proj with one matrix for each expert, "
            "but has no such parameters; take it out of target_modules."
        )
    up = shape_of(stored_weight(module, up_name))
    down = shape_of(stored_weight(module, "down_proj"))
    decorated = hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    if decorated:
        transposed = bool(module.is_transposed)
    else:
        _check_signature(module)
        transposed = _is_transposed(name, up, down, gated)
    E, N, K = _rows_first(up, transposed)
    _, H, width = _rows_first(down, transposed)
    expected_N = width
    needed = f"{up_name} [E, I, H] and down_proj [E, H, I]"
    if gated:
        expected_N = 2 * width
        needed = f"{up_name} [E, 2I, H] and down_proj [E, H, I]"
    if transposed:
        needed += ", both transposed"
    if (H, N) != (K, expected_N):
        raise UnsupportedExperts(
            f"{name} needs {needed}; got {up} and {down}. Take it out of target_modules."
        )
    finds_bias = getattr(module, f"{up_name}_bias", None) is not None
    up_bias: str | None = None
    down_bias: str | None = None
    if getattr(module, "has_bias", finds_bias):
        up_bias = f"{up_name}_bias"
        down_bias = "down_proj_bias"
    return ExpertsLayout(
        num_experts=E,
        projections={
            "gate_up": ProjectionLayout((up_name,), up_bias, K, N, transposed),
            "down": ProjectionLayout(("down_proj",), down_bias, width, H, transposed),
        },
        gated=gated,
        decorated=decorated,
    )


def _read_family(module: nn.Module, family: Family) -> ExpertsLayout:
    """The layout of a class of experts that has a row in `FAMILIES`."""
    taken = tuple(inspect.signature(type(module).forward).parameters)[1:]
    if taken != family.arguments:
        raise UnsupportedExperts(
            f"{type(module).__name__}.forward takes {taken}, but the class of this name in "
            f"transformers takes {family.arguments}, and only that class is supported. Take the "
            "module out of target_modules."
        )
    names = [name for weights in family.weights.values() for name in weights]
    _check_dtypes(module, names)
    # only the E experts have rows in the last parameter; its first dimension is E if it is 3-D
    last = shape_of(attrgetter(names[-1])(module))
    E = last[0]
    if len(last) == 2:
        E = attrgetter("num_experts")(module)
    projections = {}
    for name, weights in family.weights.items():
        transposed = name in family.transposed
        sizes = [_size(shape_of(attrgetter(weight)(module)), E, transposed) for weight in weights]
        N = sum(n for n, _ in sizes)
        _, K = sizes[0]
        projections[name] = ProjectionLayout(weights, None, K, N, transposed)
    return ExpertsLayout(
        num_experts=E,
        projections=projections,
        gated="gate_up" in projections,
        decorated=False,
        family=family,
    )


def _rows_first(shape: tuple[int, ...], transposed: bool) -> tuple[int, int, int]:
    """(E, N, K) of a stack stored as [E, N, K], or as [E, K, N] if transposed."""
    E, rows, columns = shape
    if transposed:
        return E, columns, rows
    return E, rows, columns


def _size(shape: tuple[int, ...], E: int, transposed: bool) -> tuple[int, int]:
    """(n, K) of one expert in a parameter of this shape, 3-D or 2-D [E * rows, columns]."""
    rows, columns = shape[-2:]
    if len(shape) == 2:
        rows //= E
    if transposed:
        return columns, rows
    return rows, columns


def _check_dtypes(module: nn.Module, names: list[str]) -> None:
    for name in names:
        dtype = attrgetter(name)(module).dtype
        if dtype not in FLOATS:
            raise UnsupportedExperts(
                f"{type(module).__name__}.{name} is stored as {dtype}; adapters need fp32, bf16 or "
                "fp16 experts: load the model dequantized."
            )


def _is_transposed(name: str, up: tuple[int, ...], down: tuple[int, ...], gated: bool) -> bool:
    """Whether stacks of these shapes are [E, K, N], for a module without `is_transposed`."""
    factor = 1
    if gated:
        factor = 2
    plain = up[1] == factor * down[2] and up[2] == down[1]
    transposed = up[2] == factor * down[1] and up[1] == down[2]
    if plain == transposed:
        raise UnsupportedExperts(
            f"{name} has no attribute is_transposed, and the shapes {up} and {down} do not show "
            "whether its weights are transposed; set is_transposed on the module."
        )
    return transposed


def _check_signature(module: nn.Module) -> None:
    """Raise if the forward of a class outside the interface takes fewer than three arguments."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p.name for p in parameters if p.kind in kinds]
    if len(positional) < 3:
        raise UnsupportedExperts(
            f"{type(module).__name__}.forward takes {positional}, but an adapter calls experts as "
            "experts(hidden_states, top_k_index, top_k_weights). Take it out of target_modules."
        )
