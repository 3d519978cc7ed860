"""Loads adapters with mlx-lm's own code on a CPU, and reads back what its layers hold.

mlx-lm builds the whole model with random weights, and `load_adapters` puts LoRA layers into it.
Nothing is stubbed. Configs that transformers 5 writes lack some fields of published ones.
"""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import torch
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import _get_classes, load_model

from readers.deltas import Deltas, layer_of

__all__ = ["load", "logits"]


def load(base: Path, adapter: Path) -> Deltas:
    """The deltas in mlx-lm's layers after it loaded an adapter.

    Args:
        base: folder with the base's config.json.
        adapter: folder of the adapter.
    """
    mx.set_default_device(mx.cpu)
    model_class, arguments = _get_classes(_published(base))
    model = load_adapters(model_class(arguments.from_dict(_published(base))), str(adapter))
    parts: Deltas = {}
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, LoRASwitchLinear):
            parts[layer_of(path), name] = _torch(module.scale * module.lora_b @ module.lora_a)
        elif isinstance(module, LoRALinear):
            parts[layer_of(path), name] = _torch((module.scale * module.lora_a @ module.lora_b).T)
    return _joined(parts, "gpt_oss" == _published(base)["model_type"])


def logits(base: Path, adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    """The logits of a base with its weights, and an adapter."""
    mx.set_default_device(mx.cpu)
    model, _ = load_model(base, model_config=_published(base))
    model.set_dtype(mx.float32)
    model = load_adapters(model, str(adapter))
    model.eval()
    return _torch(model(mx.array(ids.numpy())))


def _published(base: Path) -> dict[str, Any]:
    """The config with the fields that published ones of transformers 4 have."""
    config = json.loads((base / "config.json").read_text())
    rope = config["rope_parameters"]
    scaling = None
    if rope["rope_type"] != "default":
        scaling = {**rope, "type": rope["rope_type"]}
    published = {
        "num_experts": config.get("num_local_experts"),
        "rope_theta": rope["rope_theta"],
        "rope_scaling": scaling,
        "partial_rotary_factor": rope.get("partial_rotary_factor", 1.0),
    }
    return {**published, **config}


def _joined(parts: Deltas, interleaved: bool) -> Deltas:
    """The deltas with gate_up in place of gate and up."""
    found: Deltas = {}
    for (layer, name), delta in parts.items():
        if name == "gate_proj":
            halves = [delta, parts[layer, "up_proj"]]
            found[layer, "gate_up"] = torch.cat(halves, 1)
            if interleaved:
                found[layer, "gate_up"] = torch.stack(halves, 2).flatten(1, 2)
        elif name != "up_proj":
            found[layer, name.replace("down_proj", "down")] = delta
    return found


def _torch(array: mx.array) -> torch.Tensor:
    return torch.tensor(array.astype(mx.float32).tolist())
