"""What `examples/benchmarks/tune_kernels.py --write` does to the table."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import tune_kernels
from cases import Case, Problem, shape_of
from checking import BOUNDS, reference, relative_error
from peft_moe_lora.ops import reference as reference_ops
from peft_moe_lora.ops.kernels.launching import launch
from peft_moe_lora.ops.kernels.launching import table as rows
from table_rows import write_row


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
    (row,) = (
        r for r in rows.TABLE if (r.op, r.arch, r.itemsize, r.block_m) == (op, 90, 2, block_m)
    )
    blocks = {**row.blocks, "num_stages": 7}
    write_row(table, row, blocks, "a machine, a day")
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
    write_row(table, row, row.blocks, row.source)
    assert [r.blocks for r in load(table, "written_table").TABLE] == [r.blocks for r in rows.TABLE]


def test_a_row_that_is_not_there_is_an_error(table):
    before = table.read_text()
    with pytest.raises(LookupError, match="no row"):
        write_row(
            table, rows.Row("linear", 70, 2, 16, {}, ""), {"num_warps": 4, "num_stages": 1}, ""
        )
    assert table.read_text() == before


def test_a_row_that_the_layer_does_not_run_by_is_an_error_and_stays_as_it_was(monkeypatch):
    (row,) = (
        r
        for r in rows.TABLE
        if (r.op, r.arch, r.itemsize, r.block_m) == ("linear_roles", 90, 2, 128)
    )
    plans = {}
    kept = dict(row.blocks)

    class Layer:
        x = None

        def __init__(self, case):
            pass

        def run(self, ops, timed):
            plans[("linear_ordered", 1, 2), 0] = None

    monkeypatch.setattr(launch, "_plans", plans)
    monkeypatch.setattr(tune_kernels, "Layer", Layer)
    monkeypatch.setattr(tune_kernels, "current_row", lambda *sizes: row)
    case = tiny_case()
    with pytest.raises(
        LookupError, match=r"linear_roles does not run at tiny .*\['linear_ordered'\]"
    ):
        tune_kernels.sweep(case, "linear_roles", ["down"], [{"GROUP": (4, 4, 4)}])
    assert row.blocks == kept


def tiny_case() -> Case:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Case("tiny", *shape_of("4,32,16,2"), 24, 4, torch.float16, 0.0, device)


def test_the_layer_of_the_operations_is_the_benchmarks_layer():
    layer = tune_kernels.Layer(tiny_case())
    assert tune_kernels.worst_error(layer) < 5e-3
    problem = Problem(tiny_case())
    out, dx, d_row_weights, d_up_A, d_up_B, _, _ = layer.run(reference_ops)
    expected = reference(problem, problem.scaling)
    assert relative_error(out, expected["out"]) < BOUNDS[torch.float16]
    assert relative_error(dx, expected["d x"]) < BOUNDS[torch.float16]
    d_weights = expected["d top_k_weights"]
    assert relative_error(d_row_weights.view_as(d_weights), d_weights) < BOUNDS[torch.float16]
    assert relative_error(d_up_A.flatten(0, 1), expected["d lora_A.gate_up"]) < 5e-3
    d_up_B = d_up_B.transpose(0, 1).flatten(1)
    assert relative_error(d_up_B, expected["d lora_B.gate_up"]) < 5e-3
