"""Selects the experts that matter for some data, by their share of its tokens."""

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
    """Select the experts that matter for some data, in the form of MoELoraConfig.expert_indices.

        score[e] = 1/N sum over samples j of 1/L_j sum over tokens t of s[t, e]

    for N samples of L_j tokens. With "gates" (average gate score), s[t, e] is the routing weight of
    token t for expert e. With "tokens" (token selection ratio), it is 1 / top_k if the token
    selects the expert, else 0. The scores are divided by their sum over the layer's experts.

    Args:
        model: the base model, or one with adapters; it runs in eval mode and is left as it was.
        batches: dicts of the model's arguments, or [batch, length] input_ids. A sample is one line
            of a batch; a few dozen samples of the task are enough.
        score: "tokens" or "gates".
        threshold: in (0, 1]; in each layer, select the fewest experts whose scores sum to at least
            this. Give either threshold or top.
        top: in each layer, select this many experts with the highest scores.
    Returns: path of each experts module in the base model -> ascending ids. If the model is divided
        among processes or wrapped for DDP, all processes must call this, and they select the same.
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
                f"{path} got no token from the batches, so its experts have no scores; give "
                "batches whose tokens reach it."
            )
        if top is not None and top > len(sums):
            raise ValueError(f"top={top} must be at most {len(sums)}, the experts of {path}.")
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
    """The smallest number of shares, the largest first, that sum to at least the threshold."""
    # 1e-9: by rounding, a sum that should equal the threshold may be slightly below it
    short = shares.cumsum(0) < threshold - 1e-9
    return int(short.sum()) + 1
