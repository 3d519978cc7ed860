"""A new adapter out of others: `add_weighted_adapter` on experts, routers, linear and other layers.

Every expert has its own A and B, so every expert is combined by itself, as one linear layer is. An
expert that an adapter does not adapt gets nothing from it. Everything is computed before the model
is changed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..config import MoELoraConfig
from ..experts.layout import PROJECTIONS
from ..files.config_fields import is_finite
from ..files.patterns import one_or_by_path
from ..layers.layer import MoELoraLayer
from ..layers.offload import fetched
from .combining import OF_FACTORS, Combination, Factors, Term

# (projection, expert) -> A [r, K] and B [N, r]; a layer without experts has one entry, ("", 0)
Matrices = dict[tuple[str, int], Factors]

# fields that choose layers beside target_modules
_CHOOSING = ("layers_to_transform", "layers_pattern", "exclude_modules")

# fields that train what has no A and B -> what they train
_WITHOUT_FACTORS = {
    "modules_to_save": "modules saved whole",
    "trainable_token_indices": "single rows of an embedding",
    "ensure_weight_tying": "A and B that two layers share",
}


@dataclass(frozen=True)
class Mixture:
    """What `add_weighted_adapter` was asked for.

    Attributes:
        shares: an adapter's name and its weight; a name may come twice.
        combination: how the updates become one.
    Raises:
        ValueError: if a weight is not finite.
    """

    shares: tuple[tuple[str, float], ...]
    combination: Combination

    @classmethod
    def of(
        cls, adapters: Sequence[str], weights: Sequence[float], combination: Combination
    ) -> "Mixture":
        numbers = [float(weight) for weight in weights]
        if len(numbers) != len(adapters) or not all(is_finite(number) for number in numbers):
            raise ValueError(
                f"weights must hold one finite number for each of the {len(adapters)} adapters, "
                f"got {numbers}."
            )
        return cls(tuple(zip(adapters, numbers, strict=True)), combination)

    @property
    def adapters(self) -> list[str]:
        return [name for name, _ in self.shares]


def check_configs(configs: Mapping[str, MoELoraConfig]) -> None:
    """Check that adapters consist of A and B alone.

    Raises:
        ValueError: if an adapter trains anything else. The message names the adapter and the field.
    """
    for name, config in configs.items():
        for field, what in _WITHOUT_FACTORS.items():
            if getattr(config, field, None):
                _refuse(name, field, config, what)
        if config.bias != "none":
            _refuse(name, "bias", config, "biases that all adapters share")


def _refuse(name: str, field: str, config: MoELoraConfig, what: str) -> NoReturn:
    raise ValueError(
        f"add_weighted_adapter combines A and B, but adapter {name!r} has "
        f"{field}={getattr(config, field)!r}: it also trains {what}, which would be lost. Merge "
        "the adapters into the model one after the other instead."
    )


def combined_config(
    model: nn.Module, mixture: Mixture, configs: Sequence[MoELoraConfig], targets: str | set[str]
) -> MoELoraConfig:
    """The configuration of the new adapter; its scaling is 1, and it has the experts of all.

    Args:
        model: the model.
        mixture: what is combined.
        configs: the configurations of the adapters in `mixture`.
        targets: the union of their target_modules.
    """
    layers = dict(_layers(model, mixture.adapters))
    first = configs[0]
    # PEFT annotates a list, but stores a set
    changes: dict[str, Any] = {"target_modules": targets}
    if any(
        getattr(config, field) != getattr(first, field) for config in configs for field in _CHOOSING
    ):
        # no union of these fields chooses the right layers, so all layers are named
        changes = {"target_modules": set(layers), **dict.fromkeys(_CHOOSING)}
    experts = {path: layer for path, layer in layers.items() if isinstance(layer, MoELoraLayer)}
    if any(config.expert_indices is not None for config in configs):
        chosen = {path: _experts_of_any(layer, mixture.adapters) for path, layer in experts.items()}
        changes["expert_indices"] = chosen or None
    adapted = {
        path: _projections_of_any(layer, mixture.adapters)
        for path, layer in experts.items()
        if len(layer.layout.projections) > 1
    }
    changes["target_projections"] = one_or_by_path(adapted, list(PROJECTIONS))
    rank = mixture.combination.rank
    return replace(
        first,
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        **changes,
    )


def combine(model: nn.Module, mixture: Mixture, config: MoELoraConfig) -> dict[str, Matrices]:
    """A and B of the new adapter, by path of the layer; the model is not changed.

    Args:
        model: the model.
        mixture: what is combined.
        config: the configuration of the new adapter.
    Raises:
        ValueError: if ranks differ and the kind needs equal ones; if an adapter's parameters are
            not whole in this process.
    """
    return {
        path: _combine_layer(path, layer, mixture, config)
        for path, layer in _layers(model, mixture.adapters)
    }


def _combine_layer(
    path: str, layer: LoraLayer, mixture: Mixture, config: MoELoraConfig
) -> Matrices:
    names = [name for name in mixture.adapters if _has(layer, name)]
    sides = (layer.lora_A, layer.lora_B)
    with fetched(side[name] for side in sides for name in names if name in side):
        held = {name: _matrices(path, layer, name) for name in names}
        out: Matrices = {}
        for entry in _entries(path, layer, names, config):
            terms = [
                Term(*held[name][entry], weight, float(layer.scaling[name]))
                for name, weight in mixture.shares
                if entry in held.get(name, {})
            ]
            if terms:
                _check_ranks(path, terms, mixture.combination)
                out[entry] = mixture.combination.of(terms)
    return out


def _entries(
    path: str, layer: LoraLayer, names: Sequence[str], config: MoELoraConfig
) -> Iterator[tuple[str, int]]:
    """The keys of the new adapter's matrices."""
    if not isinstance(layer, MoELoraLayer):
        yield ("", 0)
        return
    for projection in config.projections_of(path, layer.layout):
        for expert in _experts_of_any(layer, names):
            yield (projection, expert)


