"""Loads adapters with SGLang's own code on a CPU, and reads back what its memory pool holds.

SGLang builds the whole model, `LoRAManager` loads the adapter and puts it into the pool's buffers.
Nothing is computed. Stubs, each for something that a CPU lacks:

- torchvision's operators (`torchvision_operators.py`), because its wheel belongs to another build
  of torch: models with images import it, and no adapter touches it.
- Pinned memory: offsets of stacked projections are staged in it.
- The binding of threads to cores, which SGLang's kernels for a CPU bring.
"""

import argparse
import os
from pathlib import Path
from typing import Any

import sglang.srt.lora.layers as lora_layers
import torch
from sglang.srt.arg_groups import mamba_hook
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import bootstrap
from sglang.srt.lora.lora_manager import LoRAManager
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.model_loader.loader import _initialize_model
from sglang.srt.model_loader.utils import set_default_torch_dtype
from sglang.srt.runtime_context import SpawnRanks, get_lora, publish
from sglang.srt.server_args import ServerArgs

from readers.deltas import Deltas, layer_of

__all__ = ["load", "parser"]

# name of a layer of SGLang -> the projections that it stacks
_STACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
}
_RANK = 8


class _Unpinned:
    """torch, except that nothing is pinned."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def tensor(self, *args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        return torch.tensor(*args, **kwargs)


lora_layers.torch = _Unpinned()
torch.Tensor.pin_memory = lambda self: self
bootstrap._bind_threads_if_cpu = lambda device: None
bootstrap._init_cpu_threads_env = lambda **settings: None
mamba_hook._platform_supports_mamba_cache_extra_buffer = lambda: True


def parser() -> argparse.ArgumentParser:
    """The parser of `sglang.launch_server`."""
    made = argparse.ArgumentParser()
    ServerArgs.add_cli_args(made)
    return made


def load(base: Path, adapter: Path) -> Deltas:
    """The deltas in SGLang's memory pool after it loaded an adapter.

    Args:
        base: folder with the base's config.json.
        adapter: folder of the adapter.
    """
    arguments = ServerArgs(
        model_path=str(base),
        device="cpu",
        enable_lora=True,
        lora_paths=[str(adapter)],
        max_lora_rank=_RANK,
        skip_tokenizer_init=True,
        load_format="dummy",
        dtype="float32",
        lora_backend="triton",
        max_loras_per_batch=2,
    )
    publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
    if not torch.distributed.is_initialized():
        port = 20000 + os.getpid() % 20000
        bootstrap.init_parallel_runtime(server_args=arguments, device="cpu", dist_port=port)
    reference = LoRARef(lora_name="adapter", lora_path=str(adapter), pinned=False)
    manager = _manager(arguments, reference)
    manager.fetch_new_loras({reference.lora_id})
    return _deltas(manager, reference.lora_id)


def _manager(arguments: ServerArgs, reference: LoRARef) -> LoRAManager:
    model_config = ModelConfig.from_server_args(arguments)
    with set_default_torch_dtype(torch.float32):
        model = _initialize_model(model_config, LoadConfig())
    lora = get_lora()
    return LoRAManager(
        base_model=model,
        base_hf_config=model_config.hf_config,
        max_loras_per_batch=lora.max_loras_per_batch,
        load_config=LoadConfig(),
        dtype=torch.float32,
        server_args=arguments,
        lora_backend=lora.lora_backend,
        max_lora_rank=lora.max_lora_rank,
        target_modules=lora.lora_target_modules,
        lora_paths=[reference],
    )


def _deltas(manager: LoRAManager, adapter: str) -> Deltas:
    found: Deltas = {}
    slot = manager.memory_pool.uid_to_buffer_id[adapter]
    r = manager.configs[adapter].r
    scaling = manager.loras[adapter].scaling
    for modules in manager.lora_modules:
        for path, module in modules.items():
            layer = layer_of(path)
            if isinstance(module, lora_layers.FusedMoEWithLoRA):
                found[layer, "gate_up"] = _gate_up(module, slot, r)
                A = module.down_lora_a_weights[slot][:, :r]
                found[layer, "down"] = module.down_lora_b_weights[slot][..., :r] @ A
                continue
            name = path.rpartition(".")[2]
            names = _STACKED.get(name, (name,))
            A, B = _factors(module, slot)
            starts = _starts(module, len(names), B.shape[0])
            for i, name in enumerate(names):
                rows = B[starts[i] : starts[i + 1], :r]
                found[layer, name] = scaling * (rows @ A[i * r : (i + 1) * r])
    return found


def _gate_up(module: Any, slot: int, r: int) -> torch.Tensor:
    """[E, N, K]; A holds gate from row 0 and up from row `_RANK`. B holds the scaling."""
    A = module.gate_up_lora_a_weights[slot]
    B = module.gate_up_lora_b_weights[slot][..., :r]
    pieces = A.shape[1] // _RANK
    return torch.cat(
        [rows @ A[:, i * _RANK : i * _RANK + r] for i, rows in enumerate(B.chunk(pieces, 1))],
        1,
    )


def _factors(module: Any, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    for suffix in ("", "_qkv", "_gate_up"):
        if hasattr(module, f"A_buffer{suffix}"):
            A = getattr(module, f"A_buffer{suffix}")
            return A[slot], getattr(module, f"B_buffer{suffix}")[slot]
    raise AssertionError(f"{type(module).__name__} has no buffers")


def _starts(module: Any, pieces: int, rows: int) -> list[int]:
    """The first row of each stacked projection, and the number of all rows."""
    if pieces == 1:
        return [0, rows]
    if pieces == 2:
        return [0, module.first_output_dim, rows]
    layer = module.base_layer
    return [0, layer.q_proj_shard_size, layer.q_proj_shard_size + layer.kv_proj_shard_size, rows]
