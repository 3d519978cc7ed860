"""Find, vary and write rows of the table of block sizes, `ops/kernels/launching/table.py`."""

import ast
from pathlib import Path
from typing import Any

import torch

from peft_moe_lora.ops.kernels.launching import launch, replay, table
from peft_moe_lora.ops.kernels.launching.table import Row
from peft_moe_lora.ops.kernels.tiles import tile


def forget() -> None:
    """Drop what was chosen and compiled by the table as it was."""
    table.lookup.cache_clear()
    tile._blocks.cache_clear()
    launch.forget()
    replay.forget()


def launched() -> set[str]:
    """The operations, by their names in the table, that were launched since `forget`."""
    return {key[0] for key, _ in launch._plans}


def current_row(op: str, x: torch.Tensor, M: int, E: int) -> Row:
    """The row for `op` on the device of x, at the tiles that M rows of E experts get."""
    arch, _ = table.device_facts(x.device)
    blocks = table.find(op, arch, x.element_size(), table.block_m_for(M, E, arch))
    return next(row for row in table.TABLE if row.blocks is blocks)


def write_row(path: Path, row: Row, blocks: dict[str, Any], source: str) -> None:
    """Replace a row's blocks and source in the table of the file at `path`.

    Args:
        source: machine and date of the measurement.
    Raises:
        LookupError: if the table has no such row.
    """
    text = path.read_text()
    call = find_call(text, row)
    if call is None:
        wanted = (row.op, row.arch, row.itemsize, row.block_m)
        raise LookupError(f"{path} has no row {wanted}.")
    lines = text.splitlines()
    lines[call.lineno - 1 : call.end_lineno] = [f"    {row_text(row, blocks, source)},"]
    path.write_text("\n".join(lines) + "\n")


def find_call(text: str, row: Row) -> ast.Call | None:
    """The call `_row(...)` of a row in the source of the table."""
    wanted = (row.op, row.arch, row.itemsize, row.block_m)
    for node in ast.parse(text).body:
        if not isinstance(node, ast.Assign) or getattr(node.targets[0], "id", None) != "TABLE":
            continue
        for call in node.value.elts:
            if tuple(getattr(value, "value", None) for value in call.args[:4]) == wanted:
                return call
    return None


def row_text(row: Row, blocks: dict[str, Any], source: str) -> str:
    """The call `_row(...)` on one line."""
    settings = dict(blocks)
    num_warps = settings.pop("num_warps")
    num_stages = settings.pop("num_stages")
    values = [row.op, row.arch, row.itemsize, row.block_m, source, num_warps, num_stages]
    words = [repr(value) for value in values]
    words += [f"{name}={value!r}" for name, value in settings.items()]
    return f"_row({', '.join(words)})".replace("'", '"')
