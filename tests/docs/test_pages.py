"""Every page has its place on the site, and every public name its place in the reference."""

import re
from pathlib import Path

import pytest

import peft_moe_lora
import site_pages
from site_pages import ROOT, linked_files, navigation, pages_of, source_of

API = ROOT / "docs" / "site" / "api"
WRITTEN = (
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("docs/guides/*.md"),
    *API.glob("*.md"),
    *ROOT.glob("notebooks/*.ipynb"),
    *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "README.md")),
)


def names_in(pages):
    """Names whose docstrings pages of the reference show."""
    found = []
    for page in pages:
        found += re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    return found


def test_every_page_is_in_the_navigation_once():
    shown = [source_of(page) for page in navigation()]
    assert len(set(shown)) == len(shown)
    missing = {path.relative_to(ROOT).as_posix() for path in set(WRITTEN) - set(shown)}
    assert not missing, "nav in docs/site/zensical.toml lacks pages"


def test_the_navigation_is_read_through_its_sections():
    nav = [{"A": "a.md"}, {"B": [{"C": "c.md"}, {"D": [{"E": "e.md"}]}]}, {"F": "f.md"}]
    assert list(pages_of(nav)) == ["a.md", "c.md", "e.md", "f.md"]


def test_a_page_that_is_not_there_is_an_error():
    with pytest.raises(FileNotFoundError, match=r"nav names docs/nothing\.md"):
        source_of("docs/nothing.md")


@pytest.mark.parametrize("page", [p for p in navigation() if source_of(p).suffix == ".md"])
def test_links_lead_to_files(page):
    """Also to no folder: a site has pages and files alone."""
    assert all(path.is_relative_to(ROOT) for path in linked_files(source_of(page)))


def test_every_public_name_is_in_the_reference():
    shown = names_in(API.glob("*.md"))
    assert len(set(shown)) == len(shown)
    public = {f"peft_moe_lora.{name}" for name in peft_moe_lora.__all__}
    assert public <= set(shown)


def test_the_overview_lists_the_public_names():
    text = Path(API, "index.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\[peft_moe_lora\.(\w+)\]", text)
    assert sorted(linked) == sorted(peft_moe_lora.__all__)


@pytest.mark.parametrize("target", ["docs", "docs/nothing.md", "nothing.png"])
def test_a_link_to_no_file_is_an_error(target, tmp_path, monkeypatch):
    monkeypatch.setattr(site_pages, "ROOT", tmp_path)
    Path(tmp_path, "docs").mkdir()
    Path(tmp_path, "page.md").write_text("[there](page.md#a) `[code](x)` [web](https://a.b)\n")
    assert list(linked_files(tmp_path / "page.md")) == [tmp_path / "page.md"]
    Path(tmp_path, "page.md").write_text(f"![not there]({target})\n")
    with pytest.raises(FileNotFoundError, match=f"links to {target}"):
        list(linked_files(tmp_path / "page.md"))
