"""The families off the interface: their experts, how each is called, and whole tiny models.

The oracle is the class's own forward, with base weight + scaling * B[e] @ A[e] instead of its
parameters. Where each expert's update goes is written here a second time, from the definition.
"""

import torch
import transformers
from torch.func import functional_call
from transformers import PreTrainedConfig

from helpers import (
    TOP_K,
    VOCAB,
    E,
    H,
    I,
    dense_delta,
    fill,
    modeling_module,
    random_rows,
)

# how many of LongCat's experts are the identity
IDENTITY = 2


def settings(**values):
    config = PreTrainedConfig()
    for name, value in values.items():
        setattr(config, name, value)
    return config


def llama4():
    config = settings(num_local_experts=E, intermediate_size=I, hidden_size=H, hidden_act="silu")
    return fill_transposed(modeling_module("llama4").Llama4TextExperts(config))


def longcat_flash():
    config = settings(
        expert_ffn_hidden_size=I,
        hidden_size=H,
        n_routed_experts=E,
        zero_expert_num=IDENTITY,
        hidden_act="silu",
    )
    return fill(modeling_module("longcat_flash").LongcatFlashExperts(config))


def jetmoe():
    return fill(modeling_module("jetmoe").JetMoeParallelExperts(E, H, I))


def dbrx():
    config = settings(
        hidden_size=H, ffn_hidden_size=I, moe_num_experts=E, ffn_act_fn={"name": "silu"}
    )
    return fill_stacked(modeling_module("dbrx").DbrxExperts(config))


def aria():
    return fill_transposed(modeling_module("aria").AriaGroupedExpertsGemm(H, I, E))


BUILD = {"llama4": llama4, "longcat_flash": longcat_flash, "jetmoe": jetmoe, "dbrx": dbrx}
if hasattr(modeling_module("aria"), "AriaGroupedExpertsGemm"):
    # before transformers 5.18; later releases have it on the interface
    BUILD["aria"] = aria
# families whose modules are one projection of rows in expert order
ROWS = {"jetmoe", "aria"}
PROJECTIONS = {family: ["linear"] if family in ROWS else ["gate_up", "down"] for family in BUILD}


def fill_transposed(module, seed=0):
    module.is_transposed = True  # for `fill`, which divides by the fan-in
    fill(module, seed)
    del module.is_transposed
    return module


