"""How evenly a model's tokens are spread over its experts.

load[e] = rows routed to expert e, without padding
max violation = (max load - mean load) / mean load
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from .html import heatmap
from .watch import Batch, measured


@dataclass(frozen=True)
class ExpertLoad:
    """Rows per expert of each layer.

    Attributes:
        counts: path of an experts module in the base model -> [E] int64 on the CPU, the rows of
            each expert. A row is one (token, slot) pair of a token that is not padding.
    """

    counts: dict[str, torch.Tensor]

    @property
    def max_violation(self) -> dict[str, float]:
        """Path -> (max load - mean load) / mean load.

        It is 0 if the load is even, E - 1 if one expert gets all rows, NaN if there are no rows.

        Source: Wang et al. 2024, arXiv:2408.15664, eq. 4.
        """
        found = {}
        for path, rows in self.counts.items():
            mean = rows.double().mean()
            found[path] = ((rows.max() - mean) / mean).item()
        return found

    @property
    def dead(self) -> dict[str, list[int]]:
        """Path -> ids of the experts that got no row."""
        return {path: (rows == 0).nonzero()[:, 0].tolist() for path, rows in self.counts.items()}

    def metrics(self) -> dict[str, float]:
        """Three numbers over all modules that got rows; {} if no module got rows.

        Returns: "max_violation", the mean over these modules; "largest_max_violation", the maximum;
            "dead_experts", the number of experts without rows in all these modules.
        """
        ran = ExpertLoad({path: rows for path, rows in self.counts.items() if rows.any()})
        violations = list(ran.max_violation.values())
        if not violations:
            return {}
        return {
            "max_violation": sum(violations) / len(violations),
            "largest_max_violation": max(violations),
            "dead_experts": sum(len(experts) for experts in ran.dead.values()),
        }

    def __add__(self, other: "ExpertLoad") -> "ExpertLoad":
        """The rows of both; a path may be in one of them only."""
        total: dict[str, torch.Tensor] = {}
        for counts in (self.counts, other.counts):
            for path, rows in counts.items():
                total[path] = rows + total.get(path, 0)
        return ExpertLoad(total)

    def __str__(self) -> str:
        """One line for each module."""
        dead = self.dead
        violation = self.max_violation
        lines = []
        for path, rows in self.counts.items():
            lines.append(
                f"{path}: {int(rows.sum()):,} rows, max violation {violation[path]:.2f}, "
                f"{len(dead[path])} of {len(rows)} experts dead"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """A heatmap, for a notebook."""
        return heatmap(self.counts)


def expert_load(model: nn.Module, batches: Iterable[Batch]) -> ExpertLoad:
    """Rows per expert and layer over some batches, in eval mode; the model is left as it was.

    Args:
        model: a model with experts, with or without adapters.
        batches: dicts of the model's arguments, or [batch, length] input_ids; they are moved to the
            model's device. Tokens with attention_mask 0 are not counted.
    Returns: the loads of this process's batches. If the model is divided among processes or wrapped
        for DDP, all processes must call this, and the loads are those of all of their batches; a
        batch that several processes share counts once.
    Raises:
        ValueError: if the model has no experts, or no token was counted.
    """
    return ExpertLoad(measured(model, batches, "rows"))
