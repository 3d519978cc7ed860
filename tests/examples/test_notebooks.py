"""Every notebook runs from top to bottom, and nothing on stderr needs an explanation."""

import io
import shutil
from pathlib import Path

import nbformat
import pytest

from examples import notebook_outputs
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

    ran = notebook_outputs.cleaned(nbformat.read(copy, as_version=4))
    committed = nbformat.read(notebook, as_version=4)
    assert notebook_outputs.compared(committed) == notebook_outputs.compared(ran), "make notebooks"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_has_outputs_and_nothing_of_one_machine(notebook):
    text = notebook.read_text(encoding="utf-8")
    content = nbformat.reads(text, as_version=4)
    assert any(
        "image/png" in o.get("data", {}) for c in content.cells for o in c.get("outputs", ())
    )
    nbformat.write(notebook_outputs.cleaned(content), written := io.StringIO())
    assert written.getvalue() == text.rstrip("\n") + "\n"
    assert str(Path.home()) not in text
    assert "/tmp/tmp" not in text


def test_there_are_notebooks_and_they_carry_prose():
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        content = nbformat.read(notebook, as_version=4)
        nbformat.validate(content)
        kinds = [cell.cell_type for cell in content.cells]
        assert kinds.count("markdown") >= kinds.count("code") / 2
