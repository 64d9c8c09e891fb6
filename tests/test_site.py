"""The site in Chromium, from disk: its pages, links, sliders, search and colours."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from lab_server import chromium, find_browser

from pages import MODULES

ROOT = Path(__file__).parents[1]
# What a page links to and can be linked at, and what of it cannot be seen.
READ = """() => ({
    links: [...document.links].map(link => link.href),
    ids: [...document.querySelectorAll("[id]")].map(each => each.id),
    unseen: document.documentElement.scrollWidth > window.innerWidth
        || [...document.images].some(image => !image.naturalWidth),
})"""
BACKGROUND = "() => getComputedStyle(document.body).backgroundColor"
IS_DARK = "() => matchMedia('(prefers-color-scheme: dark)').matches"

missing = pytest.mark.skipif(find_browser() is None, reason="apt install chromium")
pytestmark = [pytest.mark.browser, missing]


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "notebooks/build.py", "--site", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)  # a warning of Sphinx is an error
    return folder


@pytest.fixture(params=[400, 1300], ids=["phone", "wide"])
def page(request):
    """A page without a network; what it complains of, or asks a host for, fails."""
    size = {"width": request.param, "height": 900}
    complaints, schemes = [], set()
    with chromium() as browser:
        page = browser.new_page(offline=True, viewport=size, color_scheme="null")
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: m.type == "log" or complaints.append(m.text))
        page.on("requestfailed", lambda failed: complaints.append(failed.url))
        page.on("request", lambda sent: schemes.add(urlsplit(sent.url).scheme))
        yield page
    assert complaints == []
    assert schemes <= {"file", "data"}


def test_site_pages_fit_the_width_and_link_to_what_exists(site, page):
    pages = {}
    for path in sorted(site.rglob("*.html")):
        page.goto(path.as_uri())
        pages[path] = page.evaluate(READ)
    assert {path.stem for path in pages} >= {*MODULES, "index", "00_tour", "README"}
    for path, content in pages.items():
        assert not content["unseen"], path
        for link in map(urlsplit, content["links"]):
            if link.scheme == "file":
                target = Path(unquote(link.path))
                assert target.is_file(), (path.name, link)
                anchors = pages[target]["ids"] if link.fragment else [""]
                assert unquote(link.fragment) in anchors, (path.name, link)


@pytest.mark.parametrize("name", ["00_tour", "05_truncation"])
def test_site_shows_the_explorer_of_the_committed_run(site, page, name):
    from playwright.sync_api import expect

    cells = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4).cells
    (cell,) = (each for each in cells if "explorer = cpnb.Rank" in each.source)
    accuracy = re.search(r"accuracy ([\d.]+)%", str(cell.outputs))[1]
    page.goto((site / "notebooks" / f"{name}.html").as_uri())
    frame = page.frame_locator("iframe.explorer")
    numbers, sliders = frame.get_by_role("status"), frame.get_by_role("slider")
    expect(numbers).to_contain_text(f"Accuracy {accuracy} % measured")
    frame.locator("summary").first.click()
    for place, key in enumerate(["Home", "End"]):  # all layers down, one up again
        before = numbers.inner_text()
        sliders.nth(place).press(key)
        expect(numbers).not_to_have_text(before)
    # The frame follows the page in colour, and what it shows in height.
    page.wait_for_timeout(200)
    hidden = "each => each.contentDocument.body.scrollHeight - each.clientHeight"
    assert page.locator("iframe.explorer").evaluate(hidden) <= 0
    light = page.evaluate(BACKGROUND)
    page.locator(".theme-toggle:visible").first.click()
    assert page.evaluate(BACKGROUND) != light
    assert frame.locator("html").evaluate(IS_DARK)


def test_site_search_finds_notebooks_and_functions(site, page):
    page.goto((site / "index.html").as_uri())
    box = page.locator("input[name=q]")  # on a phone it is behind a button
    box.evaluate("box => { box.value = 'truncation'; box.form.submit(); }")
    for name in ("05_truncation", "cpnb.truncation"):
        page.wait_for_selector(f"ul.search a[href*='{name}.html']")


def test_site_documents_every_public_name(site):
    for module in MODULES:
        page = (site / "api" / f"{module}.html").read_text()
        names = {f"{module}.{name}" for name in import_module(module).__all__}
        assert {
            name for name in names - {*MODULES} if f'id="{name}"' not in page
        } == set()
