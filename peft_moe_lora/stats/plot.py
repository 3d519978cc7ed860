"""Plots expert loads; matplotlib is imported only when a plot is drawn."""

import re
from typing import TYPE_CHECKING

import torch

from .load import ExpertLoad

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


def plot_expert_load(load: ExpertLoad, ax: "Axes | None" = None) -> "Figure | SubFigure":
    """Draw a heatmap of loads, with a row for each layer and a column for each expert.

    The value is the expert's load divided by the mean load of its layer, so 1 is even.

    Args:
        load: the loads, from `expert_load` or from a callback.
        ax: matplotlib axes to draw in; new axes by default.
    Returns: the matplotlib figure.
    Raises:
        ImportError: if matplotlib is not installed. The message names the extra to install.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"plot_expert_load needs matplotlib ({error}): pip install 'peft-moe-lora[notebook]'"
        ) from error
    counts = list(load.counts.values())
    # layers with fewer experts are filled with NaN, which is not drawn
    lines = torch.full((len(counts), max(map(len, counts))), torch.nan)
    for line, rows in zip(lines, counts, strict=True):
        line[: len(rows)] = rows / rows.double().mean()
    if ax is None:
        height = 1.5 + 0.25 * len(counts)
        _, ax = plt.subplots(figsize=(8, height), layout="constrained")
    drawn = ax.imshow(lines.numpy(), aspect="auto", interpolation="nearest", vmin=0, cmap="viridis")
    ax.set_yticks(range(len(counts)), [_label(path) for path in load.counts])
    ax.set(xlabel="expert", ylabel="layer")
    ax.figure.colorbar(drawn, ax=ax, label="load, 1 = even")
    return ax.figure


def _label(path: str) -> str:
    """The layer's number, or the path if it has none."""
    number = re.search(r"\d+", path)
    if number is None:
        return path
    return number[0]
