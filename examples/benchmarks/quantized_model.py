"""Train the whole of Qwen3-30B-A3B with quantized experts in 24 GB, on random weights.

The model is built layer by layer and is never dense as a whole. LoRA is on every expert and on
attention; gradient checkpointing, AdamW. Memory is that of torch.cuda.max_memory_allocated. On
a CPU a tiny model is trained.

Where parameters step in backward, each has an optimizer of its own, which steps as soon as its
gradient is there and drops it. So no more than one layer's gradients are in memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from cases import QWEN3_30B, TINY_QWEN3
from models import ATTENTION, build_quantized, compile_layers, set_checkpointing
from peft_moe_lora import MoELoraConfig
from timing import seconds_per_call

GIB = 2**30
# by their names in TrainingArguments
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_8bit")
LR = 1e-4


class Memory:
    """GiB at each stage of a run on a GPU; nothing on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stages: dict[str, dict[str, float]] = {}

    def note(self, stage: str) -> None:
        """Read what is held now, and the peaks since the last stage."""
        if self.device.type != "cuda":
            return
        torch.cuda.synchronize(self.device)
        self.stages[stage] = {
            "held": torch.cuda.memory_allocated() / GIB,
            "peak": torch.cuda.max_memory_allocated() / GIB,
            "reserved": torch.cuda.max_memory_reserved() / GIB,
        }
        torch.cuda.reset_peak_memory_stats()


def optimizer_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    """What makes an optimizer of a name in `OPTIMIZERS` from parameters and lr.

    Raises:
        ValueError: if bitsandbytes is needed and missing.
    """
    if name == "adamw_torch":
        return torch.optim.AdamW
    if name == "adamw_torch_fused":
        return partial(torch.optim.AdamW, fused=True)
    try:
        from bitsandbytes.optim import AdamW
    except ImportError as error:
        raise ValueError("adamw_8bit needs bitsandbytes: pip install '.[bitsandbytes]'") from error
    return partial(AdamW, optim_bits=8)


def optimizers_of(
    trained: list[nn.Parameter],
    make: Callable[..., torch.optim.Optimizer],
    in_backward: bool,
) -> list[torch.optim.Optimizer]:
    """One optimizer of all parameters, or one of each, which steps in backward."""
    if not in_backward:
        return [make(trained, lr=LR)]
    return [steps_in_backward(parameter, make([parameter], lr=LR)) for parameter in trained]


def steps_in_backward(
    parameter: nn.Parameter, optimizer: torch.optim.Optimizer
) -> torch.optim.Optimizer:
    """Let an optimizer of one parameter step when backward has made the gradient."""

    def step(_: torch.Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    parameter.register_post_accumulate_grad_hook(step)
    return optimizer


def state_bytes(optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of the state of optimizers; what several parameters share counts once."""
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    values = [value for state in states for value in state.values()]
    tensors = {id(value): value for value in values if isinstance(value, torch.Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())


def loss_of(model: nn.Module, ids: torch.Tensor, chunk: int | None) -> torch.Tensor:
    """Cross entropy of the next token.

    Args:
        ids: [batch, T] token ids.
        chunk: the logits of so many tokens are formed at a time, in forward and again in backward;
            None forms all of them at once.
    """
    if chunk is None:
        return model(input_ids=ids, labels=ids, use_cache=False).loss
    inner = model.get_base_model()
    hidden = inner.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()

    def loss_of_chunk(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(inner.lm_head(hidden).float(), targets, reduction="sum")

    def losses() -> Iterator[torch.Tensor]:
        for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            yield checkpoint(loss_of_chunk, h, t, use_reentrant=False)

    return torch.stack(list(losses())).sum() / len(targets)


@dataclass(frozen=True)
class Training:
    """What is trained, and how.

    Attributes:
        format: of the experts, a key of `models.FORMATS`.
        rank: r; lora_alpha is 2 r.
        tokens: of the one sequence.
        steps: how many are trained.
        loss_chunk: see `loss_of`.
        optimizer: one of `OPTIMIZERS`.
        step_in_backward: whether every parameter steps as soon as its gradient is there.
        one_thread: whether backward runs in the caller's thread, and not in autograd's own.
        compile_layers: whether each decoder layer is compiled by itself.
    """

    format: str
    rank: int
    tokens: int
    steps: int
    loss_chunk: int | None = None
    optimizer: str = "adamw_torch"
    step_in_backward: bool = False
    one_thread: bool = False
    compile_layers: bool = False


def train(training: Training, device: torch.device) -> dict[str, Any]:
    """Train the whole model for some steps on one sequence.

    Returns: sizes, bytes of the optimizer's state, GiB at each stage, ms and loss of every step.
    """
    sizes = TINY_QWEN3
    dtype = torch.float32
    if device.type == "cuda":
        sizes = QWEN3_30B
        dtype = torch.bfloat16
    make_optimizer = optimizer_class(training.optimizer)
    memory = Memory(device)
    base = build_quantized(sizes, training.format, dtype, device)
    memory.note("built")
    targets = ["experts", *ATTENTION]
    config = MoELoraConfig(r=training.rank, lora_alpha=2 * training.rank, target_modules=targets)
    model = get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    memory.note("adapter")
    set_checkpointing(model.get_base_model(), True)
    model.train()
    if training.compile_layers:
        compile_layers(model)
    optimizers = optimizers_of(trained, make_optimizer, training.step_in_backward)
    ids = torch.randint(sizes["vocab_size"], (1, training.tokens), device=device)
    losses = []
    ms = []

    def step() -> None:
        loss = loss_of(model, ids, training.loss_chunk)
        loss.backward()
        if not training.step_in_backward:
            optimizers[0].step()
            optimizers[0].zero_grad(set_to_none=True)
        losses.append(loss.item())

    with torch.autograd.set_multithreading_enabled(not training.one_thread):
        for i in range(training.steps):
            ms.append(1e3 * seconds_per_call(step, device, 1))
            memory.note(f"step {i + 1}")
    found = {
        "sizes": sizes,
        **asdict(training),
        "state_bytes": state_bytes(optimizers),
        "trained": sum(p.numel() for p in trained),
        "losses": losses,
        "ms": ms,
        "GiB": memory.stages,
    }
    if memory.stages:
        found["peak_GiB"] = max(stage["peak"] for stage in memory.stages.values())
        found["of_24_GiB"] = found["peak_GiB"] / 24
    return found
