"""Expert loads as a table of HTML, which a notebook shows: a row a layer, a cell an expert."""

import html
from collections.abc import Mapping

import torch

# the load, over the mean of its layer, that has the full colour
FULL = 3.0


def heatmap(counts: Mapping[str, torch.Tensor]) -> str:
    """The table.

    A cell's colour is the load over the mean load of its layer; an expert without rows is marked.

    Args:
        counts: path of an experts module -> [E] rows of each expert.
    """
    lines = [
        f"<tr><th>{html.escape(path)}</th>{_cells(rows)}</tr>" for path, rows in counts.items()
    ]
    style = "border-spacing:1px;border-collapse:separate;font-size:smaller"
    caption = f"load / mean load of the layer, full colour from {FULL:g} on; x: no rows"
    return f'<table style="{style}"><caption>{caption}</caption>{"".join(lines)}</table>'


def _cells(rows: torch.Tensor) -> str:
    mean = rows.double().mean().item()
    cells = []
    for expert, count in enumerate(rows.tolist()):
        load = 0.0
        if mean:
            load = count / mean
        mark = ""
        if not count:
            mark = "x"
        shade = f"background:rgba(33,102,172,{min(load / FULL, 1):.2f})"
        title = f"expert {expert}: {count:,} rows, load {load:.2f}"
        cells.append(f'<td style="{shade};padding:3px" title="{title}">{mark}</td>')
    return "".join(cells)
