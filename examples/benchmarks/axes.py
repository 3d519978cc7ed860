"""The axes of the sweep: qwen3-30b at 8192 tokens and r = 16, with one quantity changed at a time.

r        1 to 256: powers of two, their neighbours, and odd multiples of 2, 4 and 8
T        64 to 32768 tokens, in odd steps
E        8 to 512 experts with the same rows, H and I
width    H x I, multiples of 8 and not; x is H * I in millions
dropout  r with dropout 0.05 and without
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cases import SHAPES, Case, Shape, shrunk
from turns import Layer

SHAPE = SHAPES["qwen3-30b"]
TOKENS = 8192
RANK = 16
DROPOUT = 0.05

RANKS = (1, 2, 4, 6, 8, 10, 12, 15, 16, 17, 20, 24, 31, 32, 33, 40, 48, 64, 65, 96, 128, 160, 192)
RANKS += (256,)
QUICK_RANKS = (1, 8, 12, 15, 16, 17, 24, 32, 48, 64, 128, 256)
LENGTHS = (64, 96, 100, 128, 192, 255, 256, 384, 511, 512, 640, 767, 768, 1023, 1024, 1500, 1536)
LENGTHS += (2048, 2500, 3056, 3072, 4095, 4096, 6000, 8191, 8192, 12000, 16384, 24001, 32768)
QUICK_LENGTHS = (64, 128, 256, 511, 512, 767, 768, 1024, 2048, 3056, 3072, 8192, 16384)
EXPERTS = (8, 12, 16, 24, 32, 48, 60, 64, 96, 100, 128, 160, 192, 256, 384, 512)
QUICK_EXPERTS = (8, 16, 32, 64, 96, 128, 256, 512)
# H, I; all but the first two near 8 : 3
WIDTHS = (
    (1000, 500),
    (1024, 512),
    (1500, 563),
    (1536, 576),
    (1544, 580),
    (2000, 750),
    (2000, 760),
    (2008, 768),
    (2040, 764),
    (2047, 767),
    (2048, 768),
    (2056, 776),
    (2304, 864),
    (2560, 960),
)
QUICK_WIDTHS = ((1000, 500), (1536, 576), (2000, 760), (2047, 767), (2048, 768), (2560, 960))
DROPOUT_RANKS = (4, 8, 12, 16, 17, 24, 32, 48, 64)
QUICK_DROPOUT_RANKS = (8, 16, 24, 32)


@dataclass(frozen=True)
class Point:
    """One point of an axis.

    Attributes:
        x: where it stands on the axis.
        label: what was changed.
        curve: which curve of the axis it is on.
        shape, T, r, dropout: the problem.
    """

    x: float
    label: str
    curve: str = ""
    shape: Shape = SHAPE
    T: int = TOKENS
    r: int = RANK
    dropout: float = 0.0

    def layer(self, dtype: torch.dtype, device: torch.device, tiny: bool) -> Layer:
        """What is measured.

        Args:
            tiny: shrink all sizes, to try the command on a CPU.
        """
        point = self
        if tiny:
            point = replace(self, shape=shrunk(self.shape), T=min(self.T, 24), r=min(self.r, 8))
        sizes = point.shape
        case = Case(self.label, *sizes, point.T, point.r, dtype, 0.0, device, point.dropout)
        return Layer(case)


def rank_points(ranks: Sequence[int]) -> list[Point]:
    return [Point(r, f"r = {r}", r=r) for r in ranks]


def length_points(lengths: Sequence[int]) -> list[Point]:
    return [Point(T, f"T = {T}", T=T) for T in lengths]


def expert_points(counts: Sequence[int]) -> list[Point]:
    return [Point(E, f"E = {E}", shape=SHAPE._replace(E=E)) for E in counts]


def width_points(widths: Sequence[tuple[int, int]]) -> list[Point]:
    return [
        Point(hidden * inner / 1e6, f"{hidden} x {inner}", shape=SHAPE._replace(H=hidden, I=inner))
        for hidden, inner in widths
    ]


def dropout_points(ranks: Sequence[int]) -> list[Point]:
    points = []
    for dropout in (0.0, DROPOUT):
        curve = f"dropout = {dropout:g}"
        points += [Point(r, f"r = {r}, {curve}", curve, r=r, dropout=dropout) for r in ranks]
    return points


@dataclass(frozen=True)
class Axis:
    """One axis of the sweep, and one panel of its picture.

    Attributes:
        title: of what is changed.
        make: is given values, and returns their points; x increases on each curve.
        values, quick_values: of the whole sweep, and of a quick one.
        log: whether x is drawn on a logarithmic scale.
    """

    title: str
    make: Callable[[Sequence[Any]], list[Point]]
    values: Sequence[Any]
    quick_values: Sequence[Any]
    log: bool = True

    def points(self, quick: bool) -> list[Point]:
        """The points of the whole sweep, or of a quick one."""
        if quick:
            return self.make(self.quick_values)
        return self.make(self.values)


AXES = {
    "r": Axis("rank r", rank_points, RANKS, QUICK_RANKS),
    "T": Axis("tokens T", length_points, LENGTHS, QUICK_LENGTHS),
    "E": Axis("experts E, with the same rows", expert_points, EXPERTS, QUICK_EXPERTS),
    "width": Axis("widths, H * I in millions", width_points, WIDTHS, QUICK_WIDTHS, log=False),
    "dropout": Axis(
        "rank r, with and without dropout", dropout_points, DROPOUT_RANKS, QUICK_DROPOUT_RANKS
    ),
}
