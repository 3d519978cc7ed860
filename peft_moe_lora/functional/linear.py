"""y = W x + bias + scaling * B (A drop(x)), with gradients of x, A and B: a linear layer's LoRA.

One step of autograd in the dtype of the activations; the gradients of A and B are computed in their
own dtype. Forward keeps x itself, which layers with the same input share, xa, and A and B: where
PyTorch computes all products, in the dtype of the activations. With dropout it also keeps a mask,
one byte for each element of x.

On a GPU the products of rank r run in kernels (`linear_kernels`), without dropout, in 16-bit
dtypes, and where nothing traces or watches PyTorch's operations.

Legend:
    rows: all dimensions but the last, flattened into T
    xa [T, r] = scaling * drop(x) A^T
    yb [T, r] = scaling * dy B
    dx = dy W + drop(yb A), dA = yb^T drop(x), dB = dy^T xa

Source: Hu et al. 2021, arXiv:2106.09685.
"""

from typing import Any, NamedTuple, TypeAlias

import torch

from .linear_kernels import add_update, has_kernels, update_gradients
from .operators import (
    applied,
    as_stored,
    is_autocast_enabled,
    is_differentiated,
    without_autocast,
)


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
    lora_A, lora_B, scaling, p = update
    tensors = (x, lora_A, lora_B, y, weight, bias)
    settings = (scaling, p, dtype, has_kernels(x, lora_A, lora_B, y, p, dtype))
    # an autograd function costs the host as much as the products
    if not is_differentiated(tensors):
        return _products(*tensors, settings)[0]
    return applied(_UpdatedLinear, *tensors, settings)


# what `_UpdatedLinear` takes beside tensors: scaling, dropout_p, the dtype of the products, and
# whether those of rank r run in kernels
_Settings: TypeAlias = tuple[float, float, torch.dtype, bool]


def _products(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    settings: _Settings,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """What forward computes.

    Either y is given, or weight and bias are; the others are None.

    Returns: out [..., N], which is no view; lora_A and lora_B as backward multiplies them; the
        mask [T, K] bool, or None without dropout; xa.
    """
    # an empty context takes the host a microsecond
    if is_autocast_enabled(x):
        with without_autocast(x.device.type):
            return _products(x, lora_A, lora_B, y, weight, bias, settings)
    scaling, p, dtype, by_kernels = settings
    if by_kernels:
        out, xa = add_update(_in(x, dtype), lora_A, lora_B, y, weight, bias, scaling)
        return out, lora_A, lora_B, None, xa
    rows = _rows(x, dtype)
    A = _in(lora_A, dtype)
    B = _in(lora_B, dtype)
    dropped = rows
    mask = None
    if p:
        dropped, mask = torch.native_dropout(rows, p, True)
    xa = _scaled_mm(dropped, A.mT, scaling)
    # written through a view: autograd would not let a model change a view in place, as llama4
    # changes its queries
    if weight is not None:
        N = weight.shape[0]
        out = rows.new_empty(*x.shape[:-1], N)
        flat = out.view(-1, N)
        _write_linear(flat, rows, weight, bias)
        flat.addmm_(xa, B.mT)
    else:
        assert y is not None, "a layer or its output"
        N = y.shape[-1]
        out = torch.empty_like(y, memory_format=torch.contiguous_format)
        _write_sum(out.view(-1, N), y.reshape(-1, N), xa, B.mT)
    return out, A, B, mask, xa


class _UpdatedLinear(torch.autograd.Function):
    """Takes the arguments of `_products`."""

    @staticmethod
    def forward(
        # autograd's context accepts any attribute, but its class declares none
        ctx: Any,
        *arguments: Any,
    ) -> torch.Tensor:
        x, lora_A, lora_B, _, weight, _, settings = arguments
        by_kernels = settings[-1]
        out, A, B, mask, xa = _products(*arguments)
        needs_x, needs_A, needs_B = ctx.needs_input_grad[:3]
        ctx.constants = settings, x.shape, x.dtype, lora_A.dtype, lora_B.dtype
        ctx.save_for_backward(
            x if needs_A else None,
            mask,
            weight if needs_x else None,
            A if needs_x or by_kernels else None,
            B if needs_x or needs_A or by_kernels else None,
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
        if is_autocast_enabled(dy):
            with without_autocast(dy.device.type):
                return _gradients(ctx, dy)
        return _gradients(ctx, dy)


def _gradients(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """The gradients of the arguments of `_UpdatedLinear`, from its context."""
    # read once: under checkpointing each access unpacks the tensors, and may recompute them
    x, mask, weight, A, B, xa = ctx.saved_tensors
    (scaling, p, dtype, by_kernels), shape, x_dtype, A_dtype, B_dtype = ctx.constants
    needs_x, needs_A, needs_B, needs_y = ctx.needs_input_grad[:4]
    dx = dA = dB = None
    if by_kernels and torch.compiler.is_compiling():
        # compiled autograd traces the backward of an eager forward
        A, B = _in(A, dtype), _in(B, dtype)
        xa = None if xa is None else xa[:, : len(A)]
    elif by_kernels and (needs_x or needs_A or needs_B):
        x = _in(x, dtype) if needs_A else None
        dx, dA, dB = update_gradients(_in(dy, dtype), x, A, B, xa, weight, scaling, needs_x)
        if dx is not None:
            dx = _in(dx, x_dtype)
        # kernels multiply A and B as they are stored
        dA, dB = as_stored(dA, A), as_stored(dB, B)
        return dx, dA, dB, dy if needs_y else None, None, None, None
    rows = _rows(dy, dtype)
    if needs_x or needs_A:
        yb = _scaled_mm(rows, B, scaling)
    if needs_x:
        dx = _in(_input_gradient(rows, weight, yb, A, mask, p).view(*shape), x_dtype)
    if needs_A:
        dA = _outer(yb, _masked(_rows(x, dtype), mask, p), A_dtype)
    if needs_B:
        dB = _outer(rows, xa, B_dtype)
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
        return _masked(torch.mm(yb, A), mask, p)
    dx = torch.mm(rows, weight)
    if mask is None:
        return dx.addmm_(yb, A)
    return dx.add_(_masked(torch.mm(yb, A), mask, p))


def _rows(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x as [T, K] in a dtype; nothing is copied where nothing changes."""
    return _in(x.reshape(-1, x.shape[-1]), dtype)


def _in(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """tensor.to(dtype), whose arguments take the host longer to read."""
    if tensor.dtype == dtype:
        return tensor
    return tensor.type(dtype)


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


def _write_linear(
    out: torch.Tensor, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> None:
    """out = rows @ weight^T + bias."""
    if bias is None:
        torch.mm(rows, weight.mT, out=out)
    else:
        torch.addmm(bias, rows, weight.mT, out=out)


def _write_sum(out: torch.Tensor, y: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """out = y + left @ right, in the dtype of y."""
    if y.dtype == left.dtype:
        torch.addmm(y, left, right, out=out)
    else:
        torch.add(y, torch.mm(left, right), out=out)


def _outer(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """left^T right in a dtype, and without rounding it to that of the factors where CUDA can."""
    narrow = left.dtype in (torch.bfloat16, torch.float16)
    if left.is_cuda and torch.version.hip is None and narrow and dtype == torch.float32:
        return torch.mm(left.mT, right, out_dtype=dtype)
    return _in(torch.mm(left.mT, right), dtype)
