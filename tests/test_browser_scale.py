"""The scale explorer in JupyterLab and Chromium: its slider by key, its list too."""

from pathlib import Path

import nbformat
import pytest
from lab_server import NotebookPage, chromium, find_browser, jupyterlab

ROOT = Path(__file__).parents[1]
WAIT = 30_000  # milliseconds; what is waited for comes within one or two seconds
CELL = """\
import cpnb

table = [
    {
        "spread": spread, "condition": 3 * 100**spread, "equilibrated": 3.0,
        "curvature": 2 * 1000**spread, "balanced_curvature": 1.5,
        "accuracy": 0.97 - spread / 5, "rate": 0.4 - spread / 5,
        "balanced_accuracy": 0.975,
    }
    for spread in (0.0, 0.5, 1.0)
]
explorer = cpnb.ScaleExplorer(table)
explorer
"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        find_browser() is None, reason="no Chromium (Debian: apt install chromium)"
    ),
]


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """A notebook that shows the explorer of a small table, in a page."""
    folder = tmp_path_factory.mktemp("browser")
    served, home = folder / "notebooks", folder / "home"
    served.mkdir(), home.mkdir()
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    page.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(page, served / "scale.ipynb")
    with (
        jupyterlab(served, home, PYTHONPATH=str(ROOT)) as address,
        chromium(find_browser()) as browser,
    ):
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        notebook = NotebookPage(page, address, "scale.ipynb")
        notebook.run_all()
        yield notebook


def test_key_and_list_move_picture_and_words_to_the_row_they_name(notebook):
    from playwright.sync_api import expect

    page = notebook.page
    output = page.locator(".jp-OutputArea-output", has=page.get_by_role("status"))
    status, image = output.get_by_role("status"), output.locator("img")
    expect(image).to_be_visible(timeout=WAIT)
    expect(status).to_contain_text("accuracy 97.0 %", timeout=WAIT)
    source, picture = image.get_attribute("src"), image.screenshot()

    slider = output.get_by_role("slider")
    slider.focus()
    slider.press("ArrowRight")
    expect(status).to_contain_text("condition number 30,", timeout=WAIT)
    expect(status).to_contain_text("accuracy 87.0 %, balanced 97.5 %", timeout=WAIT)
    expect(image).not_to_have_attribute("src", source, timeout=WAIT)
    page.wait_for_function("e => e.complete", arg=image.element_handle())
    assert image.screenshot() != picture
    assert notebook.ask("explorer.point.spread") == 0.5

    output.get_by_label("spread (value)").select_option("1")
    expect(status).to_contain_text("accuracy 77.0 %", timeout=WAIT)
    assert notebook.ask("explorer.spread.value") == 2
    assert page.get_by_text("javascript error").count() == 0
    assert notebook.errors() == []
