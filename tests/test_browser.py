"""The rank explorer and `explore` in Chromium: a page from disk, and JupyterLab."""

import json
import re
from pathlib import Path

import jupytext
import nbformat
import pytest
import torch
from lab_server import NotebookPage, chromium, find_browser, jupyterlab

import cpnb
from cpnb.explore.page import SCRIPT, STYLE, explorer_table, sweep_points
from cpnb.truncation import KEYS

ROOT = Path(__file__).parents[1]
WAIT = 30_000  # milliseconds; what is waited for comes within one or two seconds

CELLS = [
    "import cpnb",
    """data = cpnb.load_data("digits")
net = cpnb.canonicalize(cpnb.DigitsNet(), init="unified")
cpnb.fit(net, data, epochs=2, progress=False)
sweep = cpnb.rank_sweep(net, data, progress=False)""",
    "explorer = cpnb.RankExplorer(sweep, net, data)\nexplorer",
    """def draw(figure, rank, method):
    figure.subplots().plot(range(rank))
    return f"{method}, rank {rank}"

box = cpnb.explore.explore(draw, rank=range(1, 85), method=["power", "als"])
box""",
]
# The smallest text of an element, as the reader sees it, and whether it runs over.
LAYOUT = """root => ({
    text: Math.min(...[root, ...root.querySelectorAll("*")]
        .filter(each => each.textContent && each.getClientRects().length)
        .map(each => parseFloat(getComputedStyle(each).fontSize))),
    over: document.documentElement.scrollWidth - window.innerWidth,
})"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        find_browser() is None, reason="no Chromium (Debian: apt install chromium)"
    ),
]


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def network():
    generator = torch.Generator().manual_seed(0)
    data = cpnb.load_data("digits")
    net = cpnb.DigitsNet(generator=generator)
    net = cpnb.canonicalize(net, init="unified", generator=generator)
    cpnb.fit(net, data, epochs=4, progress=False)
    return net, data


@pytest.fixture(scope="module")
def sweep(network):
    return cpnb.rank_sweep(*network, progress=False)


class Explorer:
    """The rank explorer on a page, offline or in a notebook."""

    def __init__(self, page):
        from playwright.sync_api import expect

        self.page, self.expect = page, expect
        self.root = page.locator(".cpnb-explorer")
        self.status = self.root.get_by_role("status")
        self.expect(self.status).to_be_visible(timeout=WAIT)
        self.button("Reset").click()

    def open(self, *sections):
        """Unfold sections, with the keyboard."""
        for name in sections:
            details = self.root.locator("details", has_text=name)
            if details.get_attribute("open") is None:
                details.locator("summary").press("Enter")
        return self

    def button(self, name):
        return self.root.get_by_role("button", name=name)

    def press(self, name, *keys):
        """Press keys on a slider."""
        slider = self.root.get_by_role("slider", name=name, exact=True)
        slider.focus()
        for key in keys:
            slider.press(key)
        return slider

    def shows(self, *texts):
        for text in texts:
            self.expect(self.status).to_contain_text(text, timeout=WAIT)

    def code(self):
        """Ranks in the call that the explorer copies."""
        if not self.root.get_by_label("code").is_visible():
            self.button("Copy as code").press("Enter")
        text = self.root.get_by_label("code").input_value()
        return json.loads(re.search(r"rank = (\{.*\})", text).group(1)), text


@pytest.fixture(params=[1440, 400], ids=["wide", "phone"])
def page(request, browser, sweep, tmp_path):
    """The page of a sweep, opened from disk without a network."""
    sweep.to_html(tmp_path / "sweep.html")
    size = {"width": request.param, "height": 900}
    context = browser.new_context(offline=True, viewport=size)
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.goto((tmp_path / "sweep.html").as_uri())
    yield Explorer(page)
    context.close()
    assert errors == []


@pytest.mark.parametrize(
    ("name", "keys", "place"),
    [
        ("conv2", ["ArrowLeft", "ArrowLeft", "ArrowRight"], 83),
        ("fc1", ["Home", *["ArrowRight"] * 4], 5),
        ("fc2", ["Home"], 1),
        ("all layers", ["PageDown"], 0.9),
        ("all layers", ["Home", "End", *["ArrowLeft"] * 40], 0.6),
    ],
)
def test_page_shows_the_numbers_of_the_table_where_a_slider_is_moved(
    page, sweep, name, keys, place
):
    page.open("Each layer", "Accuracy against parameters")
    slider = page.press(name, *keys)
    axis, column = ("*", "keep") if name == "all layers" else (name, "rank")
    curve = sweep.curve(axis)
    row = curve[(curve[column] - place).abs() < 1e-9].iloc[0]
    ratio = row["parameters"] / sweep.dense_parameters
    page.shows(f"Accuracy {100 * row['accuracy']:.2f} % measured")
    page.shows(f"parameters {ratio:.2f} × dense")
    error = re.search(r"kernel error (\d\.\d+)", page.status.inner_text()).group(1)
    ranks, _ = page.code()
    assert ranks == {each: row[f"rank_{each}"] for each in sweep.layers}
    if axis == "*":
        assert float(error) == pytest.approx(row["relative_error"], abs=6e-4)
        text = f"keep {100 * place:g} %: {row['parameters']:,} parameters"
        page.expect(slider).to_have_attribute("aria-valuetext", text)
    else:
        text = f"rank {place} of {sweep.layers[name].rank}, "
        page.expect(slider).to_have_attribute("aria-valuetext", re.compile(text))


def test_page_spends_a_budget_as_the_allocator_does(page, sweep):
    page.open("Accuracy against parameters")
    slider = page.press("budget", *["ArrowLeft"] * 30)
    percent = int(float(slider.get_attribute("max"))) - 30
    first = min(cpnb.explore.rank_front(sweep), key=lambda choice: choice.cost)
    percent += -(-100 * first.cost // sweep.dense_parameters)
    choice = cpnb.allocate_ranks(sweep, percent * sweep.dense_parameters / 100)
    assert page.code()[0] == choice.ranks


def test_page_calls_a_sum_of_losses_a_prediction_and_shows_no_absurd_one(page, sweep):
    page.open("Each layer")
    page.press("conv2", *["ArrowLeft"] * 12)
    page.press("fc1", *["ArrowLeft"] * 10)
    whole = sweep.accuracy()
    sum_ = sweep.accuracy({"conv2": 72}) + sweep.accuracy({"fc1": 47}) - whole
    page.shows(f"Accuracy not measured, predicted {100 * sum_:.2f} % ±")
    marker = page.root.locator("circle").first
    page.expect(marker).to_have_attribute("fill", "none")
    page.press("fc2", "Home")
    page.shows("Accuracy not measured ·")
    page.expect(marker).to_be_hidden()
    page.button("Reset").press("Enter")
    page.shows(f"Accuracy {100 * whole:.2f} % measured")
    assert marker.get_attribute("fill") != "none"


def test_page_moves_the_marker_along_the_curve(page, sweep):
    curve, places = sweep.curve("fc1")["accuracy"].tolist(), []
    page.open("Each layer")
    for keys in (["Home"], ["ArrowRight"] * 20, ["End"]):
        page.press("fc1", *keys)
        marker = page.root.locator("circle").first
        places.append([float(marker.get_attribute(name)) for name in ("cx", "cy")])
    (x0, y0), (x1, y1), (x2, y2) = places
    assert (x1 - x0) / (x2 - x0) == pytest.approx(20 / 56, abs=0.01)
    share = (curve[20] - curve[0]) / (curve[-1] - curve[0])
    assert (y1 - y0) / (y2 - y0) == pytest.approx(share, abs=0.01)


def test_page_is_readable_at_every_width_and_its_code_runs(page, network):
    page.open("Each layer", "Accuracy against parameters", "What is cut")
    layout = page.root.evaluate(LAYOUT)
    assert layout["text"] >= 12
    assert layout["over"] <= 0
    page.press("all layers", *["ArrowLeft"] * 30)
    names = {"net": network[0], "data": network[1]}
    _, code = page.code()
    exec(code, names)
    page.shows(f"Accuracy {100 * cpnb.accuracy(names['cut'], names['data']):.2f} %")
    for control in page.root.locator("input, select, summary, button").all():
        tip = control.locator("xpath=ancestor-or-self::*[@title][1]")
        assert tip.get_attribute("title")


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """A notebook with an explorer and a drawing function, and the tour beside it."""
    folder = tmp_path_factory.mktemp("browser")
    served, home = folder / "notebooks", folder / "home"
    served.mkdir()
    home.mkdir()
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
    nbformat.write(notebook, served / "explorer.ipynb")
    tour = jupytext.read(ROOT / "notebooks" / "00_tour.py")
    tour.metadata["kernelspec"] = kernel
    nbformat.write(tour, served / "00_tour.ipynb")
    with jupyterlab(served, home, CPNB_FAST="1", PYTHONPATH=str(ROOT)) as address:
        yield lambda name: NotebookPage(
            browser.new_page(viewport={"width": 1200, "height": 900}), address, name
        )


@pytest.fixture(scope="module")
def notebook(lab):
    notebook = lab("explorer.ipynb")
    notebook.run_all()
    yield notebook
    assert notebook.errors() == notebook.console == []


LIBRARY = (
    "cpnb.accuracy(cpnb.truncate(net, rank=explorer.ranks, key={key!r}, refit={refit!r}"
    ", data=data, progress=False), data)"
)


def expect_the_librarys_numbers(explorer, notebook, key="lam", refit=False):
    """What page and kernel show is what the library gives for the ranks shown."""
    ranks, _ = explorer.code()
    explorer.page.wait_for_timeout(100)
    accuracy = notebook.ask("explorer.wait(30)")
    assert notebook.ask("explorer.ranks") == ranks
    assert accuracy == notebook.ask(LIBRARY.format(key=key, refit=refit))
    explorer.shows(f"Accuracy {100 * accuracy:.2f} % measured")


def test_live_explorer_measures_what_the_table_lacks(notebook):
    explorer = Explorer(notebook.page).open("Each layer", "What is cut")
    explorer.press("all layers", *["ArrowLeft"] * 10)
    expect_the_librarys_numbers(explorer, notebook)
    explorer.press("conv2", *["ArrowLeft"] * 5)
    expect_the_librarys_numbers(explorer, notebook)
    explorer.root.get_by_label("key").select_option("the largest |λ|")
    explorer.root.get_by_label("refit").select_option("refit on outputs")
    expect_the_librarys_numbers(explorer, notebook, refit="data")
    explorer.root.get_by_label("refit").select_option("as it is")


LATE = """<style>%s</style><main style="width: 360px"></main><script type="module">
%s
const held = %s, sent = window.sent = [];
const model = { get: (n) => held[n], set: (_, x) => sent.push(x), save_changes() {} };
Object.assign(model, { on() {}, off() {} });
render({ model, el: document.querySelector("main") });</script>"""


def test_view_that_is_drawn_late_asks_and_shows_how_it_cuts(browser, sweep):
    page = browser.new_page(viewport={"width": 1000, "height": 900})
    request = {"key": "gradient", "refit": True, "ranks": [3, 9, 9, 3], "number": 7}
    table = explorer_table(sweep, sweep_points(sweep), KEYS, live=True)
    script = SCRIPT.replace("export default { render };", "")
    held = json.dumps({"table": table, "request": request})
    page.set_content(LATE % (STYLE, script, held))
    (asked,) = page.evaluate("sent")
    assert asked == {**request, "layer": None, "number": 8}
    assert page.get_by_label("key").input_value() == "gradient"
    assert page.get_by_label("refit").input_value() == "true"
    slider = page.get_by_role("slider", name="all layers").bounding_box()
    assert slider["width"] > 140  # its text goes below where the cell is narrow


def test_live_explorer_ends_where_fast_key_presses_leave_it(notebook):
    explorer = Explorer(notebook.page).open("Each layer")
    explorer.press("fc1", "ArrowLeft")
    slider = explorer.press("conv2", *["ArrowLeft"] * 40)
    text = re.compile("rank 44 of 84")
    explorer.expect(slider).to_have_attribute("aria-valuetext", text)
    expect_the_librarys_numbers(explorer, notebook)


def test_live_explorer_draws_pictures_and_follows_python(notebook):
    explorer = Explorer(notebook.page).open("Each layer", "Pictures")
    explorer.press("conv2", "ArrowLeft", "ArrowLeft")
    image = explorer.root.locator("img")
    explorer.expect(image).to_have_attribute(
        "alt", re.compile("conv2 before, after"), timeout=WAIT
    )
    assert image.evaluate("image => image.naturalWidth") == 800
    notebook.ask("setattr(explorer, 'ranks', {'conv1': 3, 'conv2': 50})")
    slider = explorer.root.get_by_role("slider", name="conv2")
    text = re.compile("rank 50 of 84")
    explorer.expect(slider).to_have_attribute("aria-valuetext", text, timeout=WAIT)
    expect_the_librarys_numbers(explorer, notebook)


def test_explore_draws_what_its_slider_is_moved_to(notebook):
    from playwright.sync_api import expect

    rows = notebook.page.locator(".widget-slider")
    output = notebook.page.locator(".jp-OutputArea-output", has=rows)
    image, words = output.locator("img"), output.get_by_role("status")
    expect(words).to_have_text("power, rank 1", timeout=WAIT)
    source, picture = image.get_attribute("src"), image.screenshot()
    slider = rows.get_by_role("slider")
    slider.focus()
    slider.press("ArrowRight")
    expect(words).to_have_text("power, rank 2", timeout=WAIT)
    expect(image).not_to_have_attribute("src", source, timeout=WAIT)
    notebook.page.wait_for_function("e => e.complete", arg=image.element_handle())
    assert image.screenshot() != picture
    output.get_by_label("method").select_option("als")
    output.get_by_label("rank =").select_option("40")
    expect(words).to_have_text("als, rank 40", timeout=WAIT)
    assert notebook.ask("box.controls['rank'].value") == 40


def test_tour_runs_and_its_explorer_moves(lab):
    notebook = lab("00_tour.ipynb")
    notebook.run_all()
    explorer = Explorer(notebook.page)
    explorer.press("all layers", *["ArrowLeft"] * 3)
    expect_the_librarys_numbers(explorer, notebook)
    assert notebook.errors() == notebook.console == []
