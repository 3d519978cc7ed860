"""Loads adapters with vLLM's own code on a CPU, and reads back what its layers hold.

vLLM builds the whole model, `LRUCacheWorkerLoRAManager` loads the adapter and puts it into the
layers' buffers. Nothing is computed. Stubs, each for something that a CPU lacks:

- torchvision's operators (`torchvision_operators.py`), because its wheel belongs to another build
  of torch: models with images import it, and no adapter touches it.
- The process in which vLLM inspects a model class: it would not have the stubs.
- The MoE kernel of `FusedMoEWithLoRA`: a CPU has none that takes LoRA. The layer's own buffers and
  its `set_lora` stay.
- `is_cuda_alike` where vLLM asks whether experts without a gate can run.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from readers.deltas import Deltas, layer_of

os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import vllm.model_executor.models.registry as registry
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.common.cli_args import make_arg_parser
from vllm.lora.layers.base import BaseLayerWithLoRA
from vllm.lora.layers.fused_moe import FusedMoEWithLoRA
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.layers.fused_moe import config as moe_config
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.utils.torch_utils import set_default_torch_dtype

__all__ = ["FLAG", "load", "parser"]

FLAG = {"enable_mixed_moe_lora_format": True}


class _LikeCuda:
    """vLLM's platform, except that it says it is like CUDA."""

    def __getattr__(self, name: str) -> Any:
        return getattr(current_platform, name)

    def is_cuda_alike(self) -> bool:
        return True


def parser() -> FlexibleArgumentParser:
    """The parser of `vllm serve`."""
    return make_arg_parser(FlexibleArgumentParser())


def _init_without_kernel(self: FusedMoEWithLoRA, base_layer: nn.Module) -> None:
    """What `FusedMoEWithLoRA.__init__` sets, without its kernel."""
    BaseLayerWithLoRA.__init__(self)
    self.base_layer = base_layer
    self.moe_config = base_layer.moe_config
    self._shared_experts = base_layer._shared_experts
    self._ep_check()
    self.tp_size = self.moe_config.moe_parallel_config.tp_size
    self.tp_rank = self.moe_config.moe_parallel_config.tp_rank
    self.device = torch.device("cpu")
    self._w13_slices = 1 + int(self.moe_config.is_act_and_mul)
    self.enable_moe_shared_loras = False
    self.n_slices = self.local_num_experts * (self._w13_slices + 1)


registry._run_in_subprocess = lambda inspect: inspect()
moe_config.current_platform = _LikeCuda()
FusedMoEWithLoRA.__init__ = _init_without_kernel
FusedMoEWithLoRA.set_mapping = BaseLayerWithLoRA.set_mapping


def load(base: Path, adapter: Path, stacked: bool, **flags: Any) -> Deltas:
    """The deltas in vLLM's layers after it loaded an adapter.

    Args:
        base: folder with the base's config.json.
        adapter: folder of the adapter.
        stacked: `is_3d_lora_weight` of the request, which vLLM reads only with the flag.
        flags: further arguments of the engine.
    """
    arguments = EngineArgs(
        model=str(base),
        skip_tokenizer_init=True,
        load_format="dummy",
        enable_lora=True,
        max_lora_rank=8,
        dtype="float32",
        enforce_eager=True,
        **flags,
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config):
        manager = _manager(config)
        request = LoRARequest("adapter", 1, str(adapter), is_3d_lora_weight=bool(flags) and stacked)
        manager.add_adapter(request)
        return _deltas(manager._adapter_manager)


def _manager(config: VllmConfig) -> LRUCacheWorkerLoRAManager:
    if not torch.distributed.is_initialized():
        init_distributed_environment(1, 0, f"file://{tempfile.mktemp()}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    with set_default_torch_dtype(torch.float32):
        model = initialize_model(config)
    names = getattr(model, "embedding_modules", {})
    manager = LRUCacheWorkerLoRAManager(config, torch.device("cpu"), names)
    manager.create_lora_manager(model, config)
    return manager


def _deltas(manager: Any) -> Deltas:
    found: Deltas = {}
    for path, module in manager.modules.items():
        if "layers." not in path or path.startswith("visual"):
            continue
        layer = layer_of(path)
        if isinstance(module, FusedMoEWithLoRA):
            pairs = zip(module.w13_lora_a_stacked, module.w13_lora_b_stacked, strict=True)
            found[layer, "gate_up"] = torch.cat([B[0] @ A[0] for A, B in pairs], 1)
            found[layer, "down"] = module.w2_lora_b_stacked[0][0] @ module.w2_lora_a_stacked[0][0]
            continue
        name = path.rpartition(".")[2]
        names = manager.packed_modules_mapping.get(name, [name])
        As = _tuple(module.lora_a_stacked)
        Bs = _tuple(module.lora_b_stacked)
        if len(names) != len(As):
            continue
        for name, A, B in zip(names, As, Bs, strict=True):
            found[layer, name] = B[0].squeeze(0) @ A[0].squeeze(0)
    return found


def _tuple(stacked: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    if isinstance(stacked, torch.Tensor):
        return (stacked,)
    return stacked
