"""The outputs that are committed with the notebooks.

    python tests/examples/notebook_outputs.py

`make notebooks` is this. A reader sees what each cell prints and draws without running it. What
differs from run to run is left out: lines on stderr, widgets, execution times, temporary folders.
"""

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
# longest a cell may take, in seconds
TIMEOUT = 480
_TEMPORARY = re.compile(r"/tmp/tmp\w+")
_WIDGET = "application/vnd.jupyter.widget-view+json"


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """The notebook without what differs from run to run; it is changed in place."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _joined(_cleaned(output) for output in cell.outputs if _stays(output))
    return notebook


def compared(notebook: NotebookNode) -> list[tuple]:
    """What must be the same in every run: kinds of outputs, and texts without numbers."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            text = output.get("text") or data.get("text/plain", "")
            found.append((cell.source, output.output_type, sorted(data), _without_numbers(text)))
    return found


def _joined(outputs: Iterable[NotebookNode]) -> list[NotebookNode]:
    """What is printed comes in as many pieces as chance has it."""
    found: list[NotebookNode] = []
    for output in outputs:
        if found and output.output_type == found[-1].output_type == "stream":
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def _stays(output: NotebookNode) -> bool:
    return output.get("name") != "stderr" and _WIDGET not in output.get("data", {})


def _cleaned(output: NotebookNode) -> NotebookNode:
    if "text" in output:
        output.text = _TEMPORARY.sub("/tmp/folder", output.text)
    return output


def _without_numbers(text: str) -> str:
    # the width of a number changes the blanks beside it
    text = re.sub(r"[-+]?\d[\d,_]*\.?\d*(e[-+]?\d+)?", "0", text)
    return re.sub(r"[\s0]+", " 0 ", text)


def main() -> None:
    """Run every notebook, and write its outputs into it."""
    # as in the tests: DeepSpeed, where it is installed, would warn that there is no accelerator
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=TIMEOUT).execute()
        nbformat.write(cleaned(notebook), path)
        print(path.name)


if __name__ == "__main__":
    sys.exit(main())
