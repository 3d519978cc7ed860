"""The picture of train_step.py: a bar a row, divided into the parts of a step."""

from pathlib import Path
from typing import Any

from step_parts import PARTS
from sweep_picture import measured_on, save

COLOURS = ("#c44e52", "#dd8452", "#4c72b0", "#64b5cd", "#55a868", "#8172b3", "#937860", "#bdbdbd")


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the rows of a report that know their parts into an SVG or PNG file.

    Args:
        report: what train_step.py writes into its JSON file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in report["rows"] if row["parts"]]
    # text stays text and ids stay the same, so that the file is small and its changes are few
    settings = {"svg.fonttype": "none", "svg.hashsalt": "step", "font.size": 8}
    with plt.rc_context(settings):
        height = 1.2 + 0.22 * len(rows)
        figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
        draw_bars(axes, rows)
        figure.legend(fontsize=7, ncols=len(PARTS), loc="outside lower center")
        axes.set_title(measured_on(report), fontsize=8)
        save(figure, path)
        plt.close(figure)


def draw_bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    """A bar a row, from top to bottom; a tick where the step as a whole ends."""
    places = list(range(len(rows)))
    left = [0.0] * len(rows)
    for part, colour in zip(PARTS, COLOURS, strict=True):
        widths = [row["parts"][part] for row in rows]
        axes.barh(places, widths, left=left, color=colour, label=part, height=0.75)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, row in zip(places, rows, strict=True):
        axes.vlines(row["ms"], place - 0.4, place + 0.4, color="black", linewidth=1.2)
    axes.set_yticks(places, [label(row) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("ms of the device by part; the line is the time of the step")


def label(row: dict[str, Any]) -> str:
    """What a row measures."""
    words = [row["route"], row["batch"]]
    if row["checkpointing"] != "no":
        words.append(f"checkpointing: {row['checkpointing']}")
    if row["variant"] != "eager":
        words.append(row["variant"])
    words.append(f"V {row['vocabulary']:,}")
    return ", ".join(words)
