"""Merging when modules of a model share one weight, as the embedding and the head often do.

An update of one of them would reach the other through the shared weight, and updates of both would
add up in it.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn

from ..layers.layer import MoELoraLayer
from .beside import base_module


def check_may_merge(model: nn.Module, adapter_names: Collection[str]) -> None:
    """Check that merging changes no weight that the embedding and the head share.

    Raises:
        ValueError: if it would.
    """
    if _head_to_untie(model, adapter_names) is not None:
        raise ValueError(
            f"merge_adapter: the embedding and the head share one weight, and adapters "
            f"{sorted(adapter_names)} change it for one of them, or for each in its own way; "
            "nothing was merged. merge_and_unload gives the head a weight of its own."
        )
    for path, _, name in _shared(model, adapter_names):
        raise ValueError(
            f"merge_adapter: {path} shares its {name} with another module, which would change too; "
            "nothing was merged. merge_and_unload gives it a weight of its own."
        )


def untie(model: nn.Module, adapter_names: Collection[str]) -> None:
    """Give the head, and other modules that share weights, their own if merging needs that."""
    for _, module, name in _shared(model, adapter_names):
        weight = getattr(module, name)
        own = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        setattr(module, name, own)
    head = _head_to_untie(model, adapter_names)
    if head is None:
        return
    shared = head.weight
    assert isinstance(shared, nn.Parameter), "a shared weight is a parameter"
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    for config in _configs(model):
        config.tie_word_embeddings = False


def _shared(
    model: nn.Module, adapter_names: Collection[str]
) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (path, base module, name) of the weights that merging changes and others hold too.

    The embedding and the head are left out. A weight counts as shared until all but one have one of
    their own.
    """
    ends = [called(model, "get_input_embeddings"), called(model, "get_output_embeddings")]
    # parameter -> the number of modules that have it
    holders = Counter(
        parameter
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    for path, module in model.named_modules():
        is_changed = _changes(module, adapter_names)
        if module in ends or not is_changed or not isinstance(module, LoraLayer):
            continue
        layer: Any = module
        base = layer.get_base_layer()
        names = ["weight"]
        if isinstance(layer, MoELoraLayer):
            parts = layer.layout.projections.values()
            names = [name for projection in parts for name in projection.weights]
        for name in names:
            weight = base._parameters.get(name)
            if weight is not None and holders[weight] > 1:
                holders[weight] -= 1
                yield path, base, name


def _head_to_untie(model: nn.Module, adapter_names: Collection[str]) -> nn.Module | None:
    """The head, if its weight is the embedding's and merging would change it; else None."""
    embedding = called(model, "get_input_embeddings")
    head = called(model, "get_output_embeddings")
    if embedding is None or head is None:
        return None
    weight = getattr(base_module(embedding), "weight", None)
    if weight is None or getattr(base_module(head), "weight", None) is not weight:
        return None
    if isinstance(head, TrainableTokensWrapper) and head.token_adapter.tied_adapter is not None:
        # the rows of both are the same
        return None
    if not any(_changes(module, adapter_names) for module in (embedding, head)):
        return None
    return base_module(head)


def _changes(module: nn.Module, adapter_names: Collection[str]) -> bool:
    """Whether merging adapters changes the base weight of an embedding or a head."""
    held: set[str] = set()
    if isinstance(module, LoraLayer):
        held = {*module.lora_A, *module.lora_embedding_A}
    elif isinstance(module, TrainableTokensWrapper):
        held = set(module.token_adapter.trainable_tokens_delta)
    return not held.isdisjoint(adapter_names)


def called(model: nn.Module, getter: str) -> nn.Module | None:
    """What a getter of a model returns; None if the model does not have it."""
    found: Callable[[], nn.Module | None] | None = getattr(model, getter, None)
    if found is None:
        return None
    try:
        return found()
    except NotImplementedError:
        return None


def _configs(model: nn.Module) -> list[Any]:
    """The configurations of a model that say whether its embeddings are tied."""
    config: Any = getattr(model, "config", None)
    configs = [config]
    if hasattr(config, "get_text_config"):
        configs.append(config.get_text_config())
    return [config for config in configs if hasattr(config, "tie_word_embeddings")]
