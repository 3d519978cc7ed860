"""Tables of model families: every name of a model or of its classes that the package uses.

A family that follows transformers' experts interface needs no row: an adapter reads everything it
needs from the modules.
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
# Projection -> the names that its parameter has in one family or the other.
STACKS_OF = {"gate_up": ("gate_up_proj", "up_proj"), "down": ("down_proj",)}

# Class of an experts module that cannot be adapted yet -> the reason, for the error of `layout`.
# fmt: off
NOT_YET = {
    "Mxfp4GptOssExperts": 'its weights are packed in the order of its own kernel; load the model with load_quantized and experts="mxfp4", which keeps the published order',  # noqa: E501
}
# fmt: on

# Start of the names of liger-kernel's modules; it replaces classes and forwards of experts.
LIGER = "liger_kernel."

# Class of a router -> name of a linear layer whose weight the router reads without calling the
# layer. The tuner refuses to put a LoRA on that layer, because it would have no effect.
READ_NOT_CALLED = {
    "LongcatFlashTopkRouter": "classifier",
}


class AdaptedLayer(Protocol):
    """The part of an adapted layer that a family's `call` uses.

    `compute` runs a whole experts module; `compute_rows` runs a module that is a single projection.
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
    """A class of experts modules with its own way to store weights, or with its own arguments.

    Attributes:
        arguments: names of the arguments of its forward. A class with the same name but other
            arguments is another class.
        weights: projection -> names of its parameters. Their rows, concatenated in this order, are
            the N rows of the projection. A parameter is [E, n, K], or [E, K, n] if transposed; in a
            2-D parameter, the first two of these dimensions are flattened into one.
        call: called as call(layer, module, *arguments). It returns what the module's own forward
            returns, but with the layer's adapters.
        transposed: the projections whose parameters are stored as [E, K, n].
        act_fn: name of the attribute that holds the activation between the projections.
        exports: the reason why adapters on this class cannot be written in another program's
            format; None if they can.
    """

    arguments: tuple[str, ...]
    weights: Mapping[str, tuple[str, ...]]
    call: Callable[..., torch.Tensor]
    transposed: tuple[str, ...] = ()
    act_fn: str = "act_fn"
    exports: str | None = None


