"""What a benchmark puts out: a table, a JSON file, a plot, and which machine it ran on."""

import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

Rows = Sequence[dict[str, Any]]


# ---- the table ---------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        form: the format of its values.
        is_label: whether it says which row this is; a failed row has its labels and no other value.
    """

    title: str
    form: str = "{}"
    is_label: bool = False


def format_table(rows: Rows, columns: dict[str, Column]) -> str:
    """The rows as plain text, because rich may be missing; columns without any value are left out.

    Args:
        rows: values by column; "failed" says why a row has no numbers.
    """
    columns = {
        key: column
        for key, column in columns.items()
        if any(row.get(key) is not None for row in rows)
    }
    lines = [[column.title for column in columns.values()]]
    lines += [format_cells(row, columns) for row in rows]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    text = []
    for cells, row in zip(lines, [{}, *rows], strict=True):
        padded = []
        for cell, width, column in zip(cells, widths, columns.values(), strict=True):
            if column.is_label:
                padded.append(cell.ljust(width))
            else:
                padded.append(cell.rjust(width))
        line = "  ".join(padded).rstrip()
        if row.get("failed"):
            line += f"  FAILED: {row['failed']}"
        text.append(line)
    return "\n".join(text)


def format_cells(row: dict[str, Any], columns: dict[str, Column]) -> list[str]:
    """The text of a row's cells."""
    cells = []
    for key, column in columns.items():
        value = row.get(key)
        if row.get("failed") and not column.is_label:
            cells.append("-")
        elif value is None:
            cells.append("")
        else:
            cells.append(column.form.format(value))
    return cells


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown, one row a line."""
    rule = ["---"] * len(header)
    lines = [header, rule, *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# ---- files -------------------------------------------------------------------------------------


def write_json(path: Path | None, content: object) -> None:
    """Write the file, where one is asked for."""
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n")


def plot(rows: Rows, path: Path, title: str) -> None:
    """Bars of forward + backward over the roofline, a group per case, with a line at each goal."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = list(dict.fromkeys((row["config"], row["T"], row["r"]) for row in rows))
    names = list(dict.fromkeys(row["peer"] for row in rows))
    found = {(row["config"], row["T"], row["r"], row["peer"]): row for row in rows}
    width = 0.8 / len(names)
    figure, axes = plt.subplots(figsize=(max(8, 1.5 * len(cases)), 4), layout="constrained")
    for i, name in enumerate(names):
        first = (i - (len(names) - 1) / 2) * width
        at = [c + first for c in range(len(cases))]
        of_case = [found.get((*case, name), {}) for case in cases]
        heights = [row.get("x_roof") or math.nan for row in of_case]
        bars = axes.bar(at, heights, width, label=name)
        labels = [f"{height:.1f}".replace("nan", "") for height in heights]
        axes.bar_label(bars, labels, fontsize=7)
        for x, row in zip(at, of_case, strict=True):
            if row.get("goal_x_roof"):
                left, right = x - width / 2, x + width / 2
                axes.hlines(row["goal_x_roof"], left, right, color="black", linewidth=1.5)
    axes.axhline(1, color="gray", linewidth=0.8, linestyle="--")
    axes.set_xticks(range(len(cases)), [f"{name}\nT={T} r={r}" for name, T, r in cases], fontsize=8)
    axes.set_ylabel("forward + backward, times the roofline")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


# ---- the machine -------------------------------------------------------------------------------


def describe_machine(device: torch.device) -> dict[str, str | None]:
    """The device, and the versions of what runs on it."""
    machine: dict[str, str | None] = {}
    if device.type == "cuda":
        machine["device"] = torch.cuda.get_device_name(device)
        machine["driver"] = driver_version()
        machine["cuda"] = torch.version.cuda
    else:
        machine["device"] = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    machine["python"] = platform.python_version()
    machine["torch"] = torch.__version__
    for package in ("triton", "transformers", "peft"):
        try:
            machine[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            machine[package] = "none"
    return machine


def driver_version() -> str:
    """Of the NVIDIA driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.partition("\n")[0] or "unknown"


def machine_line(machine: dict[str, str | None]) -> str:
    """The device and the main versions, on one line."""
    packages = ("torch", "triton", "transformers", "peft")
    versions = [f"{package} {machine[package]}" for package in packages]
    return ", ".join([str(machine["device"]), *versions])