def _check_ranks(path: str, terms: Sequence[Term], combination: Combination) -> None:
    ranks = [term.A.shape[0] for term in terms]
    if combination.kind in OF_FACTORS and len(set(ranks)) > 1:
        raise ValueError(
            "All adapters must have the same r value when using combination_type "
            f"{combination.kind}, but in {path} their ranks are {ranks}; use 'cat' or 'svd'."
        )


def write(model: nn.Module, adapter_name: str, combined: Mapping[str, Matrices]) -> None:
    """Write A and B into an adapter that the model has; what nothing was combined for is zero.

    Raises:
        ValueError: if the adapter has other layers or experts than the matrices.
    """
    written = {
        (path, entry)
        for path, layer in _layers(model, [adapter_name])
        for entry in _write_layer(path, layer, adapter_name, combined.get(path, {}))
    }
    missing = {
        path
        for path, matrices in combined.items()
        for entry in matrices
        if (path, entry) not in written
    }
    if missing:
        raise ValueError(
            f"the adapters adapt {sorted(missing)[0]} and {len(missing) - 1} other layers in a way "
            "that their configurations do not say; give peft_config the values back with which the "
            "adapters were added."
        )


@torch.no_grad()
def _write_layer(
    path: str, layer: LoraLayer, adapter_name: str, combined: Matrices
) -> list[tuple[str, int]]:
    """Write the matrices of one layer.

    Returns: the entries that the layer has.
    """
    entries = _matrices(path, layer, adapter_name)
    for entry, (A, B) in entries.items():
        new_A, new_B = combined.get(entry, (torch.zeros_like(A), torch.zeros_like(B)))
        assert (A.shape, B.shape) == (new_A.shape, new_B.shape), f"{path}: another rank"
        A.copy_(new_A)
        B.copy_(new_B)
    return list(entries)


# ---- layers --------------------------------------------------------------------------------------


def _layers(model: nn.Module, adapters: Sequence[str]) -> Iterator[tuple[str, LoraLayer]]:
    """Yield (path, layer) of the layers that have at least one of the adapters."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and any(_has(module, name) for name in adapters):
            yield path, module


def _has(layer: LoraLayer, adapter_name: str) -> bool:
    return adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A


def _projections_of_any(layer: MoELoraLayer, adapters: Sequence[str]) -> list[str]:
    """The projections that at least one of the adapters adapts, in the layer's order."""
    held = {name for adapter in adapters for name in layer.adapted_projections(adapter)}
    return [name for name in layer.layout.projections if name in held]


def _experts_of_any(layer: MoELoraLayer, adapters: Sequence[str]) -> list[int]:
    """Ascending ids of the experts that at least one of the adapters adapts."""
    held = [layer.experts_of(name) for name in adapters if _has(layer, name)]
    return sorted(set().union(*held))


def _matrices(path: str, layer: LoraLayer, adapter_name: str) -> Matrices:
    """Views of an adapter's A and B, one entry for each matrix that B A is added to.

    Raises:
        ValueError: if a parameter is sharded, offloaded, or not of a product B A.
    """
    if not isinstance(layer, MoELoraLayer):
        if getattr(layer.get_base_layer(), "groups", 1) > 1:
            raise ValueError(
                f"{path} is a convolution with groups, whose update is no product B A, so it "
                "cannot be combined; merge the adapters into the model one after the other."
            )
        A, B = _pair(layer, adapter_name)
        _check_whole(path, A, B, layer.r[adapter_name])
        # of a convolution too: [r, in, kernel] and [out, r, 1]
        return {("", 0): (A.flatten(1), B.flatten(1))}
    found: Matrices = {}
    experts = layer.experts_of(adapter_name)
    for projection in layer.adapted_projections(adapter_name):
        _check_whole(path, *layer.pair(adapter_name, projection), layer.r[adapter_name], experts)
        As, Bs = layer.pair_per_expert(adapter_name, projection)
        for expert, A, B in zip(experts, As, Bs, strict=True):
            found[projection, expert] = (A, B)
    return found


def _pair(layer: LoraLayer, adapter_name: str) -> Factors:
    if adapter_name in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    A = cast(nn.Linear, layer.lora_A[adapter_name])
    B = cast(nn.Linear, layer.lora_B[adapter_name])
    return A.weight, B.weight


def _check_whole(
    path: str, A: torch.Tensor, B: torch.Tensor, r: int, experts: Sequence[int] = (0,)
) -> None:
    plain = not any(side.is_meta or hasattr(side, "device_mesh") for side in (A, B))
    rank = r * len(experts)
    if plain and A.ndim >= 2 and B.ndim >= 2 and A.shape[0] == B.shape[1] == rank:
        return
    raise ValueError(
        f"add_weighted_adapter needs A and B of {path} whole in this process, with rank {rank}, "
        f"but A is {_described(A)} and B {_described(B)}; combine the adapters in a model that is "
        "neither sharded nor offloaded."
    )


def _described(tensor: torch.Tensor) -> str:
    return f"{type(tensor).__name__} {tuple(tensor.shape)} on {tensor.device}"
