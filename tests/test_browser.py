"""The tour in JupyterLab and Chromium, as a reader sees it and moves its slider."""

import shutil
from pathlib import Path

import pytest
from lab_server import NotebookPage, chromium, find_browser, jupyterlab

ROOT = Path(__file__).parents[1]
WAIT = 30_000  # milliseconds; what is waited for comes within one or two seconds

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        find_browser() is None, reason="no Chromium (Debian: apt install chromium)"
    ),
]


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """The tour, run to its end in fast mode, in a page."""
    folder = tmp_path_factory.mktemp("browser")
    served, home = folder / "notebooks", folder / "home"
    home.mkdir()
    shutil.copytree(ROOT / "notebooks", served, ignore=shutil.ignore_patterns(".*"))
    kernels = {"CPNB_FAST": "1", "PYTHONPATH": str(ROOT)}
    with (
        jupyterlab(served, home, **kernels) as address,
        chromium(find_browser()) as browser,
    ):
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        notebook = NotebookPage(page, address, "00_tour.ipynb")
        notebook.run_all()
        yield notebook


class Explorer:
    """The rank explorer on the page, and what its kernel knows about it."""

    def __init__(self, notebook):
        """Find the widgets in the output that has a status line."""
        from playwright.sync_api import expect

        page = notebook.page
        self.notebook, self.expect = notebook, expect
        output = page.locator(".jp-OutputArea-output", has=page.get_by_role("status"))
        self.status = output.get_by_role("status")
        self.image = output.locator("img")
        self.rows = output.locator(".widget-slider")
        expect(self.image).to_be_visible(timeout=WAIT)

    def slider(self, name):
        """The slider with this label, in view and focused."""
        slider = self.rows.filter(has_text=name).get_by_role("slider")
        slider.scroll_into_view_if_needed()
        slider.focus()
        return slider

    def row(self, layer, rank):
        """The row of the explorer's table for one layer cut to one rank."""
        rows = f"[r for r in rows if (r['layer'], r['rank']) == ({layer!r}, {rank})]"
        (row,) = self.notebook.ask(f"(rows := explorer.sweep.to_rows()) and {rows}")
        return row

    def expect_status(self, row):
        """Wait until the status has the numbers of a row of the table."""
        for text in (
            f"{row['layer']}: rank {row['rank']} of {row['full_rank']}",
            f"ccuracy {100 * row['accuracy']:.2f} %",
            f"relative kernel error {row['relative_error']:.3f}",
            f"{row['parameters']:,} parameters",
        ):
            self.expect(self.status).to_contain_text(text, timeout=WAIT)


def test_tour_runs_without_errors_in_its_cells_and_widgets(tour):
    assert tour.errors() == []
    # What ipywidgets shows in the place of a widget whose view cannot be made.
    assert tour.page.get_by_text("javascript error").count() == 0


@pytest.mark.parametrize("key", ["ArrowLeft", "Home"])
def test_slider_shows_picture_position_and_numbers_of_the_rank_it_is_moved_to(
    tour, key
):
    explorer = Explorer(tour)
    expect, image = explorer.expect, explorer.image
    layer = tour.ask("list(explorer.ranks)")[-1]
    slider = explorer.slider(layer)
    before = int(float(slider.get_attribute("aria-valuenow")))
    source, picture = image.get_attribute("src"), image.screenshot()
    words = explorer.status.inner_text()
    rank = {"ArrowLeft": before - 1, "Home": 1}[key]

    slider.press(key)

    expect(slider).to_have_attribute("aria-valuenow", f"{rank:.1f}", timeout=WAIT)
    expect(explorer.status).to_contain_text(f"{layer}: rank {rank} of", timeout=WAIT)
    accuracy = tour.ask("explorer.wait(30)")
    # The network cut to these ranks and evaluated anew, the table, then the page.
    assert tour.ask("cpnb.accuracy(explorer.truncated(), data)") == accuracy
    row = explorer.row(layer, rank)
    assert row["accuracy"] == accuracy
    explorer.expect_status(row)
    assert explorer.status.inner_text() != words
    expect(image).not_to_have_attribute("src", source, timeout=WAIT)
    tour.page.wait_for_function("e => e.complete", arg=image.element_handle())
    assert image.screenshot() != picture
    assert tour.errors() == []
