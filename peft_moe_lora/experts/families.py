"""The tables of model families: all names of models and of their classes that the package knows.

A family that follows transformers' experts interface needs no row: all that an adapter needs is
read from its modules.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from .layout import ExpertsLayout

# Names of the parameters that hold one matrix for each expert; `layout` and the loader of quantized
# models look for them. An experts module has `gate_up_proj` if it is gated, else `up_proj`.
STACKS = ("gate_up_proj", "up_proj", "down_proj")

# A row is the class of an experts module that cannot be adapted yet, and the reason, which `layout`
# puts in its error.
# fmt: off
NOT_YET = {
    "Mxfp4GptOssExperts": 'its weights are packed in the order of a kernel of its own; load_quantized with experts="mxfp4" keeps them as published',  # noqa: E501
}
# fmt: on

# A row is the class of a router that reads the weight of a linear layer without calling the layer,
# and that layer's name. The tuner refuses to put a LoRA there, because it would have no effect.
READ_NOT_CALLED = {
    "LongcatFlashTopkRouter": "classifier",
}


class AdaptedLayer(Protocol):
    """What a family's `call` needs of the adapted layer around its module.

    `compute` runs all of an experts module, `compute_rows` a module that is a single projection.
    """

    @property
    def layout(self) -> "ExpertsLayout": ...

    @property
    def in_features(self) -> int: ...

    def compute(
        self,
        module: nn.Module,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor: ...

    def compute_rows(
        self, module: nn.Module, rows: torch.Tensor, expert_size: torch.Tensor
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Family:
    """A class of experts modules with weights or a call of its own.

    Attributes:
        arguments: names of the arguments of its forward. A class of the same name whose forward
            takes others is not this one.
        weights: projection -> names of its parameters. Their rows, one parameter after the other,
            are the N rows of the projection. A parameter is [E, n, K], or [E, K, n] if transposed;
            if it is 2-D, the first two of these dimensions are one.
        call: (layer, module, *arguments) -> what the module's own forward returns, computed with
            the layer's adapters.
        transposed: the projections whose parameters are stored as [E, K, N].
        act_fn: name of the activation between the projections.
        exports: why adapters on it cannot be written in another program's format; None if they can.
    """

    arguments: tuple[str, ...]
    weights: Mapping[str, tuple[str, ...]]
    call: Callable[..., torch.Tensor]
    transposed: tuple[str, ...] = ()
    act_fn: str = "act_fn"
    exports: str | None = None


def _llama4(layer: AdaptedLayer, module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Every expert gets every token; the routing weight is already part of the input.

    The router gives weight 0 to a token that did not select the expert. Its row is all zeros, and
    if act(0) = 0, its output and its gradient are zero too: such rows are skipped.

    Args:
        layer: the adapted layer.
        module: the experts module.
        hidden_states: [E * T, H] rows in expert order, already times their routing weight.
    Returns: [E * T, H].
    """
    E = layer.layout.num_experts
    rows = hidden_states.reshape(-1, layer.in_features)
    expert = torch.arange(E, device=rows.device).repeat_interleave(rows.shape[0] // E)
    # every activation that is fused is 0 at 0
    if layer.layout.activation is not None:
        largest = torch.linalg.vector_norm(rows.detach(), torch.inf, dim=-1)
        expert = torch.where(largest != 0, expert, E)
    ones = rows.new_ones(rows.shape[0], 1)
    return layer.compute(module, rows, expert[:, None], ones)


def _longcat_flash(
    layer: AdaptedLayer,
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The experts from E on are the identity: each adds its routing weight times x[t] to out[t]."""
    is_identity = top_k_index >= layer.layout.num_experts
    # ids beyond all experts are sentinels, which nothing computes
    is_identity &= top_k_index < cast(int, module.total_experts)
    weight = (top_k_weights * is_identity).sum(-1, keepdim=True)
    computed = layer.compute(module, hidden_states, top_k_index, top_k_weights)
    return computed + (weight * hidden_states).to(hidden_states.dtype)


def _rows(
    layer: AdaptedLayer, module: nn.Module, rows: torch.Tensor, expert_size: torch.Tensor
) -> torch.Tensor:
    """The module is one projection of [M, K] rows in expert order, expert_size[e] for expert e."""
    return layer.compute_rows(module, rows, expert_size)


def _dbrx(
    layer: AdaptedLayer,
    module: nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """The module takes and returns [batch, sequence, H]."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    return layer.compute(module, rows, top_k_index, top_k_weights).view_as(hidden_states)


# the reason for families whose modules are one projection; also given for an adapter without a base
ONE_EACH = "each of its modules is a single projection, which other formats cannot describe"

# A row is the class of an experts module with weights or a call of its own. `layout` reads where
# its weights are, the adapted layer runs its `call`, and conversions refuse it if `exports` says
# why.
FAMILIES = {
    "Llama4TextExperts": Family(
        arguments=("hidden_states",),
        weights={"gate_up": ("gate_up_proj",), "down": ("down_proj",)},
        call=_llama4,
        transposed=("gate_up", "down"),
        exports="PEFT reads its [E, K, N] weights as [E, N, K], "
        "and no server is known to read another form",
    ),
    "LongcatFlashExperts": Family(
        arguments=("hidden_states", "top_k_index", "top_k_weights"),
        # gate_up_proj also has rows for the identity experts, which nothing reads
        weights={"gate_up": ("gate_up_proj",), "down": ("down_proj",)},
        call=_longcat_flash,
        exports="other formats count its identity experts, which have no adapter",
    ),
    "JetMoeParallelExperts": Family(
        arguments=("inputs", "expert_size"),
        weights={"linear": ("weight",)},
        call=_rows,
        exports=ONE_EACH,
    ),
    # aria before transformers 5.18; drop when the floor passes it
    "AriaGroupedExpertsGemm": Family(
        arguments=("input", "tokens_per_expert"),
        weights={"linear": ("weight",)},
        call=_rows,
        transposed=("linear",),
        exports=ONE_EACH,
    ),
    "DbrxExperts": Family(
        arguments=("hidden_states", "top_k_index", "top_k_weights"),
        weights={"gate_up": ("mlp.w1", "mlp.v1"), "down": ("mlp.w2",)},
        call=_dbrx,
        transposed=("down",),
        act_fn="mlp.activation_fn",
        exports="its experts are stored as 2-D weights, which other formats cannot describe",
    ),
}


# ---- model types: how published checkpoints and other programs name and read a family ------------


@dataclass(frozen=True)
class HubNames:
    """The names of experts in a family's published checkpoints; transformers 5 has others.

    Attributes:
        gate, up, down: the projections of one expert.
        block: the module that holds the experts and the router; transformers 5 calls it "mlp".
        router: what transformers 5 calls the router; published checkpoints call it "gate".
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    block: str = "mlp"
    router: str = "gate"

    def to_hub(self, key: str) -> str:
        """A key with transformers' names, in the published names; a dense layer's "mlp" stays."""
        return self._rename(key, ("mlp", self.router), (self.block, "gate"))

    def from_hub(self, key: str) -> str:
        """A key with the published names, in transformers' names."""
        return self._rename(key, (self.block, "gate"), ("mlp", self.router))

    @staticmethod
    def _rename(key: str, old: tuple[str, str], new: tuple[str, str]) -> str:
        """The key with (block, router) replaced."""
        if old == new:
            return key
        old_block, old_router = old
        new_block, new_router = new

        def renamed(match: re.Match[str]) -> str:
            child = match[1]
            if child == old_router:
                child = new_router
            return f".{new_block}.{child}"

        return re.sub(rf"\.{old_block}\.(experts|shared_experts|{old_router})\b", renamed, key)


_NUMBERED = HubNames("w1", "w3", "w2")
_BLOCK_SPARSE = HubNames("w1", "w3", "w2", "block_sparse_moe")

# A row is a model type whose published checkpoints have names of their own, and these names; all
# others have the defaults of HubNames. Conversions write and read these names.
HUB_NAMES = {
    "deepseek_v4": _NUMBERED,
    "kimi_linear": _BLOCK_SPARSE,
    "lfm2_moe": _NUMBERED,
    "minimax": _BLOCK_SPARSE,
    "minimax_m2": _BLOCK_SPARSE,
    "minimax_m3_vl": _BLOCK_SPARSE,
    "mistral_large4_text": _NUMBERED,
    "mixtral": _BLOCK_SPARSE,
    "phimoe": HubNames("w1", "w3", "w2", "block_sparse_moe", "router"),
}

# What is before "layers.0" in a path. It differs between a text model and a larger model that
# contains it; conversions compare paths without it.
TEXT_PREFIX = re.compile(
    r"^(?:model\.language_model\.|language_model\.model\.|model\.text_model\.|model\.)"
)

# A row is a model type whose experts vLLM reads in 3-D, because its class sets is_3d_moe_weight; it
# reads all others per expert. The formats for vLLM read this table.
VLLM_3D = frozenset(
    {
        "gpt_oss",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen3_vl_moe",
        "qwen3_vl_moe_text",
    }
)
