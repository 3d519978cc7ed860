"""Whole Qwen3-MoE models with random weights, dense or quantized, and adapters to train on them."""

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from cases import PROJECTIONS
from peft_moe_lora import MoELoraConfig, keep_experts
from peft_moe_lora.experts.decoding import store
from peft_moe_lora.ops.quantize import quantize
from routes import Parameters, apply_to, moe_lora_parameters, peft_parameters

# peft 0.21 reads a name that transformers 5.23 deprecates; drop when peft's floor moves
warnings.filterwarnings(
    "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
# arguments of `quantize`
FORMATS = {
    "nf4": {"format": "nf4"},
    "nf4-plain": {"format": "nf4", "double_quant": False},
    "fp4": {"format": "fp4"},
    "int8": {"format": "int8"},
}


# ---- the frozen base ---------------------------------------------------------------------------


def build_dense(sizes: dict, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A frozen model made on the device; sdpa, experts on grouped_mm."""
    config = Qwen3MoeConfig(**sizes, use_cache=False)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.set_experts_implementation("grouped_mm")
    return model.requires_grad_(False).train()


def build_quantized(
    sizes: dict, format: str, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A frozen model whose experts are quantized one projection at a time: it is never dense."""
    config = Qwen3MoeConfig(**sizes)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config).to(dtype)

    def normal(shape: torch.Size) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02)

    for decoder in model.model.layers:
        experts = decoder.mlp.experts
        for name in (f"{projection}_proj" for projection in PROJECTIONS):
            dense = normal(getattr(experts, name).shape)
            store(experts, name, quantize(dense, **FORMATS[format]))
            del dense
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            value = normal(parameter.shape)
            # the only vectors are weights of norms
            if parameter.ndim == 1:
                value.fill_(1.0)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    return model.requires_grad_(False)


def sharing_weights(base: nn.Module) -> nn.Module:
    """A second model on the same parameters in memory."""
    shared = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    return copy.deepcopy(base, shared)


def set_checkpointing(model: nn.Module, on: bool, keeps: bool = False) -> None:
    """Turn checkpointing of every layer on (non-reentrant) or off.

    Args:
        keeps: whether experts run once, see `keep_experts`.
    """
    options: dict[str, object] = {"use_reentrant": False}
    if keeps:
        options["context_fn"] = keep_experts
    # transformers 5.17 has only the old name, 5.23 warns of it; drop when the floor moves
    word = "gradient"
    if hasattr(model, "activation_checkpointing_enable"):
        word = "activation"
    if on:
        getattr(model, f"{word}_checkpointing_enable")(options)
    else:
        getattr(model, f"{word}_checkpointing_disable")()


def compile_layers(model: nn.Module) -> None:
    """Compile each decoder layer by itself; they share their graphs."""
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile()


# ---- the adapters ------------------------------------------------------------------------------


@dataclass
class ModelRoute:
    """One model that trains.

    Attributes:
        model: called as model(input_ids=..., labels=...).
        trained: its adapter's parameters, see `moe_lora_parameters`; empty without an adapter.
        optimizer: over `trained`; None without an adapter.
        rank_major: whether B of its experts are rank-major, see `to_rank_major`.
    """

    model: nn.Module
    trained: Parameters = field(default_factory=dict)
    optimizer: torch.optim.Optimizer | None = None
    rank_major: bool = False

    def step(self, ids: torch.Tensor) -> None:
        """A training step on [batch, T] token ids."""
        self.model(input_ids=ids, labels=ids).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def static_bytes(self) -> int:
        """Bytes of the adapter and of the optimizer's state on the adapter's device."""
        if self.optimizer is None:
            return 0
        device = next(iter(self.trained.values())).device
        tensors = [*self.trained.values(), *self._state()]
        return sum(t.nbytes for t in tensors if t.device.type == device.type)

    def _state(self) -> Iterator[torch.Tensor]:
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    yield value


def base_route(base: nn.Module, rank: int) -> ModelRoute:
    """The frozen model alone; it goes backward through every layer all the same."""
    model = sharing_weights(base)
    model.enable_input_require_grads()
    return ModelRoute(model)


def frozen_route(base: nn.Module, rank: int) -> ModelRoute:
    """The frozen model alone, its experts on this package's kernels."""
    route = base_route(base, rank)
    route.model.requires_grad_(False)
    route.model.set_experts_implementation("moe_lora")
    return route


def peft_route(base: nn.Module, rank: int, applied: bool = False) -> ModelRoute:
    """PEFT's own: its LoRA on attention, a ParamWrapper for each of the experts' parameters.

    Args:
        applied: whether it computes as under `apply_to_peft()`.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=ATTENTION,
        target_parameters=[f"experts.{projection}_proj" for projection in PROJECTIONS],
    )
    model = get_peft_model(sharing_weights(base), config)
    if applied:
        apply_to(model)
    return trainable(model, peft_parameters(model), rank_major=True)


def moe_lora_route(base: nn.Module, rank: int, **settings: object) -> ModelRoute:
    """peft_moe_lora as a user gets it; `settings` are further fields of its configuration."""
    targets = ["experts", *ATTENTION]
    config = MoELoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, **settings)
    model = get_peft_model(sharing_weights(base), config)
    return trainable(model, moe_lora_parameters(model))


def trainable(model: nn.Module, trained: Parameters, rank_major: bool = False) -> ModelRoute:
    """The route of a model with an adapter: AdamW, and a gradient through every layer."""
    model.enable_input_require_grads()
    fused = next(iter(trained.values())).is_cuda
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-5, fused=fused)
    return ModelRoute(model.train(), trained, optimizer, rank_major)


MODEL_ROUTES: dict[str, Callable[[nn.Module, int], ModelRoute]] = {
    "base": base_route,
    "frozen": frozen_route,
    "peft": peft_route,
    "peft-applied": partial(peft_route, applied=True),
    "moe_lora": moe_lora_route,
    "moe_lora-recompute": partial(moe_lora_route, recompute=True),
    # PEFT's forward in the linear layers
    "moe_lora-peft-linear": partial(moe_lora_route, fast_linear=False),
}
