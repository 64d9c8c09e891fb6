"""The tour in JupyterLab and Chromium, as a reader sees it and uses its explorer."""

import re
import shutil
import time
from pathlib import Path

import pytest
from lab_server import NotebookPage, chromium, find_browser, jupyterlab

ROOT = Path(__file__).parents[1]
WAIT = 30_000  # milliseconds; what is waited for comes within one or two seconds

READ_IMAGE = """async ([image, expected]) => {
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    const text = bytes.reduce((text, byte) => text + String.fromCharCode(byte), "");
    return btoa(text) === expected;
}"""

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
        self.image = output.locator("img").first
        self.details = output.locator("img").last
        self.output, self.rows = output, output.locator(".widget-slider")
        expect(self.image).to_be_visible(timeout=WAIT)

    def slider(self, name):
        """The slider with this label, in view and focused."""
        slider = self.rows.filter(has_text=name).get_by_role("slider")
        slider.scroll_into_view_if_needed()
        slider.focus()
        return slider

    def press(self, button):
        """Press a button with the keyboard."""
        found = self.output.get_by_role("button", name=button, exact=True)
        found.focus()
        found.press("Enter")

    def reset(self):
        """Press Reset, and wait until the page shows every layer at full rank."""
        self.press("Reset")
        for name, rank in self.notebook.ask("explorer.sweep.ranks").items():
            words = f"{name}: rank {rank} of {rank}"
            self.expect(self.status).to_contain_text(words, timeout=WAIT)

    def settle(self, slider, axis):
        """Wait until the kernel is, and stays, where a slider stands on the page."""
        calm, limit = 0, time.monotonic() + WAIT / 1000
        while calm < 3:
            shown = int(float(slider.get_attribute("aria-valuenow")))
            held = self.notebook.ask(f"explorer.sliders[{axis!r}].value")
            calm = calm + 1 if held == shown else 0
            assert time.monotonic() < limit, f"the page says {shown}, the kernel {held}"
            time.sleep(0.1)

    def expect_the_librarys_numbers(self):
        """Wait for the present position; what is shown is what the library gives."""
        shown = self.notebook.ask("explorer.wait(30)")
        cut = (
            "cpnb.truncate(net, rank=explorer.ranks, key=explorer.switches.key.value,"
            " refit=explorer.switches.refit.value)"
        )
        assert self.notebook.ask(f"cpnb.accuracy({cut}, data)") == shown
        count = self.notebook.ask(f"sum(p.numel() for p in {cut}.parameters())")
        for text in (f"ccuracy {100 * shown:.2f} %", f"{count:,} parameters"):
            self.expect(self.status).to_contain_text(text, timeout=WAIT)
        for name, rank in self.notebook.ask("explorer.ranks").items():
            self.expect(self.status).to_contain_text(f"{name}: rank {rank} of")
        return shown

    def expect_picture(self, image, name):
        """Wait until the page shows the bytes of one of the kernel's images."""
        expected = self.notebook.ask(
            f"__import__('base64').b64encode({name}.value).decode()"
        )
        self.notebook.page.wait_for_function(
            READ_IMAGE, arg=[image.element_handle(), expected], timeout=WAIT
        )

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


def test_every_slider_and_the_budget_move_by_keyboard_to_the_librarys_numbers(tour):
    explorer = Explorer(tour)
    names = [*tour.ask("list(explorer.ranks)"), "all layers", "budget"]
    for name in names:
        explorer.reset()
        slider = explorer.slider(name)
        before = int(float(slider.get_attribute("aria-valuenow")))
        for key in ("ArrowLeft", "ArrowLeft", "ArrowRight"):
            slider.press(key)
        explorer.expect(slider).to_have_attribute(
            "aria-valuenow", f"{before - 1:.1f}", timeout=WAIT
        )
        axis = {"all layers": "*", "budget": "*budget"}.get(name, name)
        explorer.settle(slider, axis)
        if name == "budget":
            budget = f"{before - 1} * sweep.dense_parameters // 100"
            bought = f"cpnb.allocate_ranks(sweep, budget={budget}, unit='parameters')"
            text = f"Budget of {before - 1} % of the dense parameters"
            explorer.expect(explorer.status).to_contain_text(text, timeout=WAIT)
            assert tour.ask("explorer.ranks") == tour.ask(f"{bought}.ranks")
        explorer.expect_the_librarys_numbers()
    assert tour.errors() == []


def test_fast_key_presses_leave_the_last_position_on_the_page(tour):
    explorer = Explorer(tour)
    explorer.reset()
    slider = explorer.slider("conv2")
    before = int(float(slider.get_attribute("aria-valuenow")))
    for _ in range(40):
        slider.press("ArrowLeft")
    rank = f"conv2: rank {before - 40} of"
    explorer.expect(explorer.status).to_contain_text(rank, timeout=WAIT)
    explorer.expect_the_librarys_numbers()
    explorer.expect_picture(explorer.image, "explorer.image")
    # The position rests, so the details follow.
    details = explorer.output.get_by_role("group", name="details")
    words = f"conv2 {before - 40},"
    explorer.expect(details).to_contain_text(words, timeout=WAIT)
    explorer.expect_picture(explorer.details, "explorer.details.image")
    assert tour.errors() == []


def test_choices_undo_and_code_work_by_keyboard_and_code_gives_what_is_shown(tour):
    explorer = Explorer(tour)
    explorer.reset()
    slider = explorer.slider("conv2")
    slider.press("PageDown")
    explorer.expect(slider).not_to_have_attribute("aria-valuenow", "84.0")
    explorer.settle(slider, "conv2")
    explorer.expect_the_librarys_numbers()
    plain = explorer.status.inner_text()
    for choice, word in (("greedy", "'greedy'"), ("kernel", "λ: kernel")):
        explorer.press(choice)
        explorer.expect(explorer.status).to_contain_text(word, timeout=WAIT)
        shown = explorer.expect_the_librarys_numbers()
    chosen = tour.ask("[explorer.sweep.key, explorer.sweep.refit]")
    assert chosen == ["greedy", True]
    explorer.press("Copy as code")
    code = explorer.output.get_by_label("code of this network")
    explorer.expect(code).to_have_value(re.compile(re.escape(repr(shown))))
    names = "{'net': net, 'data': data}"
    run = f"(lambda ns: (exec({code.input_value()!r}, ns), ns['cut'])[1])({names})"
    assert tour.ask(f"cpnb.accuracy({run}, data)") == shown
    for _ in range(2):
        explorer.press("Undo")
    explorer.expect(explorer.status).to_have_text(
        plain, timeout=WAIT, use_inner_text=True
    )
    assert tour.ask("[explorer.sweep.key, explorer.sweep.refit]") == ["lam", False]
    assert tour.errors() == []
