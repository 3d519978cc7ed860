"""Functions that take the place of kernels on the meta device: attention, RMSNorm, the loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface

from .trace import Trace
from .work import Work, attention_work

# name of the attention in transformers' registry
NAME = "moe_lora_planning"


@contextmanager
def attention_stand_in(trace: Trace) -> Iterator[None]:
    """Attention that keeps q, k, v, the output and the log-sum-exp, as flash attention does."""

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Any, key: Any, value: Any) -> torch.Tensor:
            out = query.new_empty(*query.shape[:3], value.shape[3])
            lse = query.new_empty(query.shape[:3], dtype=torch.float32)
            ctx.save_for_backward(query, key, value, out, lse)
            trace.add(attention_work(query, key, backward=False))
            return out

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> Any:
            query, key, value, *_ = ctx.saved_tensors
            trace.add(attention_work(query, key, backward=True))
            return tuple(torch.empty_like(tensor) for tensor in (query, key, value))

    def attention(
        module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **_: Any
    ) -> tuple[torch.Tensor, None]:
        return Attention.apply(query, key, value).transpose(1, 2), None

    AttentionInterface.register(NAME, attention)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(NAME)


class FusedNorm(torch.autograd.Function):
    """RMSNorm that keeps its input and one number a row, as Liger's does; dx takes dy's place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, trace: Trace) -> torch.Tensor:
        trace.add(Work(nbytes=2 * x.nbytes))
        ctx.trace = trace
        ctx.save_for_backward(x, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        ctx.trace.add(Work(nbytes=3 * gradient.nbytes))
        return gradient, None


def norms_stand_in(model: nn.Module, trace: Trace) -> None:
    """Give every RMSNorm of a model the memory and time of Liger's."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_fused_norm, trace)


def _fused_norm(trace: Trace, x: torch.Tensor) -> torch.Tensor:
    return cast(torch.Tensor, FusedNorm.apply(x, trace))


class ChunkedLoss(torch.autograd.Function):
    """Head and cross entropy in chunks of tokens, as Liger's fused loss computes them.

    Forward computes the gradient of the hidden states too; the logits of one chunk are in memory at
    a time, in the model's dtype and in fp32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Any, head: Any, trace: Trace) -> torch.Tensor:
        tokens, H = hidden.shape
        vocabulary = head.shape[0]
        chunk = _chunk(tokens, vocabulary, H)
        trace.add(
            Work(
                flops=2 * 2 * tokens * H * vocabulary,
                nbytes=4 * head.nbytes * tokens / chunk,
                scratch=chunk * vocabulary * (hidden.element_size() + 4),
                launches=10,
            )
        )
        ctx.save_for_backward(torch.empty_like(hidden))
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (found,) = ctx.saved_tensors
        return found, None, None


def _chunk(tokens: int, vocabulary: int, H: int) -> int:
    """Tokens of a chunk, so that its logits are about as large as the hidden states.

    Source: liger_kernel.ops.fused_linear_cross_entropy, 0.6.
    """
    parts = -(-vocabulary // H)
    rows = -(-tokens // parts)
    return 1 << (rows - 1).bit_length()
