"""How a call of an experts module reaches its adapter.

A module on transformers' experts interface looks up its implementation by a name in its config.
When the module is adapted, its config is replaced by a view that names `moe_lora_experts_forward`,
and that function calls the adapter's layer. A model's own config may name it too, and then the
function computes the modules without an adapter.

A module that is not on the interface does not look up an implementation: its layer computes the
output, and the module's own forward does not run. Before that, `check_contract` compares both
outputs on the first tokens.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from ..experts.activation import own_activation
from ..experts.layout import PROJECTIONS, ExpertsLayout
from ..experts.stored import UnsupportedExperts
from ..functional import Projection, experts
from .frozen import compute_frozen
from .implementations import IMPLEMENTATION
from .replaced import take_back_forward

if TYPE_CHECKING:
    from .layer import MoELoraLayer

# rounding to bf16 changes the output by less than 2 %; a different activation or a missing factor
# changes it by more than 5 %
_CONTRACT_TOLERANCE = 0.05
# the number of tokens on which both outputs are compared
_CONTRACT_TOKENS = 4


class ComputesExperts(Protocol):
    """What computes the output of an experts module, with the adapters that are at work."""

    def replaces_own(self) -> bool: ...

    def compute(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor: ...


class AdaptedExpertsConfig:
    """A view of a model's config, for one adapted experts module.

    All modules of a model share one config, which holds the name of the experts implementation.
    Only this name differs in the view. So an adapted module dispatches to its layer, and the user
    may still set another implementation for the other modules.

    Args:
        config: the shared config; all other attributes are read from it and written to it.
        layer: the layer that adapts the module, or what computes one call in its place.
    """

    _shared: Any
    _layer: ComputesExperts

    def __init__(self, config: Any, layer: ComputesExperts) -> None:
        object.__setattr__(self, "_shared", config)
        object.__setattr__(self, "_layer", layer)

    def __getattr__(self, name: str) -> Any:
        # copying and unpickling look attributes up before `_shared` is set
        if name.startswith("__") or "_shared" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._shared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._shared, name, value)

    @property
    def _experts_implementation(self) -> str | None:
        if self._layer.replaces_own():
            return IMPLEMENTATION
        return self._shared._experts_implementation

    def __reduce__(self) -> tuple[Any, ...]:
        return _new_config_view, (), {"_shared": self._shared, "_layer": self._layer}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)


def _new_config_view() -> AdaptedExpertsConfig:
    """An empty view, which copying and unpickling fill."""
    return AdaptedExpertsConfig.__new__(AdaptedExpertsConfig)


def attach(layer: "MoELoraLayer", base_layer: nn.Module) -> None:
    """Make an experts module dispatch to its layer, if it is on transformers' interface."""
    take_back_forward(base_layer)
    if layer.layout.decorated:
        # nn.Module annotates every attribute as a tensor or a module
        module: Any = base_layer
        module.config = AdaptedExpertsConfig(shared_config(base_layer, layer.layout), layer)


def detach(base_layer: nn.Module) -> nn.Module:
    """Give an experts module its own config back, and return the module."""
    config = getattr(base_layer, "config", None)
    if isinstance(config, AdaptedExpertsConfig):
        base_layer.config = config._shared
    return base_layer


def shared_config(base_layer: nn.Module, layout: ExpertsLayout) -> Any:
    """The config that an experts module was built with; None if it is not on the interface."""
    if not layout.decorated:
        return None
    config = base_layer.config
    if isinstance(config, AdaptedExpertsConfig):
        return config._shared
    return config


def moe_lora_experts_forward(
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The experts implementation that is registered with transformers.

    Args:
        module: an experts module, adapted or not.
        hidden_states: [T, H] float.
        top_k_index: [T, top_k] integer expert ids; ids outside 0..E-1 are skipped.
        top_k_weights: [T, top_k] float.
    Returns: [T, H], dtype of hidden_states.
    """
    config = module.config
    if isinstance(config, AdaptedExpertsConfig):
        return config._layer.compute(module, hidden_states, top_k_index, top_k_weights)
    return compute_frozen(module, (hidden_states, top_k_index, top_k_weights))


@torch.no_grad()
def check_contract(
    module: nn.Module,
    layout: ExpertsLayout,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> bool:
    """Check that an adapter's formula is what a module outside the interface computes.

    Args:
        module: the experts module, with its weights on the device of hidden_states.
        layout: layout of the module.
        hidden_states: [T, H] float; the first few tokens are compared.
        top_k_index: [T, top_k] integer.
        top_k_weights: [T, top_k] float.
    Returns: True if the outputs agree; False if nothing was compared, because every token has an
        id outside 0..E-1.
    Raises:
        UnsupportedExperts: if the outputs differ.
    """
    # the module's own forward may fail on ids outside 0..E-1
    known_id = (top_k_index >= 0) & (top_k_index < layout.num_experts)
    tokens = known_id.all(1).nonzero()[:_CONTRACT_TOKENS, 0]
    if not tokens.numel():
        return False
    first = (hidden_states[tokens], top_k_index[tokens], top_k_weights[tokens])
    up, down = (
        Projection(layout.weight(module, name), layout.bias(module, name)) for name in PROJECTIONS
    )
    own = type(module).forward(module, *first)
    activation = layout.activation or own_activation(module, layout.gated)
    assumed = experts(*first, up, down, activation)
    if (own - assumed).norm() <= _CONTRACT_TOLERANCE * own.norm():
        return True
    raise UnsupportedExperts(
        f"{type(module).__name__}.forward does not compute the sum of top_k_weights * "
        "down(act(gate_up(x))) with the activation of its _apply_gate or act_fn; give the class an "
        "_apply_gate(gate_up) that computes the activation of its forward, or take the module out "
        "of target_modules."
    )
