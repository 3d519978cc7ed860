"""Tiny random models of many families, their inputs and their outputs."""

import inspect

import torch
import transformers
from transformers import TrainingArguments
from transformers.integrations.peft import PeftAdapterMixin

from helpers.classes import experts_paths, fill, interface_families, modeling_module
from helpers.sizes import TOP_K, VOCAB, E, H, I

# whether load_adapter of transformers loads modules trained whole and tokens, not A and B alone
KNOWS_WRAPPERS = "AuxiliaryTrainingWrapper" in inspect.getsource(PeftAdapterMixin.load_adapter)

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": H,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # about H**-0.5: every layer has a share in the output
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# experts narrower than the dense layers beside them
_WIDTHS = {"intermediate_size": 40, "moe_intermediate_size": I}
_EXPERTS = {"num_experts": E, "num_experts_per_tok": TOP_K}
_LOCAL_EXPERTS = {"num_local_experts": E, "num_experts_per_tok": TOP_K}
# a dense layer first, then two groups of routed experts and a shared one
_GROUPED_EXPERTS = {
    "n_routed_experts": 6,
    "num_experts_per_tok": TOP_K,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_LINEAR_ATTENTION = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}

# family -> (config class, what differs from _COMMON); a comment says why the family is here
_TINY = {
    # the plain case: gated, concatenated, [E, 2I, H]
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 8, **_WIDTHS, **_EXPERTS}),
    # interleaved, transposed, biased, its own gate
    "gpt_oss": (
        "GptOssConfig",
        {
            "head_dim": 8,
            "intermediate_size": I,
            **_LOCAL_EXPERTS,
            "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    # PEFT and transformers rewrite its adapter targets on loading (w1, w2, w3 of transformers 4)
    "mixtral": ("MixtralConfig", {"intermediate_size": I, **_LOCAL_EXPERTS}),
    # no gate, relu2; the width of the experts' input is not the model's, and no attribute has it
    "nemotron_h": (
        "NemotronHConfig",
        {
            "num_hidden_layers": None,
            "layers_block_type": ["attention", "moe", "moe"],
            "head_dim": 8,
            **_WIDTHS,
            "moe_shared_expert_intermediate_size": 40,
            "moe_latent_size": 20,
            "n_routed_experts": E,
            "num_experts_per_tok": TOP_K,
        },
    ),
    # routing weights that are not normalised
    "olmoe": ("OlmoeConfig", {"intermediate_size": I, **_EXPERTS}),
    # fp32 routing weights, a shared expert beside the routed ones, a dense layer first
    "deepseek_v3": ("DeepseekV3Config", {**_WIDTHS, **_GROUPED_EXPERTS, **_LATENT_ATTENTION}),
    # a norm between down_proj and the routing weight; no causal-LM class of its own
    "muse_spark": (
        "MuseSparkTextConfig",
        {
            "head_dim": 8,
            **_WIDTHS,
            "moe_hidden_size": 20,
            **_LOCAL_EXPERTS,
            "mlp_layer_types": ["sparse", "sparse"],
            "sliding_window": 8,
        },
    ),
    # tanh-approximated gelu, experts directly under the decoder layer
    "gemma4": (
        "Gemma4TextConfig",
        {
            "head_dim": 8,
            "global_head_dim": 8,
            **_WIDTHS,
            "enable_moe_block": True,
            "num_experts": E,
            "top_k_experts": TOP_K,
            "sliding_window": 8,
            "hidden_size_per_layer_input": 0,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size_per_layer_input": VOCAB,
        },
    ),
    # transposed without biases
    "aria": (
        "AriaTextConfig",
        {
            "intermediate_size": I,
            "moe_num_experts": E,
            "moe_topk": TOP_K,
            "moe_num_shared_experts": 1,
        },
    ),
}

# families that are here for what they have beside their experts
_BESIDE = {
    # a sigmoid gate [1, H] on the shared expert, whose name ends in "gate" too
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_WIDTHS, **_EXPERTS, "shared_expert_intermediate_size": 40},
    ),
    # the same, and linear attention in one of two layers
    "qwen3_next": (
        "Qwen3NextConfig",
        {**_WIDTHS, **_EXPERTS, "shared_expert_intermediate_size": 40, **_LINEAR_ATTENTION},
    ),
    # the projections of its linear attention have other names
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        {
            "moe_intermediate_size": I,
            **_EXPERTS,
            "shared_expert_intermediate_size": 40,
            **_LINEAR_ATTENTION,
        },
    ),
    # the attention of deepseek_v3 with softmax routing
    "deepseek_v2": (
        "DeepseekV2Config",
        {
            **_WIDTHS,
            **_GROUPED_EXPERTS,
            "n_group": 1,
            **_LATENT_ATTENTION,
            "head_dim": 8,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
        },
    ),
    # grouped sigmoid routing with plain attention; a dense layer first
    "glm4_moe": ("Glm4MoeConfig", {"head_dim": 8, **_WIDTHS, **_GROUPED_EXPERTS}),
    # the router is a linear layer with a forward of its own
    "phimoe": (
        "PhimoeConfig",
        {
            "intermediate_size": I,
            **_LOCAL_EXPERTS,
            # how far a score may lie from the best one and still count in its softmax
            "router_jitter_noise": 4.0,
        },
    ),
}


def tiny_families():
    """The families of `_TINY` whose experts are on the installed transformers' interface."""
    installed = {family for family, _ in interface_families()}
    return [family for family in _TINY if family in installed]


def causal_families():
    """Those of them that have a causal-LM class."""
    return [family for family in tiny_families() if family != "muse_spark"]


def config_settings(family, **changes):
    """The arguments of a tiny config of a family."""
    _, settings = {**_TINY, **_BESIDE}[family]
    settings = {**_COMMON, **settings, **changes}
    return {name: value for name, value in settings.items() if value is not None}


def tiny_model(family="qwen3_moe", dtype=torch.float32, seed=0, **changes):
    """A whole random model of a family, in eval mode; its experts shape much of its output."""
    name, _ = {**_TINY, **_BESIDE}[family]
    module = modeling_module(family)
    config = getattr(module, name)(**config_settings(family, **changes))
    torch.manual_seed(seed)
    if family == "muse_spark":
        model = module.MuseSparkTextModel(config)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config)
    for i, path in enumerate(experts_paths(model)):
        fill(model.get_submodule(path), seed=seed + i)
    return model.to(dtype).eval()


def token_ids(batch=2, length=11, seed=4):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def outputs(model, ids=None):
    """[batch, length, VOCAB] logits, or the last hidden state where there is no head."""
    out = model(input_ids=token_ids() if ids is None else ids, use_cache=False)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def training_arguments(folder, **settings):
    """A Trainer's arguments for a quiet run on the CPU that saves nothing."""
    common = {
        "output_dir": str(folder),
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 3,
    }
    return TrainingArguments(**common | settings)


def train(model, ids, steps=8):
    """The loss of each of `steps` steps of AdamW on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
