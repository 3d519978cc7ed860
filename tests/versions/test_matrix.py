"""The table of versions is that of its results file, and the newest row is what `make` installs."""

import json
import re
import tomllib
from datetime import date

import pytest

from helpers.scripts import ROOT
from versions import matrix


def test_the_page_has_the_table_of_the_results():
    text = matrix.PAGE.read_text(encoding="utf-8")
    assert matrix.BEGIN + matrix.table() + matrix.END in text
    for found in matrix.read_results().values():
        assert found["passed"] > 0
        assert found["failed"] == 0
        date.fromisoformat(found["date"])


def test_rows_have_the_floors_and_the_pins():
    """The oldest row is held by pyproject's floors, the newest by the Makefile's pins."""
    results = matrix.read_results()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    floors = dict(re.findall(r"^([\w-]+)>=([\w.]+)", "\n".join(project["dependencies"]), re.M))
    for name in ("torch", "transformers", "peft", "accelerate"):
        got = results["oldest"][name]
        assert got == floors[name] or got.startswith(f"{floors[name]}.")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in matrix.PACKAGES:
        (pin,) = re.findall(rf"^{name.upper()} \?= {name}==([\w.]+)", makefile, re.M)
        assert results["newest"][name].split("+")[0] == pin


def test_an_unknown_row_is_refused():
    with pytest.raises(SystemExit, match=r"\['oldes'\]; there are \['oldest'"):
        matrix.main(["oldes"])


def test_results_replace_those_of_their_row_alone(tmp_path, monkeypatch):
    for name in ("RESULTS", "PAGE"):
        copy = tmp_path / getattr(matrix, name).name
        copy.write_text(getattr(matrix, name).read_text(encoding="utf-8"))
        monkeypatch.setattr(matrix, name, copy)
    before = matrix.read_results()
    changed = {**before["middle"], "passed": 7, "failed": 1}
    monkeypatch.setattr(matrix, "outcome", lambda row, folder: changed)
    assert matrix.main([f"middle={tmp_path}"]) == 1
    after = matrix.read_results()
    assert after == {**before, "middle": changed}
    assert list(after) == [row.name for row in matrix.ROWS if row.name in after]
    assert "| 7 | 1 |" in matrix.PAGE.read_text(encoding="utf-8")
    assert json.loads(matrix.RESULTS.read_text())["tests"] == list(matrix.TESTS)