def fill_stacked(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            fan_in = I if name.endswith("w2") else H
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return module


def leaves(family, T=13, dtype=torch.float32, seed=2, device="cpu"):
    """The float tensors a call differentiates, and the call: (module, *leaves) -> output."""
    num_experts = E + IDENTITY if family == "longcat_flash" else E
    rows = random_rows(T=T, num_experts=num_experts, dtype=dtype, seed=seed)
    x, top_k_index, top_k_weights = (t.to(device) for t in rows)
    if family == "llama4":
        scores = x.new_zeros(T, E).scatter(1, top_k_index, top_k_weights)

        def call(module, x, scores):
            # as in Llama4TextMoe: every expert gets every token, weighted at its input
            return module(x.repeat(E, 1) * scores.T.reshape(-1, 1)).view(E, T, H).sum(0)

        return (x, scores), call
    if family in ROWS:
        sizes = torch.bincount(top_k_index[:, 0], minlength=E)
        sizes = sizes.tolist() if family == "jetmoe" else sizes
        return (x,), lambda module, rows: module(rows, sizes)
    if family == "dbrx":

        def call(module, x, weights):
            return module(x[None], top_k_index, weights)[0]

        return (x, top_k_weights), call
    return (x, top_k_weights), lambda module, x, weights: module(x, top_k_index, weights)


def with_deltas(family, plain, deltas):
    """Parameter name -> base weight + delta [E, N, K], in the base's own form.

    Differentiable in the deltas.
    """
    parameters, changed = dict(plain.named_parameters()), {}
    for projection, delta in deltas.items():
        if family == "llama4":
            changed[f"{projection}_proj"] = parameters[f"{projection}_proj"] + delta.transpose(1, 2)
        elif family == "longcat_flash":
            weight = parameters[f"{projection}_proj"]
            num_experts = delta.shape[0]
            changed[f"{projection}_proj"] = torch.cat(
                [weight[:num_experts] + delta, weight[num_experts:]]
            )
        elif "weight" in parameters:
            changed["weight"] = parameters["weight"] + (
                delta.transpose(1, 2) if family == "aria" else delta
            )
        elif family == "dbrx" and projection == "gate_up":
            gate, up = delta.chunk(2, dim=1)
            changed["mlp.w1"] = parameters["mlp.w1"] + gate.flatten(0, 1)
            changed["mlp.v1"] = parameters["mlp.v1"] + up.flatten(0, 1)
        elif family == "dbrx":
            changed["mlp.w2"] = parameters["mlp.w2"] + delta.transpose(1, 2).flatten(0, 1)
        else:
            # on the interface, or like it: step3p7
            name = "down_proj" if projection == "down" else "gate_up_proj"
            name = name if name in parameters else "up_proj"
            transposed = getattr(plain, "is_transposed", False)
            changed[name] = parameters[name] + (delta.transpose(1, 2) if transposed else delta)
    return changed


class Explicit(torch.nn.Module):
    """A plain experts module that is called with base + delta."""

    def __init__(self, family, plain, deltas):
        super().__init__()
        self.plain, self.changed = plain, with_deltas(family, plain, deltas)

    def forward(self, *args):
        return functional_call(self.plain, self.changed, args)


def deltas_of(adapters, num_experts, scaling):
    return {name: dense_delta(a, b, num_experts, scaling) for name, (a, b) in adapters.items()}


# ---- whole tiny models ---------------------------------------------------------------------------

_MODEL = {
    "hidden_size": H,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_LAYERS = {**_MODEL, **_ATTENTION, "num_hidden_layers": 2}
# family -> (config class, what it is built with)
CONFIGS = {
    "llama4": (
        "Llama4TextConfig",
        {
            **_LAYERS,
            "intermediate_size": I,
            "intermediate_size_mlp": 40,
            "num_local_experts": E,
            "num_experts_per_tok": TOP_K,
        },
    ),
    "longcat_flash": (
        "LongcatFlashConfig",
        {
            **_MODEL,
            **_ATTENTION,
            "num_layers": 2,
            "num_key_value_heads": 4,
            "ffn_hidden_size": 40,
            "expert_ffn_hidden_size": I,
            "n_routed_experts": E,
            "zero_expert_num": IDENTITY,
            "moe_topk": TOP_K,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "routed_scaling_factor": 2.0,
        },
    ),
    "jetmoe": (
        "JetMoeConfig",
        {
            "hidden_size": H,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "kv_channels": 8,
            "intermediate_size": I,
            "max_position_embeddings": 64,
            "num_local_experts": E,
            "num_experts_per_tok": TOP_K,
            "pad_token_id": 0,
            "initializer_range": 0.2,
        },
    ),
    "dbrx": (
        "DbrxConfig",
        {
            "d_model": H,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "initializer_range": 0.2,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": I, "moe_num_experts": E, "moe_top_k": TOP_K},
        },
    ),
    "step3p7": (
        "Step3p7TextConfig",
        {
            **_LAYERS,
            "intermediate_size": 40,
            "moe_intermediate_size": I,
            "n_routed_experts": E,
            "share_expert_dim": 40,
            "num_experts_per_tok": TOP_K,
            "mlp_layer_types": ["dense", "sparse"],
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"],
            "swiglu_limits": [0.0, 2.0],
        },
    ),
}
if "aria" in BUILD:
    experts_of_aria = {"moe_num_experts": E, "moe_topk": TOP_K, "moe_num_shared_experts": 1}
    CONFIGS["aria"] = ("AriaTextConfig", {**_LAYERS, "intermediate_size": I, **experts_of_aria})
CLASSES = {
    "AriaGroupedExpertsGemm",
    "DbrxExperts",
    "JetMoeParallelExperts",
    "Llama4TextExperts",
    "LongcatFlashExperts",
    "Step3p7Experts",
}
FILL = {"llama4": fill_transposed, "aria": fill_transposed, "dbrx": fill_stacked}


def off_interface_model(family, dtype=torch.float32, seed=0, **changes):
    """A whole random model, in eval mode, whose experts shape much of its output."""
    name, values = CONFIGS[family]
    config = getattr(modeling_module(family), name)(**{"vocab_size": VOCAB, **values, **changes})
    torch.manual_seed(seed)
    if family == "step3p7":
        model = modeling_module(family).Step3p7TextModel(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    for i, path in enumerate(paths_of(model)):
        FILL.get(family, fill)(model.get_submodule(path), seed=seed + i)
    return model.to(dtype).eval()


def paths_of(model):
    """Dotted paths of the experts modules of a plain model of these families."""
    return [name for name, module in model.named_modules() if type(module).__name__ in CLASSES]
