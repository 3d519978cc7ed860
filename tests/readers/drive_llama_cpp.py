"""Runs tiny models in llama.cpp on a CPU, with and without an adapter.

The base is written as GGUF from our model's weights, by the names of the package gguf. Nothing is
stubbed. The cache of keys and values is fp32, so that logits can be compared to 1e-5.
"""

from pathlib import Path

import gguf
import numpy as np
import torch
from llama_cpp import Llama
from torch import nn

from peft_moe_lora.experts.families import GGUF_ARCHITECTURES

__all__ = ["logits", "write_base"]

_F32 = 0


def write_base(model: nn.Module, file: Path) -> None:
    """Write a model of qwen3_moe, qwen2_moe, mixtral or olmoe as GGUF, without a vocabulary."""
    config = model.config
    architecture = GGUF_ARCHITECTURES[config.model_type]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = getattr(config, "moe_intermediate_size", config.intermediate_size)
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(width)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(model.get_submodule("model.layers.0.mlp.experts").num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_feed_forward_length(width)
    if hasattr(config, "shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in _published(model).items():
        writer.add_tensor(_name(architecture, config.num_hidden_layers, name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(base: Path, ids: torch.Tensor, adapter: Path | None = None) -> torch.Tensor:
    """[length, vocabulary] logits of one sequence of ids [length]."""
    model = Llama(
        str(base),
        lora_path=None if adapter is None else str(adapter),
        n_ctx=64,
        n_batch=64,
        n_threads=1,
        logits_all=True,
        type_k=_F32,
        type_v=_F32,
        verbose=False,
    )
    model.eval(ids.tolist())
    return torch.from_numpy(np.array(model.scores[: len(ids)]))


def _published(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights with gate and up apart, and in llama.cpp's order of rotary rows."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    found = {}
    for name, tensor in model.state_dict().items():
        path, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for half, part in zip(tensor.chunk(2, 1), ("gate_proj", "up_proj"), strict=True):
                found[f"{path}.{part}.weight"] = half.contiguous()
        elif last == "down_proj":
            found[f"{name}.weight"] = tensor
        elif config.model_type == "mixtral" and path.endswith(("q_proj", "k_proj")):
            # two halves of a head become pairs
            rows = tensor.unflatten(0, (heads[path.rpartition(".")[2]], 2, -1))
            found[name] = rows.transpose(1, 2).flatten(0, 2).contiguous()
        else:
            found[name] = tensor
    return found


def _name(architecture: str, layers: int, name: str) -> str:
    (kind,) = (arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    found = gguf.get_tensor_name_map(kind, layers).get_name(name, (".weight", ".bias"))
    assert found, f"{name} has no name in llama.cpp"
    return found
