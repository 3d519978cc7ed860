"""The picture of a sweep: a panel an axis, cost over the floor, and flagged points in red."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from axes import AXES

PLAIN = ("tab:blue", "tab:green")
FLAGGED = "tab:red"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw the axes of a report into an SVG or PNG file.

    Args:
        report: what sweep.py writes into its JSON file.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # text stays text and ids stay the same, so that the file is small and its changes are few
    settings = {"svg.fonttype": "none", "svg.hashsalt": "sweep", "font.size": 8}
    names = list(report["axes"])
    with plt.rc_context(settings):
        figure, panels = plt.subplots(
            len(names), 1, figsize=(8, 2 * len(names)), layout="constrained", squeeze=False
        )
        for panel, name in zip(panels[:, 0], names, strict=True):
            draw_axis(panel, name, report["axes"][name]["points"])
        figure.suptitle(heading(report), fontsize=8)
        save(figure, path)
        plt.close(figure)


def save(figure: Any, path: Path) -> None:
    """Write a figure into an SVG or PNG file, without the time of writing."""
    metadata = {}
    if path.suffix == ".svg":
        metadata = {"Date": None}
    figure.savefig(path, metadata=metadata, dpi=120)


def measured_on(report: dict[str, Any]) -> str:
    """Machine, versions and date of a report."""
    machine = report["machine"]
    words = [str(machine["device"]), f"torch {machine['torch']}", f"triton {machine['triton']}"]
    return ", ".join([*words, report["date"][:10]])


def heading(report: dict[str, Any]) -> str:
    """Machine, versions, date, and what the colour means."""
    above = f"{100 * (report['allowed'] - 1):.0f} % above its neighbours"
    return f"{measured_on(report)}; red: more than {above}"


def draw_axis(panel: Any, name: str, points: Sequence[dict[str, Any]]) -> None:
    """Draw the curves of one axis; points that failed are left out."""
    axis = AXES[name]
    curves = list(dict.fromkeys(point["curve"] for point in points))
    measured = [point for point in points if point["over_floor"] is not None]
    for curve, colour in zip(curves, PLAIN, strict=False):
        of_curve = [point for point in measured if point["curve"] == curve]
        xs = [point["x"] for point in of_curve]
        ys = [point["over_floor"] for point in of_curve]
        panel.plot(xs, ys, marker="o", markersize=3, linewidth=0.8, color=colour, label=curve)
    flagged = [point for point in measured if point["flagged"]]
    panel.plot(
        [point["x"] for point in flagged],
        [point["over_floor"] for point in flagged],
        linestyle="none",
        marker="o",
        markersize=5,
        color=FLAGGED,
    )
    for point in flagged:
        text, _, _ = point["label"].partition(",")
        place = (point["x"], point["over_floor"])
        panel.annotate(text, place, xytext=(4, 4), textcoords="offset points", fontsize=6)
    if axis.log:
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
    highest = max((point["over_floor"] for point in measured), default=1.0)
    panel.set_ylim(0, 1.2 * highest)
    panel.set_xlabel(axis.title)
    panel.set_ylabel("cost over floor")
    if any(curves):
        panel.legend(fontsize=7, loc="lower right")
