"""y = W x + bias + scaling * B (A drop(x)), with gradients of x, A and B: a linear layer's LoRA.

One step of autograd in the dtype of the activations; the gradients of A and B are computed in their
own dtype. Forward keeps x itself, which layers with the same input share, xa, and A and B in the
dtype of the activations. With dropout it also keeps a mask, one byte for each element of x.

Legend:
    rows: all dimensions but the last, flattened into T
    xa [T, r] = scaling * drop(x) A^T
    yb [T, r] = scaling * dy B
    dx = dy W + drop(yb A), dA = yb^T drop(x), dB = dy^T xa

Source: Hu et al. 2021, arXiv:2106.09685.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .operators import is_differentiated, without_autocast


class FrozenLinear(NamedTuple):
    """A linear layer that gets no gradients.

    Attributes:
        weight: [N, K], in the dtype of the computation.
        bias: [N], or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None


class LinearUpdate(NamedTuple):
    """The low-rank update of a linear layer.

    Attributes:
        lora_A: [r, K] float.
        lora_B: [N, r] float.
        scaling: lora_alpha / r.
        dropout_p: probability that an element of x is dropped, in [0, 1).
    """

    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float
    dropout_p: float = 0.0


def updated_linear(
    x: torch.Tensor,
    base: FrozenLinear | torch.Tensor,
    update: LinearUpdate,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A linear layer with its update.

    Args:
        x: [..., K] float.
        base: the layer; or its output [..., N], to which the update's share is added.
        update: A and B.
        dtype: float dtype in which A and B are multiplied; with a `FrozenLinear`, that of its
            weight too.
    Returns: [..., N], in the dtype of base.
    Raises:
        RuntimeError: in backward, if second derivatives are asked for.
    """
    y: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    if isinstance(base, FrozenLinear):
        weight, bias = base
    else:
        y = base
    settings = Settings(update.scaling, update.dropout_p, dtype)
    arguments = (x, update.lora_A, update.lora_B, y, weight, bias)
    # an autograd function costs the host as much as the products
    if is_differentiated(arguments):
        return _UpdatedLinear.apply(*arguments, settings)
    return _products(*arguments, settings).out


class Settings(NamedTuple):
    """What `_UpdatedLinear` takes beside tensors: fields of `LinearUpdate`, and the dtype."""

    scaling: float
    dropout_p: float
    dtype: torch.dtype


class _Products(NamedTuple):
    """What forward computes.

    Attributes:
        out: [..., N], no view for autograd.
        A, B: lora_A and lora_B in the dtype of the products.
        mask: [T, K] bool, or None without dropout.
        xa: as in the legend.
    """

    out: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    mask: torch.Tensor | None
    xa: torch.Tensor


def _products(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    settings: Settings,
) -> _Products:
    """Either y is given, or weight and bias are; the others are None."""
    scaling, p, dtype = settings
    with without_autocast(x.device.type):
        rows = _rows(x, dtype)
        A = lora_A.to(dtype)
        B = lora_B.to(dtype)
        dropped = rows
        mask = None
        if p:
            dropped, mask = torch.native_dropout(rows, p, True)
        xa = _scaled_mm(dropped, A.mT, scaling)
        if weight is not None:
            out = F.linear(rows, weight, bias).addmm_(xa, B.mT)
        else:
            assert y is not None, "a layer or its output"
            out = _plus(_rows(y, y.dtype), xa, B.mT)
        # a model may change the output in place, as llama4 does its queries
        out = torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]])
    return _Products(out, A, B, mask, xa)


class _UpdatedLinear(torch.autograd.Function):
    """Takes the arguments of `_products`."""

    @staticmethod
    def forward(
        # autograd's context accepts any attribute, but its class declares none
        ctx: Any,
        *arguments: Any,
    ) -> torch.Tensor:
        x, lora_A, lora_B, _, weight, _, settings = arguments
        out, A, B, mask, xa = _products(*arguments)
        needs_x, needs_A, needs_B = ctx.needs_input_grad[:3]
        ctx.settings = settings
        ctx.x_like = x.shape, x.dtype
        ctx.dtypes = lora_A.dtype, lora_B.dtype
        ctx.save_for_backward(
            x if needs_A else None,
            mask,
            weight if needs_x else None,
            A if needs_x else None,
            B if needs_x or needs_A else None,
            xa if needs_B else None,
        )
        return out

    @staticmethod
    def backward(  # type: ignore[override]  # torch: any number of gradients
        ctx: Any, dy: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # what was kept is constant in them, so they would be wrong
            raise RuntimeError(
                "create_graph=True: this linear layer's LoRA computes no second derivatives; use "
                "PEFT's own layer, MoELoraConfig(fast_linear=False)."
            )
        # read once: under checkpointing each access unpacks the tensors, and may recompute them
        x, mask, weight, A, B, xa = ctx.saved_tensors
        scaling, p, dtype = ctx.settings
        needs_x, needs_A, needs_B, needs_y = ctx.needs_input_grad[:4]
        shape, x_dtype = ctx.x_like
        dx = dA = dB = None
        with without_autocast(dy.device.type):
            rows = _rows(dy, dtype)
            if needs_x or needs_A:
                yb = _scaled_mm(rows, B, scaling)
            if needs_x:
                dx = _input_gradient(rows, weight, yb, A, mask, p).view(shape).to(x_dtype)
            if needs_A:
                dA = _outer(yb, _masked(_rows(x, dtype), mask, p), ctx.dtypes[0])
            if needs_B:
                dB = _outer(rows, xa, ctx.dtypes[1])
        return dx, dA, dB, dy if needs_y else None, None, None, None


def _input_gradient(
    rows: torch.Tensor,
    weight: torch.Tensor | None,
    yb: torch.Tensor,
    A: torch.Tensor,
    mask: torch.Tensor | None,
    p: float,
) -> torch.Tensor:
    """dy W + drop(yb A), or drop(yb A) without a weight.

    Args:
        rows: [T, N], gradient of the output.
        weight: [N, K], or None.
        yb: [T, r].
        A: [r, K].
        mask: [T, K] bool, or None without dropout.
        p: probability that an element of x is dropped.
    Returns: [T, K].
    """
    if weight is None:
        return _masked(yb @ A, mask, p)
    if mask is None:
        return (rows @ weight).addmm_(yb, A)
    return (rows @ weight).add_(_masked(yb @ A, mask, p))


def _rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x as [T, K] in a dtype; nothing is copied where nothing changes."""
    return x.reshape(-1, x.shape[-1]).to(dtype)


def _masked(x: torch.Tensor, mask: torch.Tensor | None, p: float) -> torch.Tensor:
    """x * mask / (1 - p), as `torch.native_dropout` computes it; x itself without a mask."""
    if mask is None:
        return x
    return torch.ops.aten.native_dropout_backward(x, mask, 1 / (1 - p))


def _scaled_mm(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * left @ right, in one launch."""
    if torch.compiler.is_compiling():
        # the compiler may choose a product that multiplies what is uninitialised by beta
        return left @ right * scaling
    out = left.new_empty(left.shape[0], right.shape[1])
    return out.addmm_(left, right, beta=0, alpha=scaling)


def _plus(y: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """y + left @ right, in the dtype of y."""
    if y.dtype == left.dtype:
        return torch.addmm(y, left, right)
    return (y + left @ right).to(y.dtype)


def _outer(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """left^T right in a dtype, and without rounding it to that of the factors where CUDA can."""
    narrow = left.dtype in (torch.bfloat16, torch.float16)
    if left.is_cuda and torch.version.hip is None and narrow and dtype == torch.float32:
        return torch.mm(left.mT, right, out_dtype=dtype)
    return (left.mT @ right).to(dtype)
