"""What `examples/benchmarks/tune_kernels.py --write` does to the table."""

import importlib.util
import sys
from pathlib import Path

import pytest

from peft_moe_lora.ops.kernels.launching import launch
from peft_moe_lora.ops.kernels.launching import table as rows

EXAMPLES = Path(__file__).parents[2] / "examples" / "benchmarks"


def load(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.py"
    path.write_text(Path(rows.__file__).read_text())
    return path


@pytest.mark.parametrize(
    ("op", "block_m"), [("linear_act", 128), ("linear_roles", 128), ("shrink", 16)]
)
def test_a_written_row_is_the_only_one_that_changes(table, op, block_m):
    tune = load(EXAMPLES / "tune_kernels.py", "tune_kernels")
    (row,) = (
        r for r in rows.TABLE if (r.op, r.arch, r.itemsize, r.block_m) == (op, 90, 2, block_m)
    )
    blocks = {**row.blocks, "num_stages": 7}
    tune.write_row(table, row, blocks, "a machine, a day")
    written = load(table, "written_table").TABLE
    assert len(written) == len(rows.TABLE)
    for old, new in zip(rows.TABLE, written, strict=True):
        expected = (blocks, "a machine, a day") if old is row else (old.blocks, old.source)
        assert (new.op, new.arch, new.itemsize, new.block_m) == (
            old.op,
            old.arch,
            old.itemsize,
            old.block_m,
        )
        assert (new.blocks, new.source) == expected
    tune.write_row(table, row, row.blocks, row.source)
    assert [r.blocks for r in load(table, "written_table").TABLE] == [r.blocks for r in rows.TABLE]


def test_a_row_that_is_not_there_is_an_error(table):
    tune = load(EXAMPLES / "tune_kernels.py", "tune_kernels")
    before = table.read_text()
    with pytest.raises(LookupError, match="no row"):
        tune.write_row(
            table, rows.Row("linear", 70, 2, 16, {}, ""), {"num_warps": 4, "num_stages": 1}, ""
        )
    assert table.read_text() == before


def test_a_row_that_the_layer_does_not_run_by_is_an_error_and_stays_as_it_was(monkeypatch):
    tune = load(EXAMPLES / "tune_kernels.py", "tune_kernels")
    (row,) = (
        r
        for r in rows.TABLE
        if (r.op, r.arch, r.itemsize, r.block_m) == ("linear_roles", 90, 2, 128)
    )
    plans, kept = {}, dict(row.blocks)

    class Layer:
        x = None

        def __init__(self, *sizes):
            pass

        def run(self, ops, timed):
            plans[("linear_ordered", 1, 2), 0] = None

    monkeypatch.setattr(launch, "_plans", plans)
    monkeypatch.setattr(tune, "Layer", Layer)
    monkeypatch.setattr(tune, "current_row", lambda *sizes: row)
    with pytest.raises(
        LookupError, match=r"linear_roles does not run at qwen3-30b, .*\['linear_ordered'\]"
    ):
        tune.sweep("qwen3-30b", 8192, 16, "linear_roles", ["down"], [{"GROUP": (4, 4, 4)}])
    assert row.blocks == kept
