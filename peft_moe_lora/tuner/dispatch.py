"""How a call of an experts module reaches its adapter.

A module on transformers' experts interface looks up its implementation by a name in its config. It
gets a view of that config which names the implementation registered here, and that one calls the
adapter's layer. A module off the interface looks nothing up: its layer computes in place of its
forward, after `check_contract` has compared the two on the first tokens.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..experts.activation import own_activation
from ..experts.layout import PROJECTIONS, ExpertsLayout
from ..experts.stored import UnsupportedExperts
from ..functional import Projection, experts
from .implementations import IMPLEMENTATION

if TYPE_CHECKING:
    from .layer import MoELoraLayer

# bf16 rounding stays below 2 %; another activation or a forgotten factor does not stay below 5 %
_CONTRACT_TOLERANCE = 0.05
# how many tokens the contract is checked on
_CONTRACT_TOKENS = 4


class AdaptedExpertsConfig:
    """A model's config as one adapted experts module sees it.

    It differs from the shared config in the name of the experts implementation only. That name is
    stored in the config that all modules of a model share. Through this view one module dispatches
    to its adapter while the adapter is at work, whatever the user sets on the shared config.

    Args:
        config: the shared config; every other attribute is read from it and written to it.
        layer: the layer that adapts the module.
    """

    _shared: Any
    _layer: "MoELoraLayer"

    def __init__(self, config: Any, layer: "MoELoraLayer") -> None:
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
        if self._layer.is_at_work():
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
    """Make an experts module on transformers' interface dispatch to its layer."""
    if layer.layout.decorated:
        # nn.Module annotates its attributes as tensors and modules
        module: Any = base_layer
        module.config = AdaptedExpertsConfig(module.config, layer)


def detach(base_layer: nn.Module) -> nn.Module:
    """Give an experts module its own config back; returns the module."""
    config = getattr(base_layer, "config", None)
    if isinstance(config, AdaptedExpertsConfig):
        base_layer.config = config._shared
    return base_layer


def shared_config(base_layer: nn.Module, layout: ExpertsLayout) -> Any:
    """The config that an experts module was built with; None for a module off the interface."""
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
        module: the base module of a `MoELoraLayer`.
        hidden_states: [T, H] float.
        top_k_index: [T, top_k] integer expert ids; ids outside 0..E-1 are skipped.
        top_k_weights: [T, top_k] float.
    Returns: [T, H], dtype of hidden_states.
    """
    config = module.config
    assert isinstance(config, AdaptedExpertsConfig), "only adapted modules name this implementation"
    return config._layer.compute(module, hidden_states, top_k_index, top_k_weights)


@torch.no_grad()
def check_contract(
    module: nn.Module,
    layout: ExpertsLayout,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> bool:
    """Compare the forward of a module off the interface with what its adapter assumes it computes.

    Args:
        module: the experts module, its weights on the device of the rows.
        layout: layout of the module.
        hidden_states: [T, H] float; the first few tokens are compared.
        top_k_index: [T, top_k] integer.
        top_k_weights: [T, top_k] float.
    Returns: True if the two agree; False if nothing was compared, because every token has an id
        outside 0..E-1.
    Raises:
        UnsupportedExperts: if they disagree.
    """
    # the module's own forward need not accept ids outside 0..E-1
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
        "down(act(gate_up(x))) with the activation read from its _apply_gate or act_fn; give it an "
        "_apply_gate(gate_up) that computes the activation of its forward, or take it out of "
        "target_modules."
    )
