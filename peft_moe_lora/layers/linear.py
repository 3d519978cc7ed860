"""PEFT's linear LoRA layer in a model that is divided among processes."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from peft.tuners import lora
from torch import nn

from ..parallel.linears import Factor
from ..parallel.sharding import placed
from .checked import still_unchecked
from .factor import replace_factors
from .fast_linear import FastForward


class ShardedLinear(FastForward, lora.Linear):
    """A linear layer's LoRA, where FSDP2 has sharded the weight over a mesh of any names.

    PEFT takes a shard for the whole weight, unless the mesh is called "fsdp" or has no name.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, nn.Linear), "only linear layers are wrapped"
        return module.in_features, module.out_features


class DividedLinear(ShardedLinear):
    """A linear layer's LoRA, of which every process holds A and B whole and uses its part.

    PEFT's own layer takes a part of the weight for a whole one: each process would train an A or a
    B of its own.

    Args:
        factors: what this process uses of lora_A and lora_B, by these names.
    """

    def __init__(self, *args: Any, factors: Mapping[str, Factor], **kwargs: Any) -> None:
        # read by `update_layer`, which the constructor calls
        self.factors = factors
        super().__init__(*args, **kwargs)

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        replace_factors(self, adapter_name, self.factors)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As PEFT merges; every process must call this if the weight is sharded."""
        super().merge(still_unchecked(self, safe_merge, adapter_names), adapter_names)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """[N, K] update of the weight, placed as the weight is."""
        weight = cast(nn.Parameter, self.base_layer.weight)
        return placed(super().get_delta_weight(adapter), weight)
