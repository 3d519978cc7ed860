"""The time no layer can fall below: compulsory FLOPs and bytes at what the machine reaches.

    roof = sum over forward and backward of max(FLOPs / peak, bytes / bandwidth)

    forward   FLOPs 2M*3IH + 2Mr(2H + 3I)     bytes W + 2s*TH + 4s*MI
    backward  FLOPs 2M*3IH + 4Mr(2H + 3I)     bytes W + 4s*TH + 6s*MI

M = T*top_k rows, s bytes per element, W = s*min(E, M)*3*I*H bytes of weights. Without a gate, 3IH
is 2IH, 3I is 2I, and 4s*MI and 6s*MI are 3s*MI. peak is that of a
large matrix product on random data (8192^3 on a GPU), bandwidth that of a large copy (2 GiB on a
GPU), whose bytes read and bytes written are both counted; both are measured in the same run.
"""

import inspect
import statistics
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from cases import Case
from timing import Timer

FORMULA = inspect.cleandoc(__doc__)


class Ceilings(NamedTuple):
    """What the machine reaches.

    Attributes:
        flops: FLOP/s of a matrix product.
        bandwidth: bytes/s of a copy, read and written.
    """

    flops: float
    bandwidth: float


class Work(NamedTuple):
    """What a pass cannot do without: FLOPs, and bytes of memory read and written."""

    flops: float
    nbytes: float

    def milliseconds(self, ceilings: Ceilings) -> float:
        """The least time this work can take."""
        return 1e3 * max(self.flops / ceilings.flops, self.nbytes / ceilings.bandwidth)


def compulsory_work(case: Case) -> tuple[Work, Work]:
    """The work of forward and of backward."""
    M = case.T * case.top_k
    s = case.dtype.itemsize
    # halves of I columns: of all weights; of the pre-activation and its passes
    halves, forward_passes, backward_passes = 3, 4, 6
    if not case.gated:
        halves, forward_passes, backward_passes = 2, 3, 3
    base = 2 * M * halves * case.I * case.H
    lora = 2 * M * case.r * (2 * case.H + halves * case.I)
    weights = s * min(case.E, M) * halves * case.I * case.H
    tokens = s * case.T * case.H
    rows = s * M * case.I
    forward = Work(base + lora, weights + 2 * tokens + forward_passes * rows)
    backward = Work(base + 2 * lora, weights + 4 * tokens + backward_passes * rows)
    return forward, backward


def roof(case: Case, ceilings: Ceilings) -> float:
    """ms that forward and backward of a case cannot fall below."""
    return sum(work.milliseconds(ceilings) for work in compulsory_work(case))


class Probe:
    """A large matrix product on random data and a large copy, whose times give the ceilings.

    Attributes:
        n: the product is [n, n] @ [n, n].
        nbytes: bytes copied.
        product, copy: the two calls.
        typical: what makes one number of several times.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.n = 1024
        self.nbytes = 2**27
        # a CPU is shared with whatever else runs: the fastest call comes closest to what it can do
        self.typical: Callable[[list[float]], float] = min
        if device.type == "cuda":
            self.n = 8192
            self.nbytes = 2**31
            self.typical = statistics.median
        a, b, c = (torch.randn(self.n, self.n, device=device, dtype=dtype) for _ in range(3))
        source = torch.full((self.nbytes,), 1, dtype=torch.int8, device=device)
        target = torch.full((self.nbytes,), 2, dtype=torch.int8, device=device)
        self.product = partial(torch.mm, a, b, out=c)
        self.copy = partial(target.copy_, source)

    def __call__(self, timer: Timer, products: int, copies: int) -> tuple[float, float]:
        """ms of a product and of a copy, from so many calls of each."""
        product_ms = self.typical(timer(self.product, products).times)
        copy_ms = self.typical(timer(self.copy, copies).times)
        return product_ms, copy_ms

    def ceilings(self, product_ms: float, copy_ms: float) -> Ceilings:
        """The ceilings that follow from the ms of a product and of a copy."""
        return Ceilings(2e3 * self.n**3 / product_ms, 2e3 * self.nbytes / copy_ms)


def measure_ceilings(timer: Timer, probe: Probe) -> Ceilings:
    """The ceilings of a machine that has done nothing before."""
    repeat = 10
    if timer.device.type == "cuda":
        repeat = 20
    return probe.ceilings(*probe(timer, repeat, repeat))
