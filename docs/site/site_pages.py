"""The pages of the documentation site: which they are, and a copy of them in one folder.

Zensical reads one folder that lies beside its configuration. Every page of the configuration's
`nav` is copied there under its path in the repository, so links between pages stay what they are.
Other files that a page links to are copied too. A notebook becomes Markdown with the outputs that
are committed in it; nothing is run.
"""

import re
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONFIG = Path(__file__).with_name("zensical.toml")
ASSETS = Path("docs/site/assets")

# [text](target) and ![text](target), the target without its anchor; src="target"
_TARGETS = (re.compile(r"\]\(([^)#\s]+)"), re.compile(r'\bsrc="([^"]+)"'))
_ELSEWHERE = re.compile(r"[a-z]+:")
_CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
_FORMULA = re.compile(r"\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+)\$", re.DOTALL)


def pages_of(nav: list[dict[str, Any]]) -> Iterator[str]:
    """Paths of the pages in a `nav`, in its order."""
    for entry in nav:
        for target in entry.values():
            if isinstance(target, str):
                yield target
            else:
                yield from pages_of(target)


def navigation() -> list[str]:
    """Paths of all pages of the site, in the repository; a notebook's ends with `.md`."""
    project = tomllib.loads(CONFIG.read_text(encoding="utf-8"))["project"]
    return list(pages_of(project["nav"]))


def source_of(page: str) -> Path:
    """The file that a page is made of: Markdown, or a notebook of that name.

    Raises:
        FileNotFoundError: if there is neither.
    """
    path = ROOT / page
    for source in (path, path.with_suffix(".ipynb")):
        if source.is_file():
            return source
    raise FileNotFoundError(f"{CONFIG.name}: nav names {page}, and there is no such file.")


def linked_files(source: Path) -> Iterator[Path]:
    """Files of the repository that a page links to or shows.

    Raises:
        FileNotFoundError: if a link leads to no file.
    """
    text = _CODE.sub("", source.read_text(encoding="utf-8"))
    for pattern in _TARGETS:
        for target in pattern.findall(text):
            if _ELSEWHERE.match(target):
                continue
            path = (source.parent / target).resolve()
            if not path.is_file():
                raise FileNotFoundError(f"{source.relative_to(ROOT)} links to {target}: no file.")
            yield path


def with_mathml(text: str) -> str:
    """Markdown with its formulas as MathML, which browsers show without a script."""
    from latex2mathml.converter import convert

    def mathml(found: re.Match[str]) -> str:
        if found["block"]:
            return convert(found["block"], display="block")
        return convert(found["inline"])

    return _FORMULA.sub(mathml, text)


def copy_markdown(source: Path, folder: Path) -> None:
    """Copy a page, and the files it links to that are no pages, into the folder of all pages."""
    for linked in linked_files(source):
        if linked.suffix not in (".md", ".ipynb"):
            copied = folder / linked.relative_to(ROOT)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(linked, copied)
    text = re.sub(r"\.ipynb(?=[)#])", ".md", source.read_text(encoding="utf-8"))
    (folder / source.relative_to(ROOT)).write_text(text, encoding="utf-8")


def convert_notebook(source: Path, folder: Path) -> None:
    """Write a notebook as Markdown, with its pictures beside it."""
    import nbformat
    from nbconvert import MarkdownExporter

    notebook = nbformat.read(source, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_mathml(cell.source)
    page = folder / source.relative_to(ROOT).with_suffix(".md")
    naming = {"unique_key": page.stem, "output_files_dir": f"{page.stem}_files"}
    text, resources = MarkdownExporter().from_notebook_node(notebook, naming)
    page.write_text(text, encoding="utf-8")
    for name, content in resources["outputs"].items():
        picture = page.parent / name
        picture.parent.mkdir(exist_ok=True)
        picture.write_bytes(content)


def gather(folder: Path) -> None:
    """Write all pages, and what they show, into a folder.

    Raises:
        FileNotFoundError: if `nav` or a page names a file that is not there.
    """
    for page in navigation():
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        source = source_of(page)
        if source.suffix == ".ipynb":
            convert_notebook(source, folder)
        else:
            copy_markdown(source, folder)
    shutil.copytree(ROOT / ASSETS, folder / ASSETS)
