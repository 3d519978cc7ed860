"""What `linear` computes, with the products of rank r in kernels of this package.

W is multiplied by cuBLAS. All other products of a direction are one call, which is recorded and
replayed. So the host makes two calls in each direction, and five with PyTorch's products; and no
copies of A and B are kept. A linear layer is one expert that owns all rows.

Under torch.compile such a call is one operator. PyTorch's own `addmm` would copy y first, because
a graph writes nothing in place.

Legend: T, xa, yb, dx, dA, dB as in `linear`; xa and yb have R columns (`ops.ranks`)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..ops import BatchShape, Operations, Routing
from ..ops.ranks import stored_rank
from .backends import on_device_of, ops_for, select_backend
from .operators import Operator

# of products; those of fp32 take the device so long that the host does not bound them
DTYPES = frozenset({torch.bfloat16, torch.float16})
# a program holds all ranks of its rows in registers
MAX_RANK = 128
# a subclass may hold no data (FakeTensor), or a part of them (DTensor)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def has_kernels(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    y: torch.Tensor | None,
    dropout_p: float,
    dtype: torch.dtype,
) -> bool:
    """Whether `add_update` and `update_gradients` can compute a linear layer's update.

    Args:
        x: [..., K] float.
        lora_A, lora_B: [r, K] and [N, r] float.
        y: the output to which the update is added; None if a weight is given.
        dropout_p: probability that an element of x is dropped.
        dtype: of the products.
    """
    if not x.is_cuda:
        return False
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and _is_watched():
        return False
    if dtype not in DTYPES or dropout_p or not 0 < lora_A.shape[0] <= MAX_RANK:
        return False
    if y is not None and y.dtype != dtype:
        return False
    # what follows by itself for PyTorch's products is asked here: on one device, with data
    device = x.get_device()
    for tensor in (x, lora_A, lora_B, y):
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.get_device() != device or not tensor.numel():
            return False
    if is_compiling:
        # the operators choose between kernels and their twins when the graph runs
        return torch.version.hip is None
    return select_backend("auto", x.device) == "triton"


def _is_watched() -> bool:
    """Whether something traces or watches PyTorch's operations, as selective checkpointing does.

    It sees no kernels.
    """
    if torch._C._is_tracing() or torch._C._len_torch_dispatch_stack():
        return True
    return torch._C._are_functorch_transforms_active()


# ---- the two directions


def add_update(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    y: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out = y + xa B^T, with y = W x + bias where it is None.

    Args:
        x: [..., K].
        lora_A, lora_B: [r, K] and [N, r] float.
        y: [..., N], dtype of x; or None.
        weight, bias: [N, K] and [N], dtype of x; both may be None if y is given.
        scaling: lora_alpha / r.
    Returns: out [..., N], which is no view, and xa [T, R].
    """
    if torch.compiler.is_compiling():
        if y is None:
            assert weight is not None, "a layer or its output"
            y = F.linear(x, weight, bias)
        out, xa = _ADD.compiled(_Addends(x, lora_A, lora_B, y), _Scaling(scaling))
        return out, xa
    # with two dimensions, products take the host less
    rows = x.reshape(-1, x.shape[-1])
    if y is None:
        assert weight is not None, "a layer or its output"
        y = F.linear(rows, weight, bias)
    shape = BatchShape((*x.shape[:-1], y.shape[-1]))
    return _sum(rows, lora_A, lora_B, y, scaling, shape)


