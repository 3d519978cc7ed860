"""What cannot be merged into the shards of a model that FSDP2 has sharded."""

from collections.abc import Collection

from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn

from ..layers.layer import MoELoraLayer
from ..layers.merging import check_codes_are_whole, check_codes_are_written
from ..parallel.fsdp import reshard
from ..parallel.sharding import is_sharded


def reshard_to_merge(model: nn.Module, adapter_names: Collection[str]) -> None:
    """Let FSDP2 drop gathered weights, and check that adapters can be merged into the shards.

    Raises:
        ValueError: if an adapter has trained rows of a sharded embedding, or if it adapts sharded
            experts in 4 or 8 bits, or experts in a format that can only be read.
    """
    reshard(model)
    for path, layer in model.named_modules():
        for name in adapter_names:
            if isinstance(layer, MoELoraLayer):
                check_codes_are_whole(layer, name)
                check_codes_are_written(layer, name)
            if isinstance(layer, TrainableTokensLayer) and name in layer.token_indices:
                _check_embedding(path, layer)


def _check_embedding(path: str, layer: TrainableTokensLayer) -> None:
    if is_sharded(layer.get_base_layer().weight):
        raise ValueError(
            f"trainable_token_indices: FSDP2 has sharded {path}, but PEFT merges trained rows into "
            "a whole embedding; save the adapter, and merge it in one process."
        )
