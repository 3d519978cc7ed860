"""Experts off transformers' interface, by class name: where their weights lie and what they are called with.

A class on the interface needs no row here, nor does one that keeps `gate_up_proj` and `down_proj` and is called as
experts(hidden_states, top_k_index, top_k_weights). A row says the rest in the terms of an adapted layer:
`compute(module, hidden_states, top_k_index, top_k_weights)`, the whole experts, or `compute_rows(module, rows,
expert_size)`, one projection of rows in expert order; both as `MoELoraLayer` has them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Family:
    """An experts class with weights or a call of its own.

    Attributes:
        arguments: names of what its forward takes: another signature under the same name is another class.
        weights: projection -> names of the parameters that, one below another, are its N rows; 2-D ones stack
            [E * n, K] what others store as [E, n, K].
        transposed: projections whose parameters are stored [E, K, N].
        call: (layer, module, *arguments) -> what the module's own forward returns, with the layer's adapters.
        act_fn: name of the activation between the projections.
        exports: why no other program's format holds its adapters; None where formats do.
    """

    arguments: tuple[str, ...]
    weights: Mapping[str, tuple[str, ...]]
    call: Callable[..., torch.Tensor]
    transposed: tuple[str, ...] = ()
    act_fn: str = "act_fn"
    exports: str | None = None


def _llama4(layer, module, hidden_states):
    """Every token meets every expert, [E * T, H] in expert order, the routing weight already on it.

    The router gives a token nobody chose the weight 0, and out of a row of zeros come zeros, forward and backward, as
    long as act(0) = 0: such rows are skipped.
    """
    E = layer.layout.num_experts
    rows = hidden_states.reshape(-1, layer.in_features)
    expert = torch.arange(E, device=rows.device).repeat_interleave(rows.shape[0] // E)
    # every activation that is fused is 0 at 0
    if layer.layout.activation is not None:
        largest = torch.linalg.vector_norm(rows.detach(), torch.inf, dim=-1)
        expert = torch.where(largest != 0, expert, E)
    return layer.compute(module, rows, expert[:, None], rows.new_ones(rows.shape[0], 1))


def _longcat_flash(layer, module, hidden_states, top_k_index, top_k_weights):
    """Experts from E on are the identity: out[t] += x[t] * what the token's slots give them."""
    identity = (top_k_index >= layer.layout.num_experts) & (top_k_index < module.total_experts)
    passed = (top_k_weights * identity).sum(-1, keepdim=True) * hidden_states
    return layer.compute(module, hidden_states, top_k_index, top_k_weights) + passed.to(
        hidden_states.dtype
    )


def _rows(layer, module, rows, expert_size):
    """A module that is one projection of rows in expert order."""
    return layer.compute_rows(module, rows, expert_size)


def _dbrx(layer, module, hidden_states, top_k_index, top_k_weights):
    """[batch, sequence, H] in and out."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    return layer.compute(module, rows, top_k_index, top_k_weights).view_as(hidden_states)


ONE_EACH = "its modules hold one projection each, which other formats do not know"

FAMILIES = {
    "Llama4TextExperts": Family(
        arguments=("hidden_states",),
        weights={"gate_up": ("gate_up_proj",), "down": ("down_proj",)},
        transposed=("gate_up", "down"),
        call=_llama4,
        exports="PEFT takes its [E, K, N] weights for [E, N, K], and no server is known to read another form",
    ),
    "LongcatFlashExperts": Family(
        arguments=("hidden_states", "top_k_index", "top_k_weights"),
        # gate_up_proj has rows for the identity experts too, which nothing reads
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
        transposed=("linear",),
        call=_rows,
        exports=ONE_EACH,
    ),
    "DbrxExperts": Family(
        arguments=("hidden_states", "top_k_index", "top_k_weights"),
        weights={"gate_up": ("mlp.w1", "mlp.v1"), "down": ("mlp.w2",)},
        transposed=("down",),
        call=_dbrx,
        act_fn="mlp.activation_fn",
        exports="its experts lie in 2-D weights, which other formats do not know",
    ),
}
