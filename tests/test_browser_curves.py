"""The curve explorer in JupyterLab and Chromium, worked by keyboard."""

import shutil
from pathlib import Path

import nbformat
import pytest
from lab_server import NotebookPage, chromium, find_browser, jupyterlab

ROOT = Path(__file__).parents[1]
WAIT = 30_000  # milliseconds; what is waited for comes within one or two seconds
CODE = """\
import cpnb
from cpnb.experiments import read_results

results = read_results("results")
starts = results["initialization-mnist"].records
two = cpnb.Comparison({name: starts[name] for name in ("power", "unified")})
explorer = cpnb.CurveExplorer({"two starts": two, **results})
explorer"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        find_browser() is None, reason="no Chromium (Debian: apt install chromium)"
    ),
]


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """A notebook that shows the explorer over the committed records, in a page."""
    folder = tmp_path_factory.mktemp("browser")
    served, home = folder / "notebooks", folder / "home"
    home.mkdir()
    shutil.copytree(ROOT / "notebooks" / "results", served / "results")
    made = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(CODE)],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}},
    )
    nbformat.write(made, served / "curves.ipynb")
    with (
        jupyterlab(served, home, PYTHONPATH=str(ROOT)) as address,
        chromium(find_browser()) as browser,
    ):
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        opened = NotebookPage(page, address, "curves.ipynb")
        opened.run_all()
        yield opened


@pytest.fixture
def output(notebook):
    """The output that holds the explorer, once its picture is there."""
    from playwright.sync_api import expect

    page = notebook.page
    found = page.locator(".jp-OutputArea-output", has=page.get_by_role("status"))
    expect(found.locator("img")).to_be_visible(timeout=WAIT)
    return found


def lines_of(notebook):
    """What the library says about the methods that are chosen in the kernel."""
    return notebook.ask(
        "__import__('cpnb._explorer.curves', fromlist=['x'])"
        ".result_lines(explorer.comparison, explorer.chosen)"
    )


@pytest.mark.parametrize("menu", ["measure", "against", "experiment"])
def test_menu_changes_picture_and_words_by_keyboard(notebook, output, menu):
    from playwright.sync_api import expect

    image, box = output.locator("img"), output.get_by_label(menu, exact=True)
    source, picture = image.get_attribute("src"), image.screenshot()
    before = box.input_value()
    box.focus()
    # JupyterLab takes an arrow key for itself; Enter opens the menu, which then has it.
    for key in ("Enter", "ArrowDown", "Enter"):
        box.press(key)
    expect(box).not_to_have_value(before, timeout=WAIT)
    expect(image).not_to_have_attribute("src", source, timeout=WAIT)
    notebook.page.wait_for_function("e => e.complete", arg=image.element_handle())
    assert image.screenshot() != picture
    for line in lines_of(notebook):
        expect(output.get_by_role("status")).to_contain_text(line, timeout=WAIT)
    assert notebook.errors() == []


def test_boxes_choose_what_is_drawn_and_said(notebook, output):
    from playwright.sync_api import expect

    image, status = output.locator("img"), output.get_by_role("status")
    source = image.get_attribute("src")
    names = notebook.ask("list(explorer.methods)")
    box = output.get_by_role("checkbox", name=names[0], exact=True)
    expect(box).to_be_checked()
    expect(status).to_contain_text(f"{names[0]}: test accuracy", timeout=WAIT)
    box.focus()
    box.press("Space")
    expect(status).not_to_contain_text(f"{names[0]}: test accuracy", timeout=WAIT)
    expect(image).not_to_have_attribute("src", source, timeout=WAIT)
    assert notebook.ask("list(explorer.chosen)") == names[1:]
    for line in lines_of(notebook):
        expect(status).to_contain_text(line, timeout=WAIT)
    # What ipywidgets shows in the place of a widget whose view cannot be made.
    assert notebook.page.get_by_text("javascript error").count() == 0
    assert notebook.errors() == []
