"""Debian's Chromium opens every page of the site that `make docs` built.

A page shows no error, asks nothing of another machine, shows its pictures and its tables, and does
not scroll sideways on a phone.
"""

import functools
import http.server
import re
import shutil
import threading

import pytest

from site_pages import ROOT, navigation, source_of

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright; `make test-docs` installs it"
)

pytestmark = pytest.mark.docs

HTML = ROOT / "build" / "site" / "html"
PAGES = sorted(path.parent.relative_to(HTML).as_posix() for path in HTML.rglob("index.html"))
DESKTOP = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}

# widths in pixels of what the page shows and of the window; a bar for scrolling takes a part of it
WIDTHS = "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
# pictures that the browser could not show, by address; lazy ones are asked for first
BROKEN_PICTURES = """async () => {
    const broken = [];
    for (const picture of document.images) {
        picture.loading = "eager";
        await picture.decode().catch(() => broken.push(picture.src));
    }
    return broken;
}"""
# the text of a page without its code
PROSE = """() => {
    const article = document.querySelector("article").cloneNode(true);
    article.querySelectorAll("pre, code").forEach(code => code.remove());
    return article.textContent;
}"""
MARKDOWN = re.compile(r"^\s*(?:\||:::|#+ |```)|\]\(|\*\*", re.MULTILINE)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and prints nothing."""

    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="module")
def address():
    """Where the site is served."""
    handler = functools.partial(Quiet, directory=HTML)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    assert chromium, "needs Chromium: apt-get install chromium"
    with playwright.sync_playwright() as started:
        # without its sandbox, which it refuses to a root user, as in a container
        opened = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser, address):
    """Opens a page of the site; when the test ends, nothing may have gone wrong in it."""
    wrong = []
    contexts = []

    def heard(message):
        if message.type in ("error", "warning"):
            wrong.append(f"console: {message.text}")

    def requested(request):
        if not request.url.startswith((address, "data:", "blob:")):
            wrong.append(f"request to {request.url}")

    def answered(response):
        if response.status >= 400:
            wrong.append(f"{response.status} for {response.url}")

    def opened(path, viewport):
        contexts.append(browser.new_context(viewport=viewport))
        page = contexts[-1].new_page()
        page.on("console", heard)
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("request", requested)
        page.on("response", answered)
        page.goto(f"{address}/{path}/".replace("/./", "/"), wait_until="networkidle")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def test_the_site_is_built():
    assert PAGES, "`make docs` builds the site that these tests open"
    assert len(PAGES) == len(navigation())


@pytest.mark.parametrize("path", PAGES)
def test_a_page_opens(path, open_page):
    page = open_page(path, DESKTOP)
    assert page.locator("article h1").count() == 1
    assert page.evaluate(BROKEN_PICTURES) == []
    assert not MARKDOWN.search(page.evaluate(PROSE)), "Markdown is left over"


@pytest.mark.parametrize("path", PAGES)
def test_a_page_fits_a_phone(path, open_page):
    needed, there = open_page(path, PHONE).evaluate(WIDTHS)
    assert needed <= there


@pytest.mark.parametrize(
    ("viewport", "button"),
    [(DESKTOP, "button.md-search__button"), (PHONE, "label[for=__search]")],
    ids=["desktop", "phone"],
)
def test_search_finds_words_and_names(viewport, button, open_page):
    page = open_page(".", viewport)
    for words, expected in (("expert-major", "docs/design"), ("convert_adapter", "api/files")):
        page.locator(button).first.click()
        page.get_by_role("combobox").fill(words)
        found = page.get_by_role("option")
        found.first.wait_for()
        links = [
            option.get_attribute("href")
            for option in found.all()
            if words in option.inner_text().lower()
        ]
        assert any(expected in link for link in links), links
        page.keyboard.press("Escape")


def test_a_found_page_is_opened(open_page):
    page = open_page(".", DESKTOP)
    page.keyboard.press("Control+k")
    page.get_by_role("combobox").fill("expert-major")
    page.get_by_role("option").first.click()
    page.wait_for_url("**/docs/**")
    assert "expert-major" in page.locator("article").inner_text().lower()


def test_a_phone_has_a_menu_of_all_pages(open_page):
    page = open_page(".", PHONE)
    entry = page.locator("nav.md-nav--primary").get_by_text("Quickstart").first
    # the menu stands beside the window
    playwright.expect(entry).not_to_be_in_viewport()
    page.locator("header label[for=__drawer]").click()
    playwright.expect(entry).to_be_in_viewport()
    entry.click()
    page.wait_for_url("**/notebooks/1-quickstart/")


def test_notebooks_show_their_pictures_and_formulas(open_page):
    for path in (p for p in navigation() if source_of(p).suffix == ".ipynb"):
        page = open_page(path.removesuffix(".md"), DESKTOP)
        assert page.locator("article img").count() > 0
        assert "$" not in page.locator("article p").all_inner_texts()[0]


def test_the_reference_shows_shapes_and_errors(open_page):
    page = open_page("docs/site/api/functional", DESKTOP)
    text = page.locator("article").inner_text()
    assert "[T, top_k] integer" in text
    assert re.search(r"Raises:\s+ValueError\s+.\s+if the shapes do not agree", text)


def test_the_reference_reads_sections_of_several_lines(open_page):
    page = open_page("docs/site/api/load", DESKTOP)
    (returned,) = page.locator("article li", has_text="the loads of this process").all_inner_texts()
    assert "counts once" in returned


def test_the_reference_reads_a_line_of_several_parameters(open_page):
    page = open_page("docs/site/api/quantized", DESKTOP)
    described = page.locator("article li", has_text="as in quantize_experts").all_inner_texts()
    assert [text.split()[0] for text in described] == ["blocksize", "double_quant"]