def _sum(
    rows: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    y: torch.Tensor,
    scaling: float,
    shape: BatchShape,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_update` for rows [T, K] and a given y; `shape` is that of out."""
    ops = ops_for("auto", rows.device)
    y = y.reshape(-1, y.shape[-1])
    # autograd brings backward to the device by itself
    with on_device_of(rows):
        out, xa = ops.replayed(_add_update, _adjacent(rows), lora_A, lora_B, y, scaling, shape)
    return out, xa


def _add_update(
    rows: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    y: torch.Tensor,
    scaling: float,
    shape: BatchShape,
) -> tuple[torch.Tensor, torch.Tensor]:
    ops = ops_for("auto", rows.device)
    # not written to y: selective checkpointing may have kept it, and would add to it again
    out = torch.empty(shape, dtype=y.dtype, device=y.device)
    xa = ops.add_low_rank(rows, lora_A, lora_B, scaling, y, out.view(-1, shape[-1]))
    return out, xa


def update_gradients(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    xa: torch.Tensor | None,
    weight: torch.Tensor | None,
    scaling: float,
    needs_x: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dx = dy W + yb A, dA and dB.

    Args:
        dy: [..., N].
        x: [..., K]; None if dA is not needed.
        lora_A, lora_B: [r, K] and [N, r] float.
        xa: [T, R]; None if dB is not needed.
        weight: [N, K]; None if the layer is not a part of the step.
        scaling: lora_alpha / r.
        needs_x: whether dx is needed.
    Returns: dx [..., K] in the dtype of dy, dA and dB in fp32; None where they are not needed.
    """
    dx = None
    if torch.compiler.is_compiling():
        if needs_x and weight is not None:
            dx = dy @ weight
        factors = _Factors(dy, x, lora_A, lora_B, xa, dx)
        return _GRADIENTS.compiled(factors, _Asked(scaling, needs_x))
    rows = dy.reshape(-1, dy.shape[-1])
    if needs_x and weight is not None:
        dx = torch.mm(rows, weight)
    shape = None
    if needs_x:
        shape = BatchShape((*dy.shape[:-1], lora_A.shape[1]))
    return _all_gradients(rows, x, lora_A, lora_B, xa, dx, scaling, shape)


def _all_gradients(
    rows: torch.Tensor,
    x: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    xa: torch.Tensor | None,
    dx: torch.Tensor | None,
    scaling: float,
    shape: BatchShape | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """`update_gradients` for rows [T, N] of dy, given dy W [T, K] as dx; `shape` is that of dx."""
    rows = _adjacent(rows)
    if x is not None:
        x = _adjacent(x.reshape(-1, x.shape[-1]))
    ops = ops_for("auto", rows.device)
    dx, dA, dB = ops.replayed(_update_gradients, rows, x, lora_A, lora_B, xa, dx, scaling, shape)
    return dx, dA, dB


def _update_gradients(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    xa: torch.Tensor | None,
    dx: torch.Tensor | None,
    scaling: float,
    shape: BatchShape | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """`_all_gradients` as a composition of operations."""
    ops = ops_for("auto", dy.device)
    routing = ops.one_expert(dy)
    yb = out = dA = dB = None
    if shape is not None:
        out = torch.empty(shape, dtype=dy.dtype, device=dy.device)
        yb = ops.add_low_rank(dy, lora_B.mT, lora_A.mT, scaling, dx, out.view(-1, shape[-1]))
    elif x is not None:
        yb = ops.expert_shrink(dy, lora_B.mT[None], routing, scaling)
    if x is not None:
        assert yb is not None, "dA is a product of yb"
        dA = _outer(ops, yb, x, routing, lora_A)
    if xa is not None:
        dB = _outer(ops, dy, xa, routing, lora_B)
    return out, dA, dB


def _outer(
    ops: Operations,
    left: torch.Tensor,
    right: torch.Tensor,
    routing: Routing,
    like: torch.Tensor,
) -> torch.Tensor:
    """left^T right in fp32, of the shape of `like`."""
    out = torch.empty(like.shape, dtype=torch.float32, device=like.device)
    ops.expert_outer(left, right, routing, out[None])
    return out


def _adjacent(rows: torch.Tensor) -> torch.Tensor:
    """The rows, copied if the elements of a row do not lie next to each other."""
    if rows.stride(1) == 1:
        return rows
    return rows.contiguous()


# ---- under torch.compile


class _Addends(NamedTuple):
    """x [..., K], A, B, and y [..., N]."""

    x: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    y: torch.Tensor


class _Scaling(NamedTuple):
    """lora_alpha / r."""

    scaling: float


class _Sum(NamedTuple):
    """out [..., N] and xa [T, R]."""

    out: torch.Tensor
    xa: torch.Tensor


class _Factors(NamedTuple):
    """What `update_gradients` takes, and dx = dy W; None if W is not a part of the step."""

    dy: torch.Tensor
    x: torch.Tensor | None
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    xa: torch.Tensor | None
    dx: torch.Tensor | None


class _Asked(NamedTuple):
    """The scaling, and whether dx is needed."""

    scaling: float
    needs_x: bool


class _Gradients(NamedTuple):
    """What `update_gradients` returns."""

    dx: torch.Tensor | None
    dA: torch.Tensor | None
    dB: torch.Tensor | None


def _run_add(addends: _Addends, factor: _Scaling) -> _Sum:
    x, lora_A, lora_B, y = addends
    rows = x.reshape(-1, x.shape[-1])
    return _Sum(*_sum(rows, lora_A, lora_B, y, factor.scaling, BatchShape(y.shape)))


def _fake_add(addends: _Addends, factor: _Scaling) -> _Sum:
    x, lora_A, _, y = addends
    rows = x.numel() // x.shape[-1]
    return _Sum(y.new_empty(y.shape), x.new_empty(rows, stored_rank(lora_A.shape[0])))


def _run_gradients(factors: _Factors, asked: _Asked) -> _Gradients:
    dy, x, lora_A, lora_B, xa, dx = factors
    rows = dy.reshape(-1, dy.shape[-1])
    shape = None
    if asked.needs_x:
        shape = BatchShape((*dy.shape[:-1], lora_A.shape[1]))
    if dx is not None:
        dx = dx.reshape(-1, dx.shape[-1])
    with on_device_of(rows):
        found = _all_gradients(rows, x, lora_A, lora_B, xa, dx, asked.scaling, shape)
    return _Gradients(*found)


def _fake_gradients(factors: _Factors, asked: _Asked) -> _Gradients:
    dy, x, lora_A, lora_B, xa, _ = factors
    dx = dA = dB = None
    if asked.needs_x:
        dx = dy.new_empty(*dy.shape[:-1], lora_A.shape[1])
    if x is not None:
        dA = lora_A.new_empty(lora_A.shape, dtype=torch.float32)
    if xa is not None:
        dB = lora_B.new_empty(lora_B.shape, dtype=torch.float32)
    return _Gradients(dx, dA, dB)


_ADD = Operator("linear_update", (_Addends, _Scaling), _Sum, _run_add, _fake_add)
_GRADIENTS = Operator(
    "linear_update_backward", (_Factors, _Asked), _Gradients, _run_gradients, _fake_gradients
)
