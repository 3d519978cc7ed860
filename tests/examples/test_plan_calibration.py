"""The comparison of `plan` with a GPU: it runs, and its last results are within a tenth."""

import json

import pytest
from transformers import Qwen3MoeConfig

import plan_calibration
from cases import QWEN3_30B
from helpers.scripts import ROOT
from peft_moe_lora import plan

RESULTS = ROOT / "docs" / "plan_calibration.json"
WITHIN = 0.1


@pytest.mark.long
def test_the_tiny_points_run_and_leave_the_base_as_it_was(tmp_path, capsys):
    path = tmp_path / "found.json"
    assert plan_calibration.main(["--tiny", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == len(plan_calibration.POINTS) == 10
    for row, point in zip(rows, plan_calibration.POINTS, strict=True):
        assert row["failed"] is None
        assert row["ms"] > 0
        assert row["predicted"] > 0
        # without a GPU there is no peak
        assert row["measured"] is None
        assert ("nf4" in row["point"]) == (point.quant == "nf4")
    assert "predicted GiB" in capsys.readouterr().out


def test_a_point_is_compared_with_its_own_measurement():
    row = plan_calibration.Row("a step", predicted=11.0, predicted_ms=90.0)
    measured = plan_calibration.Measured(peak=10.0, ms=100.0)
    found = plan_calibration.merged(row, measured)
    assert (found.measured, found.ms, found.failed) == (10.0, 100.0, None)
    assert found.error == pytest.approx(0.1)
    failed = plan_calibration.merged(row, plan_calibration.Measured(failed="out of memory"))
    assert (failed.error, failed.failed) == (None, "out of memory")


@pytest.mark.skipif(not RESULTS.exists(), reason="the ten points were not measured on a GPU yet")
def test_predictions_are_within_a_tenth_of_what_was_measured():
    rows = json.loads(RESULTS.read_text())["rows"]
    assert len(rows) == len(plan_calibration.POINTS)
    for row, point in zip(rows, plan_calibration.POINTS, strict=True):
        assert row["point"] == plan_calibration.words(point)
        assert abs(row["error"]) <= WITHIN
        # those of 48 layers take ten seconds each
        if point.layers == 8:
            found = plan(
                Qwen3MoeConfig(**QWEN3_30B | {"num_hidden_layers": 8}),
                r=point.r,
                length=point.length,
                batch=point.batch,
                quant=point.quant,
                checkpointing=point.checkpointing,
                target_modules=plan_calibration.TARGETS,
            )
            assert found.peak_gib == pytest.approx(row["measured"], rel=WITHIN)
