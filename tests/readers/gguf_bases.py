"""Writes tiny models as GGUF, by the names of the package gguf, for llama.cpp to run.

The settings and the orders of rows are those of llama.cpp's own conversion. A file has no
vocabulary, and every tensor is fp32.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import torch
from torch import nn
from transformers import PreTrainedConfig

from peft_moe_lora.experts.families import GGUF_ARCHITECTURES

__all__ = ["write_base"]

Named = Iterator[tuple[str, torch.Tensor]]


def write_base(model: nn.Module, file: Path) -> None:
    """Write a model of one of `GGUF_ARCHITECTURES`."""
    config = model.config
    architecture = GGUF_ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(file, architecture)
    _add_settings(writer, config)
    _OF_ARCHITECTURE.get(architecture, _add_nothing)(writer, config)
    (kind,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, tensor in _published(model):
        found = names.get_name(name, (".weight", ".bias"))
        assert found, f"{name} has no name in llama.cpp"
        writer.add_tensor(found, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---- settings ------------------------------------------------------------------------------------


def _add_settings(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    """The settings that every architecture has."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    count = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(count or config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(width)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    if GGUF_ARCHITECTURES[config.model_type] == "deepseek2":
        return
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)


def _add_nothing(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    """The architecture has no settings of its own."""


def _add_shared_expert(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)


def _add_sliding_window(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    writer.add_sliding_window(config.sliding_window)


def _add_latent_attention(writer: gguf.GGUFWriter, config: PreTrainedConfig) -> None:
    """Settings of deepseek2: one key for all heads, which each head takes apart."""
    is_v3 = config.model_type == "deepseek_v3"
    scores = gguf.ExpertGatingFuncType.SIGMOID if is_v3 else gguf.ExpertGatingFuncType.SOFTMAX
    writer.add_head_count_kv(1)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(bool(config.norm_topk_prob))
    writer.add_expert_gating_func(scores)
    writer.add_expert_group_count(config.n_group)
    writer.add_expert_group_used_count(config.topk_group)


_OF_ARCHITECTURE: dict[str, Callable[[gguf.GGUFWriter, PreTrainedConfig], None]] = {
    "qwen2moe": _add_shared_expert,
    "gpt-oss": _add_sliding_window,
    "deepseek2": _add_latent_attention,
}


# ---- weights -------------------------------------------------------------------------------------


def _published(model: nn.Module) -> Named:
    """The weights under published names, with what llama.cpp splits and reorders done."""
    config = model.config
    for name, tensor in model.state_dict().items():
        path, _, last = name.rpartition(".")
        if last.startswith("gate_up_proj"):
            yield from _gate_and_up(config, path, last, tensor)
        elif last.startswith("down_proj"):
            yield from _down(config, path, last, tensor)
        elif path.endswith("kv_b_proj"):
            yield from _keys_and_values(config, path, tensor)
        elif config.model_type == "mixtral" and path.endswith(("q_proj", "k_proj")):
            yield name, _paired(config, path, tensor)
        elif last == "sinks":
            yield f"{name}.weight", tensor
        elif last == "e_score_correction_bias":
            yield f"{path}.e_score_correction.bias", tensor
        else:
            yield name, tensor


def _gate_and_up(config: PreTrainedConfig, path: str, last: str, tensor: torch.Tensor) -> Named:
    """gate_up_proj, or its bias, as gate and up."""
    kind = "bias" if last.endswith("_bias") else "weight"
    if config.model_type != "gpt_oss":
        gate, up = tensor.chunk(2, 1)
    elif kind == "bias":
        gate, up = tensor[:, 0::2], tensor[:, 1::2]
    else:
        gate, up = tensor.mT[:, 0::2], tensor.mT[:, 1::2]
    yield f"{path}.gate_proj.{kind}", gate
    yield f"{path}.up_proj.{kind}", up


def _down(config: PreTrainedConfig, path: str, last: str, tensor: torch.Tensor) -> Named:
    """down_proj of the experts, or its bias."""
    if last.endswith("_bias"):
        yield f"{path}.down_proj.bias", tensor
    elif config.model_type == "gpt_oss":
        yield f"{path}.down_proj.weight", tensor.mT
    else:
        yield f"{path}.down_proj.weight", tensor


def _keys_and_values(config: PreTrainedConfig, path: str, tensor: torch.Tensor) -> Named:
    """kv_b_proj as the part of the keys, transposed, and the part of the values."""
    rows = tensor.unflatten(0, (config.num_attention_heads, -1))
    keys, values = rows.split([config.qk_nope_head_dim, config.v_head_dim], 1)
    block = path.removesuffix("kv_b_proj")
    yield f"{block}k_b_proj.weight", keys.mT
    yield f"{block}v_b_proj.weight", values


def _paired(config: PreTrainedConfig, path: str, tensor: torch.Tensor) -> torch.Tensor:
    """The rows of q_proj or k_proj with the two halves of each head as pairs."""
    heads = config.num_attention_heads
    if path.endswith("k_proj"):
        heads = config.num_key_value_heads
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
