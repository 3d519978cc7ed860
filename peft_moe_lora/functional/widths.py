"""A layer with other H and I than it is stored with: the same numbers, from copies with zeros.

Kernels have fast ways for some widths only (`fast_widths` of the operations). A layer of other
widths is computed on copies with zeros after each width, which exist during one call. The weights
are copied in every forward and in every backward: their bytes are read once and written once.

The zeros change nothing. An added column of x meets an added column of the weight: 0 times 0. An
added column of the pre-activation is 0, so its activation is finite, and it meets an added column
of down. A mask of dropout depends on the index of a column, not on the width. But a token whose
hidden state holds inf gets NaN as its output, also where a clamp would have made it finite.

Legend:
    widths: H and I
    halves: as in `Activation`; the gate half and the up half have zeros of their own
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from ..ops import Activation, Operations, QuantizedWeight

if TYPE_CHECKING:
    from .whole import Inputs, Plan

# a named tuple with any of the fields of `_DIMENSIONS`
Group = TypeVar("Group", bound=NamedTuple)
# rows of an expert below which slow products take less time than copies, without a backward
FEW_ROWS = 32
# the dimensions of the fields that have widths, in the letters of the glossary; N is the width of
# the pre-activation, and R stands for r * E
_DIMENSIONS = {
    "x": "TH",
    "up": "ENH",
    "up_bias": "EN",
    "up_A": "RH",
    "up_B": "NR",
    "down": "EHI",
    "down_bias": "EH",
    "down_A": "RI",
    "down_B": "HR",
    "gradient": "TH",
    "out": "TH",
}


class Widths(NamedTuple):
    """The hidden size and the intermediate size of a layer."""

    H: int
    I: int  # noqa: E741

    @classmethod
    def of(cls, inputs: "Inputs") -> "Widths":
        """The widths of a layer as it is stored."""
        _, H, I = inputs.down.shape  # noqa: E741
        return cls(H, I)


def computed_widths(
    ops: Operations, stored: Widths, inputs: "Inputs", plan: "Plan", num_rows: int
) -> Widths:
    """The widths with which a layer is computed.

    They are the same in forward and in backward. Where a backward may follow, they do not depend
    on the number of rows, because a compiled graph has no condition on it.

    Args:
        ops: the operations that compute the layer.
        stored: the widths of the layer as it is stored.
        inputs, plan: as in `functional.whole`.
        num_rows: M.
    """
    fast = ops.fast_widths(stored, inputs.x.dtype)
    if fast == stored:
        return stored
    # zeros would move the blocks of a quantized weight
    if isinstance(inputs.up, QuantizedWeight) or isinstance(inputs.down, QuantizedWeight):
        return stored
    if not plan.keeps and num_rows < FEW_ROWS * inputs.up.shape[0]:
        return stored
    return Widths(*fast)


def with_widths(group: Group, activation: Activation, old: Widths, new: Widths) -> Group:
    """A group whose tensors have other widths: longer by zeros, or cut.

    Args:
        group: a named tuple; fields that `_DIMENSIONS` does not name stay as they are.
        activation: tells how the columns of the pre-activation are arranged.
        old, new: the widths that the tensors have, and those that they get.
    """
    if old == new:
        return group
    halves = activation.halves
    lengths = {"H": new.H, "I": new.I, "N": activation.columns(new.I) // halves}
    found = {}
    for name, dimensions in _DIMENSIONS.items():
        t = getattr(group, name, None)
        if t is not None:
            found[name] = _with_lengths(t, dimensions, lengths, halves)
    return group._replace(**found)


def _with_lengths(
    t: torch.Tensor, dimensions: str, lengths: dict[str, int], halves: int
) -> torch.Tensor:
    """A tensor with other lengths of some dimensions.

    Args:
        t: the tensor.
        dimensions: the letters of its dimensions.
        lengths: letter -> new length; of N, the length of each half.
        halves: number of halves of N.
    """
    n = dimensions.find("N")
    if n >= 0:
        t = t.unflatten(n, (halves, -1))
        dimensions = dimensions.replace("N", "hN")
    shape = [lengths.get(letter, own) for letter, own in zip(dimensions, t.shape, strict=True)]
    t = _resized(t, shape)
    if n >= 0:
        t = t.flatten(n, n + 1)
    return t


def _resized(t: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A tensor of another shape, with zeros after the numbers of t, or cut.

    Returns: a new tensor with dimensions in the memory order of t; t itself if it has the shape.
    """
    if list(t.shape) == list(shape):
        return t
    order = sorted(range(t.ndim), key=t.stride, reverse=True)
    stored = torch.empty([shape[d] for d in order], dtype=t.dtype, device=t.device)
    new = stored.permute([order.index(d) for d in range(t.ndim)])
    common = tuple(slice(min(n, m)) for n, m in zip(t.shape, shape, strict=True))
    new[common].copy_(t[common])
    for d, length in enumerate(t.shape):
        if length < shape[d]:
            new.narrow(d, length, shape[d] - length).zero_()
    return new
