"""Pictures of expert loads; matplotlib is imported when one is drawn."""

import re

import torch

from .load import ExpertLoad


def plot_expert_load(load: ExpertLoad, ax=None):
    """A heatmap of loads, a line for each layer and a column for each expert; 1 is the layer's mean.

    Args:
        load: as `expert_load` or a callback gives it.
        ax: matplotlib axes to draw in; new ones by default.
    Returns: the matplotlib Figure.
    Raises:
        ImportError: naming the extra to install, if there is no matplotlib.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            f"plot_expert_load needs matplotlib ({error}): pip install 'peft-moe-lora[notebook]'"
        ) from error
    counts = list(load.counts.values())
    lines = torch.full((len(counts), max(map(len, counts))), torch.nan)
    for line, c in zip(lines, counts, strict=True):
        line[: len(c)] = c / c.double().mean()
    if ax is None:
        _, ax = plt.subplots(figsize=(8, 1.5 + 0.25 * len(counts)), layout="constrained")
    drawn = ax.imshow(lines.numpy(), aspect="auto", interpolation="nearest", vmin=0, cmap="viridis")
    numbers = [re.search(r"\d+", path) for path in load.counts]
    ax.set_yticks(
        range(len(counts)),
        [n[0] if n else path for n, path in zip(numbers, load.counts, strict=True)],
    )
    ax.set(xlabel="expert", ylabel="layer")
    ax.figure.colorbar(drawn, ax=ax, label="load, 1 = even")
    return ax.figure
