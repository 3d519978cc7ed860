"""One call of experts whose parameters PEFT's `ParamWrapper`s adapt: W[e] + scaling * B[e] A[e].

PEFT wraps an experts module once for each targeted parameter, so the wrappers are nested. PEFT's
own forward writes W + scaling * B A for all experts. `read_call` collects A and B of all wrappers
instead, and `ExpertsCall.run` computes the module with them.

Legend:
    E experts; r rank of one update; K in- and N out-features of a projection
    lora_A: [r*E, K] in PEFT as here, expert-major: rows e*r up to (e + 1)*r are A[e].
    lora_B: [N, r*E]; in PEFT rank-major: column j*E + e is column j of B[e].
"""

import threading
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from torch.nn.utils import parametrize

from ..experts.decoding import parametrizations
from ..experts.layout import ExpertsLayout, is_experts
from ..experts.stored import UnsupportedExperts
from ..functional import Projection, rank_to_expert_major
from ..layers import own
from ..layers.dispatch import AdaptedExpertsConfig, shared_config
from ..layers.frozen import is_update_of_peft
from ..layers.known import known_layout, layout_of
from ..layers.parts import children, is_plain, weight_and_bias
from ..layers.projections import factor_of
from ..ops import QuantizedWeight
from . import counting
from .left import Expected, LeftToPeft, NotAtWork, Unlogged
from .tracing import check_prepared

# experts module -> what a thread holds while it calls the module, because a call changes its config
_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