def _llama4(layer: AdaptedLayer, module: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Every expert gets every token; the routing weight is already part of the input.

    For an expert that a token did not select, the routing weight is 0, so the row is all zeros. If
    act(0) = 0, the output and the gradient of such a row are zero too, and the row is skipped.

    Args:
        layer: the adapted layer.
        module: the experts module.
        hidden_states: [E * T, H] rows in expert order, multiplied by their routing weights.
    Returns: [E * T, H].
    """
    E = layer.layout.num_experts
    rows = hidden_states.reshape(-1, layer.in_features)
    expert = torch.arange(E, device=rows.device).repeat_interleave(rows.shape[0] // E)
    # every fused activation maps 0 to 0
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
    """Experts E and above are the identity: each adds its routing weight times x[t] to out[t]."""
    is_identity = top_k_index >= layer.layout.num_experts
    # ids beyond all experts are sentinels, which are skipped
    is_identity &= top_k_index < cast(int, module.total_experts)
    weight = (top_k_weights * is_identity).sum(-1, keepdim=True)
    computed = layer.compute(module, hidden_states, top_k_index, top_k_weights)
    return computed + (weight * hidden_states).to(hidden_states.dtype)


def _rows(
    layer: AdaptedLayer, module: nn.Module, rows: torch.Tensor, expert_size: torch.Tensor
) -> torch.Tensor:
    """The module is one projection. Its rows [M, K] are in expert order, expert_size[e] for e."""
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


# `exports` of families whose modules are a single projection; also used if the base is not known
ONE_EACH = "each of its modules is a single projection, which other formats cannot describe"

# A row is a class of experts modules that does not follow transformers' experts interface. `layout`
# reads from it where the weights are, the adapted layer runs its `call`, and conversions refuse the
# class if `exports` gives a reason.
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
        # gate_up_proj also has rows for the identity experts; no code reads these rows
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
    # aria before transformers 5.18; drop this row when older releases are no longer supported
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
    """Names in a family's published checkpoints; transformers 5 uses other names.

    Attributes:
        gate, up, down: the projections of one expert.
        block: the module that holds the experts and the router; transformers 5 calls it "mlp".
        router: the router's name in transformers 5; published checkpoints call it "gate".
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    block: str = "mlp"
    router: str = "gate"

    def to_hub(self, key: str) -> str:
        """Replace transformers' names in a key by published names, except a dense layer's "mlp"."""
        return self._rename(key, ("mlp", self.router), (self.block, "gate"))

    def from_hub(self, key: str) -> str:
        """Replace the published names in a key by transformers' names."""
        return self._rename(key, (self.block, "gate"), ("mlp", self.router))

    @staticmethod
    def _rename(key: str, old: tuple[str, str], new: tuple[str, str]) -> str:
        """Replace the names (block, router) in a key."""
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

# Model type -> the names in its published checkpoints. All other model types have the defaults of
# HubNames. Conversions read and write these names.
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

# The part of a path before "layers.0". It differs between a text model and a larger model that
# contains the text model, so conversions compare paths without it.
TEXT_PREFIX = re.compile(
    r"^(?:model\.language_model\.|language_model\.model\.|model\.text_model\.|model\.)"
)

# Names in adapters of Tinker -> those in transformers: of the head, and of attention in gpt_oss.
OTHER_NAMES = {"model.unembed_tokens": "lm_head"}
OTHER_BLOCKS = {".attn.": ".self_attn."}

# Architectures whose experts vLLM 0.33 reads as 3-D tensors, because their classes in vLLM set
# is_3d_moe_weight. For all others vLLM reads 2-D tensors of each expert, also for the text models
# of some of these (Qwen3_5MoeForCausalLM).
VLLM_3D = frozenset(
    {
        "GptOssForCausalLM",
        "Qwen3VLMoeForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
    }
)
# Those of which vLLM reads no 2-D tensors either, because it looks for them under other names.
VLLM_NO_EXPERT_BY_EXPERT = frozenset({"GptOssForCausalLM"})

# Architectures of which SGLang 0.5.23 has no class of its own. It takes transformers' class, and
# the sizes of a q_proj without the gate that is in the other half of its rows.
SGLANG_NO_QUERY = frozenset({"Qwen3_5MoeForCausalLM"})
# Architectures whose router is a class of its own in SGLang; in the others it is a linear layer.
SGLANG_ROUTER_CLASSES = frozenset({"DeepseekV3ForCausalLM", "Glm4MoeForCausalLM"})

# Model type -> the module with the experts in mlx-lm 0.32, whose block has the published name.
MLX_BLOCKS = {
    "deepseek_v3": "switch_mlp",
    "glm4_moe": "switch_mlp",
    "gpt_oss": "experts",
    "mixtral": "switch_mlp",
    "olmoe": "switch_mlp",
    "qwen2_moe": "switch_mlp",
    "qwen3_moe": "switch_mlp",
}
# Model type -> last name of a layer that mlx-lm computes otherwise, and so without LoRA -> what it
# says to an adapter on it.
_MLX_GATE = "Can't convert layer of type MoEGate to LoRA"
MLX_NO_LORA = {
    "deepseek_v3": {"gate": _MLX_GATE, "kv_b_proj": "not an adapter parameter in the model"},
    "glm4_moe": {"gate": _MLX_GATE},
}

# Model type -> architecture of llama.cpp whose runtime was run with adapters on experts.
GGUF_ARCHITECTURES = {
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
    "mixtral": "llama",
    "olmoe": "olmoe",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
# Architecture of llama.cpp -> last name of a layer that it computes without LoRA -> what it says to
# an adapter on it; nothing if the adapter loads and has no effect.
GGUF_NO_LORA = {
    "deepseek2": {
        "q_proj": "",
        "q_a_proj": "",
        "q_b_proj": "",
        "kv_a_proj_with_mqa": "",
        "kv_b_proj": "does not exist in base model",
        "lm_head": "",
    },
}
# Model type -> last names of layers in which llama.cpp stores the two halves of each head as pairs
# of rows.
GGUF_PAIRED_ROWS = {"mixtral": frozenset({"q_proj", "k_proj"})}
