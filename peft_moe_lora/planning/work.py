"""What one operation of this package takes: FLOPs, bytes, and scratch memory within it.

PyTorch sees the operator of an experts layer as one step. Its products, and the buffers that live
and die inside of it, are computed here from the shapes, in the symbols of `functional.whole`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from ..functional.arguments import Arguments
from ..functional.whole import BACKWARD, FORWARD, Inputs

# the time of a layer over that of its compulsory FLOPs and bytes: 1.12 for large experts, 1.9 for
# small ones (docs/performance.md; H200, 2026-11-24)
EXPERTS_SLOWDOWN = 1.6

_FORWARD = Arguments(FORWARD)
_BACKWARD = Arguments(BACKWARD)


@dataclass(frozen=True)
class Work:
    """One operation.

    Attributes:
        flops: of its products.
        nbytes: read and written.
        scratch: bytes that are alive within it, beyond its arguments and results.
        weights: of `nbytes`, those of experts.
        slowdown: its time over that of its FLOPs or bytes.
        launches: how many times the host waits for one launch.
    """

    flops: float = 0
    nbytes: float = 0
    scratch: int = 0
    weights: float = 0
    slowdown: float = 1.0
    launches: int = 1

    def decoding(self, scratch: int) -> "Work":
        """The same with quantized weights, which are decoded into so much scratch; 0 if dense."""
        if not scratch:
            return self
        # written once and read once more, in the dtype of the rows
        nbytes = self.nbytes + 2 * self.weights
        return replace(self, scratch=self.scratch + scratch, nbytes=nbytes)


def work_of(func: Any, args: Any, found: Any) -> Work | None:
    """The work of an operator of this package; None for any other."""
    name = func.name()
    if name == "peft_moe_lora::experts":
        inputs, *_ = _FORWARD.groups(args)
        return _forward(inputs)
    if name == "peft_moe_lora::experts_backward":
        _, inputs, kept, *_ = _BACKWARD.groups(args)
        return _backward(inputs, computes_pre=kept.pre is None)
    if name.startswith("peft_moe_lora::"):
        return _product(args, found)
    return None


def _forward(inputs: Inputs) -> Work:
    """Two products of every row, act [M, I] and y [M, H] in scratch."""
    rows, E, N, H, I = _sizes(inputs)  # noqa: E741
    size = inputs.x.element_size()
    weights = size * min(E, rows) * (N * H + H * I)
    return Work(
        flops=2 * rows * (N * H + H * I) + _lora_flops(inputs, rows),
        nbytes=weights + 2 * inputs.x.nbytes + size * rows * 4 * I,
        scratch=size * rows * (I + H),
        weights=weights,
        slowdown=EXPERTS_SLOWDOWN,
        # its launches are replayed as one graph
        launches=10,
    )


def _backward(inputs: Inputs, computes_pre: bool) -> Work:
    """Two products of every row; draw and dpre, then dpre and the rows of dx, in scratch.

    One more product where forward kept no pre-activation; pre is in scratch beside draw and dpre.
    """
    rows, E, N, H, I = _sizes(inputs)  # noqa: E741
    size = inputs.x.element_size()
    weights = size * min(E, rows) * (N * H + H * I)
    products = N * H + H * I
    elements = I + N
    if computes_pre:
        products += N * H
        elements += N
        weights += size * min(E, rows) * N * H
    return Work(
        flops=2 * rows * products + 2 * _lora_flops(inputs, rows),
        nbytes=weights + 4 * inputs.x.nbytes + size * rows * 6 * I,
        scratch=size * rows * max(elements, N + H),
        weights=weights,
        slowdown=EXPERTS_SLOWDOWN,
        launches=10,
    )


def _product(args: Any, found: Any) -> Work:
    """An operator of a layer whose activation is the model's own code: at most one product."""
    tensors = [value for value in tree_leaves((args, found)) if isinstance(value, torch.Tensor)]
    rows = tree_leaves(found)[0].shape[0]
    flops = sum(2 * rows * t.shape[1] * t.shape[2] for t in tensors if t.ndim == 3)
    nbytes = sum(t.nbytes for t in tensors)
    return Work(flops=flops, nbytes=nbytes, slowdown=EXPERTS_SLOWDOWN, launches=3)


def _sizes(inputs: Inputs) -> tuple[int, int, int, int, int]:
    E, N, H = inputs.up.shape
    return inputs.top_k_weights.numel(), E, N, H, inputs.down.shape[2]


def _lora_flops(inputs: Inputs, rows: int) -> float:
    """FLOPs of the rank-r products of one forward."""
    E = inputs.up.shape[0]
    flops = 0.0
    for A, B in ((inputs.up_A, inputs.up_B), (inputs.down_A, inputs.down_B)):
        if A is not None and B is not None:
            flops += 2 * rows * (A.numel() + B.numel()) / E
    return flops


def attention_work(query: torch.Tensor, key: torch.Tensor, backward: bool) -> Work:
    """Causal attention that forms no [length, length] matrix; half of the products are left out.

    Args:
        query: [batch, heads, length, head size]; of key the length is that of the past too.
    """
    batch, heads, length, head = query.shape
    flops = 2 * 2 * batch * heads * length * key.shape[2] * head / 2
    if not backward:
        return Work(flops=flops, nbytes=4 * query.nbytes, slowdown=1.5)
    # dq is summed in fp32, and dk and dv are made for every head of the query
    expanded = query.nbytes // length * key.shape[2]
    return Work(
        flops=2.5 * flops,
        nbytes=8 * query.nbytes,
        scratch=4 * query.numel() + 2 * expanded,
        slowdown=1.5,
        launches=3,
    )
