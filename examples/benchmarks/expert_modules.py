"""Experts modules of transformers on the meta device, by their shape."""

import torch
from torch import nn
from transformers import GptOssConfig, NemotronHConfig, Qwen3MoeConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts


def qwen3_experts(E: int, H: int, I: int, top_k: int) -> nn.Module:  # noqa: E741
    """SwiGLU: gate_up [E, 2I, H] with gate above up, down [E, H, I]."""
    config = Qwen3MoeConfig(
        num_experts=E, hidden_size=H, moe_intermediate_size=I, num_experts_per_tok=top_k
    )
    with torch.device("meta"):
        return Qwen3MoeExperts(config)


def gpt_oss_experts(E: int, H: int, I: int, top_k: int) -> nn.Module:  # noqa: E741
    """Transposed, with biases; gate and up interleaved and clamped."""
    config = GptOssConfig(
        num_local_experts=E, hidden_size=H, intermediate_size=I, num_experts_per_tok=top_k
    )
    with torch.device("meta"):
        return GptOssExperts(config)


def nemotron_experts(E: int, H: int, I: int, top_k: int) -> nn.Module:  # noqa: E741
    """No gate: up [E, I, H], the square of relu, down [E, H, I]."""
    config = NemotronHConfig(
        n_routed_experts=E, hidden_size=H, moe_intermediate_size=I, num_experts_per_tok=top_k
    )
    with torch.device("meta"):
        return NemotronHExperts(config)
