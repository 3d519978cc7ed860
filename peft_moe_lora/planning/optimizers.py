"""The optimizers that `plan` knows, by their names in TrainingArguments: bytes of their state.

    fp32:   8 bytes for each trained parameter, its two moments
    8-bit:  2 bytes, and 8 for each block of 256; small tensors as in fp32

Neither needs memory for its step beyond the state: both update parameters and moments in place.

Source: bitsandbytes 0.50, `optim/optimizer.py`; Dettmers et al. 2022, arXiv:2110.02861.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

# elements of a tensor that share a scale, for each moment
BLOCK = 256
# tensors with fewer elements have moments in fp32
MIN_8BIT_SIZE = 4096
# for each of the two moments, the value of each of its 256 codes, in fp32; all tensors share them
TABLES = 2 * 256 * 4


@dataclass(frozen=True)
class Optimizer:
    """An AdamW.

    Attributes:
        words: what it is.
        state_bytes: numbers of elements of all trained tensors -> bytes of the state.
        fused: whether all tensors are updated at once; else the host waits for each.
        sharded: whether it takes the parts of tensors (DTensors) into which FSDP2 divides them.
    """

    words: str
    state_bytes: Callable[[Sequence[int]], int]
    fused: bool
    sharded: bool

    def launches(self, tensors: int) -> int:
        """How many times the host waits for a launch."""
        if self.fused:
            return 1
        return tensors


def _fp32_state(sizes: Sequence[int]) -> int:
    return 8 * sum(sizes)


def _8bit_state(sizes: Sequence[int]) -> int:
    small = [n for n in sizes if n < MIN_8BIT_SIZE]
    large = [n for n in sizes if n >= MIN_8BIT_SIZE]
    scales = 8 * sum(ceil(n / BLOCK) for n in large)
    tables = TABLES if large else 0
    return _fp32_state(small) + 2 * sum(large) + scales + tables


DEFAULT_OPTIM = "adamw_torch_fused"
OPTIMIZERS = {
    DEFAULT_OPTIM: Optimizer("fused AdamW", _fp32_state, fused=True, sharded=True),
    "adamw_8bit": Optimizer(
        "bitsandbytes' AdamW with moments in 8 bits", _8bit_state, fused=False, sharded=False
    ),
}


def optimizer_of(name: str, gpus: int | None) -> Optimizer:
    """The optimizer of a name in `OPTIMIZERS`.

    Args:
        name: its name in TrainingArguments.
        gpus: how many GPUs are asked for; None if that is not fixed.
    Raises:
        ValueError: if it is not known, or does not run on so many GPUs under FSDP2.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optim must be one of {tuple(OPTIMIZERS)}, got {name!r}.")
    found = OPTIMIZERS[name]
    if gpus not in (None, 1) and not found.sharded:
        raise ValueError(
            f"optim={name!r} needs gpus=1, got gpus={gpus}: bitsandbytes' optimizers do not take "
            "the DTensors into which FSDP2 divides A and B. "
            f"Give gpus=1, or optim={DEFAULT_OPTIM!r}."
        )
    return found
