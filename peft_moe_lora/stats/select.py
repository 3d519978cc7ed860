"""The experts that matter for some data, selected by their share of its tokens."""

from collections.abc import Iterable

import torch
from torch import nn

from .watch import Batch, measured

SCORES = ("tokens", "gates")


def select_experts(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    score: str = "tokens",
    threshold: float | None = None,
    top: int | None = None,
) -> dict[str, list[int]]:
    """The experts that matter for some data, as `expert_indices` of MoELoraConfig takes them.

        score[e] = 1/N sum over samples j of 1/L_j sum over tokens t of s[t, e]

    for N samples of L_j tokens. s[t, e] is the routing weight that token t gives expert e for
    "gates" (average gate score); for "tokens" (token selection ratio) it is 1 / top_k if the token
    selects the expert, else 0. The scores are divided by their sum over the layer's experts.

    Args:
        model: the base model, or one with adapters; it runs in eval mode and is left as it was.
        batches: dicts of the model's arguments, or [batch, length] input_ids. A sample is one line
            of a batch; a few dozen samples of the task are enough.
        score: "tokens" or "gates".
        threshold: in (0, 1]. Select in each layer the fewest experts whose scores sum to at least
            this.
        top: instead, select in each layer this many experts with the highest scores.
    Returns: path of each experts module in the base model -> ascending ids.
    Raises:
        ValueError: if an argument is out of range, or a layer got no token.
    Source: Wang et al. 2024, "Let the Expert Stick to His Last", arXiv:2407.01906: ESFT-Token and
        ESFT-Gate.
    """
    _check_arguments(score, threshold, top)
    chosen = {}
    for path, sums in measured(model, batches, score).items():
        if not sums.any():
            raise ValueError(
                f"{path} got no token from the batches, so its experts have no score; leave it out."
            )
        if top is not None and top > len(sums):
            raise ValueError(f"top={top} experts of {path}, which has {len(sums)}.")
        shares, order = (sums / sums.sum()).sort(descending=True, stable=True)
        count = top
        if threshold is not None:
            count = _fewest(shares, threshold)
        chosen[path] = sorted(order[:count].tolist())
    return chosen


def _check_arguments(score: str, threshold: float | None, top: int | None) -> None:
    if score not in SCORES:
        raise ValueError(f"score must be one of {SCORES}, got {score!r}.")
    if (threshold is None) == (top is None):
        raise ValueError(
            f"give either threshold or top, got threshold={threshold!r} and top={top!r}."
        )
    if threshold is not None and not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold!r}.")
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise ValueError(f"top must be an integer of at least 1, got {top!r}.")


def _fewest(shares: torch.Tensor, threshold: float) -> int:
    """How many of the shares, in descending order, sum to at least the threshold."""
    # 1e-9: the sum of shares that should be the threshold may be less by rounding
    short = shares.cumsum(0) < threshold - 1e-9
    return int(short.sum()) + 1
