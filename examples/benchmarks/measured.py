"""The tables of measurements and the README's chart, made from docs/measured.json.

    python examples/benchmarks/measured.py

The file has what was measured, with machine and date. A table stands between a line
`<!-- measured: NAME -->` and `<!-- end -->`; NAME is a table of the file. "said" are the numbers
that stand in sentences: a test compares them.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

from report import markdown_table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "measured.json"
CHART = ROOT / "docs" / "pictures" / "layer.svg"
PAGES = (
    *sorted((ROOT / "docs" / "guides").glob("*.md")),
    *(ROOT / "docs" / name for name in ("performance.md", "plan.md")),
)
TABLE = re.compile(r"(<!-- measured: ([^>\n]+) -->\n)(.*?)(<!-- end -->\n)", re.DOTALL)
OURS, OTHERS = "tab:blue", "silver"
NOT_MEASURED = "not measured"


def read_results() -> dict[str, Any]:
    """What docs/measured.json holds: "tables" by name, "chart", and "said"."""
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def with_tables(text: str, results: dict[str, Any]) -> str:
    """A page with its tables as the results have them."""

    def made(match: re.Match[str]) -> str:
        table = results["tables"][match[2]]
        return match[1] + markdown_table(table["columns"], table["rows"]) + "\n" + match[4]

    return TABLE.sub(made, text)


def draw(chart: dict[str, Any], path: Path) -> None:
    """Draw a panel of bars for each quantity of the chart into an SVG file.

    Args:
        chart: "who" has the names, "panels" the bars; a bar without a value was not measured.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # text stays text and ids stay the same, so that the file is small and its changes are few
    settings = {"svg.fonttype": "none", "svg.hashsalt": "layer", "font.size": 9}
    panels = chart["panels"]
    with plt.rc_context(settings):
        figure, axes = plt.subplots(
            1, len(panels), figsize=(9.5, 2.1), sharey=True, layout="constrained"
        )
        for axis, panel in zip(axes, panels, strict=True):
            draw_panel(axis, panel, chart["who"])
        # the first name on top
        axes[0].invert_yaxis()
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def draw_panel(axis: Any, panel: dict[str, Any], who: dict[str, str]) -> None:
    """Draw one bar for each name, with its value beside it."""
    bars = panel["bars"]
    colours = [OTHERS] * len(bars)
    colours[0] = OURS
    drawn = axis.barh(
        [who[bar["who"]] for bar in bars], [bar["value"] or 0 for bar in bars], color=colours
    )
    axis.bar_label(drawn, [label(bar["value"]) for bar in bars], padding=3)
    axis.set_title(panel["title"], fontsize=9, loc="left")
    axis.set_xticks([])
    axis.tick_params(left=False)
    axis.margins(x=0.25)
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def label(value: float | None) -> str:
    """A number as it is written beside a bar."""
    if value is None:
        return NOT_MEASURED
    return f"{value:,}"


def main() -> None:
    """Write the tables into their pages, and draw the chart."""
    results = read_results()
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8"), results), encoding="utf-8")
    CHART.parent.mkdir(exist_ok=True)
    draw(results["chart"], CHART)


if __name__ == "__main__":
    sys.exit(main())