@dataclass
class ExpertsCall:
    """One call of an experts module with the active adapters of its wrappers.

    Attributes:
        module: the experts module.
        layout: layout of the module.
        projections: name -> the projection with its A and B.
        parameters: the parameters that the module had when its projections were read.
        computed: whether the module's forward has asked for the output.
    """

    module: nn.Module
    layout: ExpertsLayout
    projections: Mapping[str, Projection]
    parameters: Mapping[str, nn.Parameter | None]
    computed: bool = False

    def run(self, *rows: torch.Tensor) -> torch.Tensor:
        """Call the module, so that its hooks run too; its forward calls `compute`.

        Args:
            rows: hidden_states [T, H], top_k_index [T, top_k] and top_k_weights [T, top_k].
        Returns: [T, H], dtype of hidden_states.
        Raises:
            LeftToPeft: if the module computed its output without `compute`, or with other weights
                than those that were read.
        """
        # nn.Module annotates every attribute as a tensor or a module
        module: Any = self.module
        with _alone(module):
            config = shared_config(module, self.layout)
            # not an assignment, because nn.Module looks for modules and parameters in each
            attributes = module.__dict__
            attributes["config"] = AdaptedExpertsConfig(config, self)
            try:
                out = module(*rows)
            finally:
                attributes["config"] = config
        if not self.computed:
            raise LeftToPeft(
                f"{type(module).__name__}.forward was replaced, and no longer looks up an experts "
                "implementation"
            )
        return out

    def replaces_own(self) -> bool:
        return True

    def compute(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """As `MoELoraLayer.compute`."""
        self.computed = True
        # what divides or fetches weights may run around the module's forward
        if any(module._parameters.get(name) is not p for name, p in self.parameters.items()):
            raise LeftToPeft(f"a hook changes the weights of {type(module).__name__} in each call")
        if not torch.compiler.is_compiling():
            counting.note(module, hidden_states.device)
        return own.compute(
            module,
            self.layout,
            (hidden_states, top_k_index, top_k_weights),
            self.projections["gate_up"],
            self.projections["down"],
        )


def _alone(module: nn.Module) -> AbstractContextManager[Any]:
    """Within this context no other thread calls the module."""
    if torch.compiler.is_compiling():
        # a graph has the call, and not the change of the config
        return nullcontext()
    return _locks.setdefault(module, threading.RLock())


def read_call(wrapper: ParamWrapper, *rows: Any, **others: Any) -> ExpertsCall:
    """The call that the outermost wrapper of a module was given.

    Args:
        wrapper: the outermost wrapper.
        rows: positional arguments of the call.
        others: its keyword arguments.
    Raises:
        LeftToPeft: if PEFT's own code has to compute it.
    """
    wrappers, module = _nested(wrapper)
    _check_is_whole(module)
    _check_at_work(wrappers)
    if torch.compiler.is_compiling():
        check_prepared(wrapper)
    try:
        layout = _layout_of(module)
        _check_rows(module, rows, others)
        return _call_of(wrappers, module, layout, rows[0])
    except UnsupportedExperts as error:
        raise LeftToPeft(str(error)) from error


def _call_of(
    wrappers: list[ParamWrapper], module: nn.Module, layout: ExpertsLayout, x: torch.Tensor
) -> ExpertsCall:
    projections = {}
    for name in layout.projections:
        projections[name] = _base(module, layout, name, x)
    for wrapper in wrappers:
        stored = layout.projection_storing(wrapper.parameter_name)
        if stored is None:
            raise LeftToPeft(
                f"{wrapper.parameter_name} of {type(module).__name__} is no projection's weight"
            )
        projections[stored] = _adapted(projections[stored], wrapper, layout, stored)
    if all(projection.lora_A is None for projection in projections.values()):
        raise NotAtWork("no adapter of these experts is active")
    return ExpertsCall(module, layout, projections, dict(module._parameters))


def _nested(wrapper: ParamWrapper) -> tuple[list[ParamWrapper], nn.Module]:
    """A wrapper and those in it, and the module that they wrap."""
    wrappers = []
    inner: Any = wrapper
    while isinstance(inner, ParamWrapper):
        wrappers.append(inner)
        inner = inner._modules["base_layer"]
    # as PEFT finds the module that layers of any kind wrap
    if "base_layer" in inner._modules:
        raise LeftToPeft(f"the experts have another adapter too, in a {type(inner).__name__}")
    return wrappers, inner


def _check_is_whole(module: nn.Module) -> None:
    """Raise if PEFT's own code has added an update to a weight of the module.

    It does so while it computes a call, and then the wrapper outside has logged the reason.
    """
    if not parametrize.is_parametrized(module):
        return
    for name in cast(nn.ModuleDict, module.parametrizations):
        first, *others = parametrizations(module, name)
        if is_update_of_peft(first):
            raise Unlogged("the wrapper outside is left to PEFT")
        if any(is_update_of_peft(other) for other in others):
            # peft 0.21; drop when PEFT removes its _LoraFactorsProxy from quantized weights
            raise LeftToPeft(
                f"PEFT has computed {type(module).__name__} before, and left its update in the "
                f"quantized {name}, where it counts again in every call: load the model again, and "
                "call apply_to_peft() before the first forward"
            )


def _check_at_work(wrappers: list[ParamWrapper]) -> None:
    disabled = any(wrapper.disable_adapters for wrapper in wrappers)
    merged = any(wrapper.merged for wrapper in wrappers)
    if disabled and merged:
        raise Expected("the adapters are disabled, and were merged: PEFT unmerges them")
    if disabled:
        raise NotAtWork("the adapters are disabled")
    if merged:
        raise NotAtWork("the adapters are merged")


def _layout_of(module: nn.Module) -> ExpertsLayout:
    layout = known_layout(module)
    if layout is None:
        if not is_experts(module):
            raise Expected(f"{type(module).__name__} is no experts module")
        layout = layout_of(module)
    if not layout.decorated:
        raise LeftToPeft(f"{type(module).__name__} is not on transformers' experts interface")
    if layout.num_experts == 1:
        raise LeftToPeft("there is a single expert, which PEFT adapts as a linear layer")
    return layout


def _check_rows(module: nn.Module, rows: tuple[Any, ...], others: Mapping[str, Any]) -> None:
    """Raise unless a call has the three positional tensors of transformers' experts interface."""
    is_usual = len(rows) == 3 and not others and all(isinstance(t, torch.Tensor) for t in rows)
    if not is_usual or rows[0].ndim != 2:
        raise LeftToPeft(
            f"{type(module).__name__} was not called as "
            "experts(hidden_states [T, H], top_k_index, top_k_weights)"
        )


def _base(module: nn.Module, layout: ExpertsLayout, name: str, x: torch.Tensor) -> Projection:
    """A projection without an adapter, if its weight is one that PEFT adds its update to."""
    _check_stored(module, layout, name)
    weight = layout.weight(module, name)
    bias = layout.bias(module, name)
    why = None
    if weight.device != x.device:
        why = f"is on {weight.device}, its input on {x.device}"
    elif weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        why = f"is {weight.dtype}, its input {x.dtype}"
    elif torch.is_grad_enabled():
        if any(isinstance(t, torch.Tensor) and t.requires_grad for t in (weight, bias)):
            why = "or its bias is trained itself"
    if why is not None:
        raise LeftToPeft(f"{_named(module, layout, name)} {why}")
    return Projection(weight, bias)


def _named(module: nn.Module, layout: ExpertsLayout, name: str) -> str:
    """The weight of a projection, for a message."""
    return f"{type(module).__name__}.{layout.projection(name).weight}"


def _check_stored(module: nn.Module, layout: ExpertsLayout, name: str) -> None:
    """Raise unless this process holds the whole weight, dense or quantized as a parametrization."""
    projection = layout.projection(name)
    stored = layout.stored(module, projection.weight)
    whole = (layout.num_experts, projection.out_features, projection.in_features)
    if projection.transposed:
        whole = (layout.num_experts, projection.in_features, projection.out_features)
    why = None
    if isinstance(stored, QuantizedWeight):
        if not parametrize.is_parametrized(module, projection.weight):
            why = f"holds {stored.format} codes, to which PEFT adds its update"
    elif not is_plain(stored):
        why = f"is a {type(stored).__name__}"
    elif stored.shape != whole:
        why = f"{list(stored.shape)} is a part of {list(whole)}, which several processes share"
    if why is not None:
        raise LeftToPeft(f"{_named(module, layout, name)} {why}")


def _adapted(
    base: Projection, wrapper: ParamWrapper, layout: ExpertsLayout, name: str
) -> Projection:
    """A projection with the active adapters of its wrapper."""
    adapters = children(wrapper, "lora_A")
    active = [adapter for adapter in wrapper.active_adapters if adapter in adapters]
    if not active:
        return base
    pairs = [_pair(wrapper, adapter, layout, name, base.weight.device) for adapter in active]
    scalings = [factor_of(wrapper.scaling[adapter]) for adapter in active]
    if len(active) > 1 or isinstance(scalings[0], torch.Tensor):
        return _with_several(base, pairs, scalings, layout.num_experts)
    ((A, B),) = pairs
    return Projection(base.weight, base.bias, A, B, scalings[0], rank_major=True)


def _with_several(
    base: Projection,
    pairs: list[tuple[torch.Tensor, torch.Tensor]],
    scalings: list[float | torch.Tensor],
    num_experts: int,
) -> Projection:
    """A projection with several adapters, concatenated along their ranks.

    [B1 B2] [A1; A2] = B1 A1 + B2 A2. The scaling of each is multiplied into its B.
    """
    # [r*E, K] -> [E, r, K]
    As = [A.reshape(num_experts, -1, A.shape[1]) for A, _ in pairs]
    # [N, E, r]
    Bs = [rank_to_expert_major(B, num_experts) for _, B in pairs]
    scaled = [scaling * B for scaling, B in zip(scalings, Bs, strict=True)]
    return base._replace(
        lora_A=torch.cat(As, dim=1).flatten(0, 1),
        lora_B=torch.cat(scaled, dim=2).flatten(1),
    )


def _pair(
    wrapper: ParamWrapper, adapter: str, layout: ExpertsLayout, name: str, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [r*E, K] and B [N, r*E], rank-major, if the adapter is plain LoRA of the projection."""
    projection = layout.projection(name)
    A, _ = weight_and_bias(children(wrapper, "lora_A")[adapter])
    B, B_bias = weight_and_bias(children(wrapper, "lora_B")[adapter])
    is_only_lora = (
        adapter not in wrapper.lora_variant
        and B_bias is None
        and isinstance(children(wrapper, "lora_dropout")[adapter], nn.Identity)
    )
    if not is_only_lora:
        raise LeftToPeft(f"adapter {adapter!r} is more than B A: it has a variant, bias or dropout")
    # releases of PEFT without this attribute exchange the sides of a weight [E, N, K]
    swapped = getattr(wrapper, "_did_swap_in_out_features", None)
    ranks = wrapper.r[adapter] * layout.num_experts
    expected = ((ranks, projection.in_features), (projection.out_features, ranks))
    if swapped != (not projection.transposed) or (A.shape, B.shape) != expected:
        raise LeftToPeft(
            f"A {list(A.shape)} and B {list(B.shape)} of {wrapper.parameter_name} are not those of "
            f"{layout.num_experts} experts with K={projection.in_features} and "
            f"N={projection.out_features}"
        )
    for side, tensor in (("A", A), ("B", B)):
        if not is_plain(tensor) or tensor.device != device:
            raise LeftToPeft(
                f"{side} of {wrapper.parameter_name} is a {type(tensor).__name__} on "
                f"{tensor.device}, the experts are on {device}"
            )
    return A, B
