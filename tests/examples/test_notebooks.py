"""Every notebook runs from top to bottom, and nothing on stderr needs an explanation."""

import shutil
from pathlib import Path

import nbformat
import pytest

from helpers.scripts import ROOT, run

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook, tmp_path):
    copy = Path(shutil.copy(notebook, tmp_path))
    nbmake = ["-m", "pytest", "--nbmake", "--overwrite", "--nbmake-timeout=480", "-q", copy]
    run(nbmake, cwd=tmp_path)

    cells = [cell for cell in nbformat.read(copy, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells), "a cell did not run"
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs), "no plot"
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "warn" not in printed.lower(), printed


def test_there_are_notebooks_and_they_carry_prose():
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        content = nbformat.read(notebook, as_version=4)
        nbformat.validate(content)
        kinds = [cell.cell_type for cell in content.cells]
        assert kinds.count("markdown") >= kinds.count("code") / 2
