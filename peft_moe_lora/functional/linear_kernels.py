"""What `linear` computes, with the products of rank r in kernels of this package.

W is multiplied by cuBLAS. All other products of a direction are one call, which is recorded and
replayed. So the host makes two calls in each direction, and five with PyTorch's products; and no
copies of A and B are kept. A linear layer is one expert that owns all rows.

Not under torch.compile: as an operator of a graph such a call gains about 1 % of a step.

Legend: T, xa, yb, dx, dA, dB as in `linear`; xa and yb have R columns (`ops.ranks`)
"""

import torch
import torch.nn.functional as F

from ..ops import BatchShape, Operations, Routing
from .backends import on_device_of, ops_for, select_backend

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
    # what traces or watches PyTorch's operations, as selective checkpointing does, sees no kernels
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
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
    return select_backend("auto", x.device) == "triton"


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
    # with two dimensions, products take the host less
    rows = x.reshape(-1, x.shape[-1])
    if y is None:
        assert weight is not None, "a layer or its output"
        y = F.linear(rows, weight, bias)
    shape = BatchShape((*x.shape[:-1], y.shape[-1]))
    y = y.reshape(-1, y.shape[-1])
    ops = ops_for("auto", rows.device)
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
    rows = dy.reshape(-1, dy.shape[-1])
    dx = None
    if needs_x and weight is not None:
        dx = torch.mm(rows, weight)
    shape = None
    if needs_x:
        shape = BatchShape((*dy.shape[:-1], lora_A.shape[1]))
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
    """`update_gradients` for rows, given dy W as dx; `shape` is that of dx."""
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
