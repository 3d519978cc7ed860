"""The published table: time and error of every route, beside what other projects' layers took.

Other projects are not installed where this package is measured. Their numbers are in peers.json,
with versions, machine and date; a case that is not there was not measured.
"""

import json
from pathlib import Path
from typing import Any

from report import Rows, markdown_table

PEERS = Path(__file__).with_name("peers.json")
NOT_MEASURED = "not measured"


def read_peers(path: Path = PEERS) -> dict[str, Any]:
    """The numbers of other projects: "machine", "date", "what", and "rows"."""
    return json.loads(path.read_text())


def case_of(row: dict[str, Any]) -> tuple[str, int, int]:
    """Shape, tokens and rank."""
    return row["config"], row["T"], row["r"]


def own_cell(row: dict[str, Any] | None) -> str:
    """Time and error of a route of this run."""
    if row is None:
        return NOT_MEASURED
    if row["failed"]:
        return f"failed: {row['failed']}"
    return f"{row['step']:.2f} ({max(row['errors'].values()):.1e})"


def peer_cell(row: dict[str, Any] | None) -> str:
    """Time, error and version of another project."""
    if row is None:
        return NOT_MEASURED
    return f"{row['step']:.2f} ({max(row['err'], row['edx']):.1e}), {row['version']}"


def published_table(rows: Rows, peers: dict[str, Any]) -> str:
    """A line for each case, a column for each route and each other project.

    Args:
        rows: of the layer benchmark, see `layer_row.Row`.
        peers: what `read_peers` returns. They ran in bf16 with an even routing, so that other cases
            have no number of theirs.
    """
    routes = list(dict.fromkeys(row["peer"] for row in rows))
    found = {(case_of(row), row["peer"]): row for row in rows}
    others = list(dict.fromkeys(row["peer"] for row in peers["rows"]))
    of_others = {(case_of(row), row["peer"]): row for row in peers["rows"]}
    header = ["shape", "T", "r", "roof", *routes, *others]
    lines = []
    for case in dict.fromkeys(case_of(row) for row in rows):
        first = next(row for row in rows if case_of(row) == case)
        cells = [*map(str, case), f"{first['roof']:.2f}"]
        cells += [own_cell(found.get((case, route))) for route in routes]
        comparable = first["dtype"] == "bfloat16" and not first["skew"]
        for other in others:
            row = of_others.get((case, other))
            if not comparable:
                row = None
            cells.append(peer_cell(row))
        lines.append(cells)
    return markdown_table(header, lines)


def published(title: str, rows: Rows) -> str:
    """The table, under what its numbers are.

    Args:
        title: machine, versions and date of the run.
    """
    peers = read_peers()
    names = " and ".join(dict.fromkeys(row["peer"] for row in peers["rows"]))
    words = [
        f"{title}.",
        "ms of forward and backward, and in brackets the largest relative error of the output and",
        f"of all gradients. {names}: {peers['machine']}, {peers['date']}, median of 15;",
        "their error is that of the output and of the input's gradient.",
    ]
    return "\n".join(words) + "\n\n" + published_table(rows, peers) + "\n"
