"""The goals of the experts layer on an H200, and what it took before work on them began.

Every time was measured on one NVIDIA H200 with bf16 weights, fp32 adapters and random routing:
forward and backward, 20 steps in a row, in ms; forward without gradients in us.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from cases import SHAPES, Case, Shape, shrunk
from expert_modules import gpt_oss_experts, nemotron_experts, qwen3_experts
from turns import Layer

BEFORE = "2026-11-29"


@dataclass(frozen=True)
class Situation:
    """One row of the table.

    Attributes:
        name: as the table and the command line name it.
        before: what it took on the date BEFORE, in the unit of its call.
        goal: what it may take; with `against`, its time over that of the other row. None for a row
            that others are held against.
        against: name of the row that it is held against.
        shape, T, r: the problem.
        dropout, recompute: fields of the adapter's configuration.
        experts: makes the experts module.
        call: what is timed, of turns.CALLS.
    """

    name: str
    before: float
    goal: float | None
    against: str | None = None
    shape: Shape = SHAPES["qwen3-30b"]
    T: int = 8192
    r: int = 16
    dropout: float = 0.0
    recompute: bool = False
    experts: Callable[[int, int, int, int], nn.Module] = qwen3_experts
    call: str = "step"

    def layer(self, dtype: torch.dtype, device: torch.device, tiny: bool) -> Layer:
        """What is measured.

        Args:
            tiny: shrink all sizes, to try the command on a CPU.
        """
        shape = self.shape
        T = self.T
        if tiny:
            shape = shrunk(shape)
            T = min(T, 24)
        case = Case(
            self.name,
            *shape,
            T=T,
            r=self.r,
            dtype=dtype,
            skew=0.0,
            device=device,
            dropout=self.dropout,
            experts=self.experts,
        )
        return Layer(case, self.recompute, self.call)


SITUATIONS = [
    Situation("r = 16", 2.81, 2.6),
    Situation("r = 8", 2.81, 2.6, r=8),
    Situation("r = 4", 3.07, 1.03, "r = 16", r=4),
    Situation("r = 12", 3.11, 1.03, "r = 16", r=12),
    Situation("r = 15", 3.17, 1.03, "r = 16", r=15),
    Situation("r = 17", 4.32, 1.10, "r = 16", r=17),
    Situation("r = 20", 4.36, 1.10, "r = 16", r=20),
    Situation("r = 24", 4.10, 1.10, "r = 16", r=24),
    Situation("r = 32", 3.03, 2.9, r=32),
    Situation("r = 64", 3.33, 3.1, r=64),
    Situation("r = 128", 4.12, 3.8, r=128),
    Situation("r = 256", 5.46, 5.0, r=256),
    Situation("lora_dropout = 0.05", 3.43, 1.08, "r = 16", dropout=0.05),
    Situation("recompute=True", 3.63, 3.2, recompute=True),
    Situation("T = 3072", 1.36, None, T=3072),
    Situation("T = 3056", 1.57, 1.03, "T = 3072", T=3056),
    Situation("T = 768", 0.97, None, T=768),
    Situation("T = 767", 1.25, 1.03, "T = 768", T=767),
    Situation("T = 2048", 1.18, 0.98, T=2048),
    Situation("T = 32768", 10.27, 9.5, T=32768),
    Situation("qwen3-next", 3.85, 3.0, shape=SHAPES["qwen3-next"]),
    Situation("qwen3-next, T = 2048", 3.05, 2.7, shape=SHAPES["qwen3-next"], T=2048),
    Situation("qwen3.5-35b", 2.19, 1.9, shape=SHAPES["qwen3.5-35b"]),
    Situation("qwen3.5-35b, T = 4096", 1.64, 1.3, shape=SHAPES["qwen3.5-35b"], T=4096),
    Situation("dsv3-slice, T = 1024", 4.94, 3.9, shape=SHAPES["dsv3-slice"], T=1024),
    Situation("gpt-oss", 6.55, 6.0, shape=SHAPES["gptoss-shape"], experts=gpt_oss_experts),
    Situation("llama4-like", 8.22, 7.2, shape=SHAPES["llama4-like"]),
    Situation("widths 2000, 760", 3.42, 2.95, shape=Shape(128, 2000, 760, 8)),
    Situation(
        "nemotron, no gate", 4.45, 4.1, shape=Shape(128, 2688, 1856, 6), experts=nemotron_experts
    ),
    Situation("olmoe", 3.41, 3.2, shape=SHAPES["olmoe"]),
    Situation("dsv3-slice", 21.0, 19.8, shape=SHAPES["dsv3-slice"]),
    Situation("mixtral", 19.5, 18.6, shape=SHAPES["mixtral"]),
    Situation("forward of T = 1, device", 74, 45, T=1, call="forward, device"),
    Situation("forward of T = 8, device", 185, 150, T=8, call="forward, device"),
    Situation("forward of T = 32, device", 321, 285, T=32, call="forward, device"),
    Situation("forward of T = 64, device", 369, 330, T=64, call="forward, device"),
    Situation("forward of T = 1, host", 310, 120, T=1, call="forward, host"),
    Situation("forward of T = 8, host", 310, 120, T=8, call="forward, host"),
    Situation("forward of T = 32, host", 310, 120, T=32, call="forward, host"),
    Situation("forward of T = 64, host", 310, 120, T=64, call="forward, host"),
]


def chosen(patterns: Sequence[str]) -> list[Situation]:
    """The rows whose names match, and those that they are held against; all without patterns.

    Args:
        patterns: as `fnmatch` has them, such as "r = *".
    Raises:
        ValueError: naming a pattern that matches no row.
    """
    names = [situation.name for situation in SITUATIONS]
    wanted = set()
    for pattern in patterns or ["*"]:
        matching = {name for name in names if fnmatchcase(name, pattern)}
        if not matching:
            raise ValueError(f"{pattern!r} matches no row; the rows are: {'; '.join(names)}.")
        wanted |= matching
    wanted |= {s.against for s in SITUATIONS if s.name in wanted and s.against}
    return [situation for situation in SITUATIONS if situation.name in wanted]
