"""The page of a sweep: its table, what it refers to, and its sliders in a browser."""

import html
import json
import re
import zipfile
from pathlib import Path

import pytest
import torch
from lab_server import chromium, find_browser
from torch import nn

import cpnb
from cpnb._sweep.plan import default_ranks
from cpnb._sweep.points import SweptLayer

ROOT = Path(__file__).parents[1]
WAIT = 10_000  # milliseconds


@pytest.fixture(scope="module")
def sweep():
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(
        cpnb.CPConv2d(1, 6, 3, rank=8, generator=generator),
        nn.ReLU(),
        nn.Flatten(),
        cpnb.CPLinear(24, 5, rank=6, generator=generator),
    )
    images = torch.randn(80, 1, 4, 4, generator=generator)
    with torch.no_grad():
        labels = net(images).argmax(1)
    return cpnb.rank_sweep(net, (images, labels), progress=False)


def lenet_sweep():
    """A table of LeNet at the authors' ranks, of the size that a real one has."""
    sizes = {
        "conv1": ((32, 1, 3, 3), 11),
        "conv2": ((64, 32, 3, 3), 270),
        "fc1": ((128, 9216), 128),
        "fc2": ((10, 128), 10),
    }
    layers = tuple(
        SweptLayer(name, "CPConv2d", shape, 1.0, rank, 80, 18496, 65, 103, 10**7, 10**5)
        for name, (shape, rank) in sizes.items()
    )
    sweep = cpnb.RankSweep(
        layers=layers,
        other_parameters=0,
        other_flops=0,
        key="lam",
        refit=False,
        fingerprint="0" * 64,
        axes=(*sizes, "*"),
    )
    cuts = [{layer.name: rank} for layer in layers for rank in default_ranks(layer)]
    cuts += [sweep.ranks_at(keep) for keep in sweep.keeps]
    for n, cut in enumerate([{}, *cuts]):
        at = sweep.ranks | cut
        sweep.add(at, n / 1000, n / 997, {name: n / 991 for name in at})
    return sweep


def table_of(page):
    """The table that a page holds."""
    return json.loads(re.search(r'application/json">(.*)</script>', page).group(1))


def rows_of(sweep, axis):
    return [row for row in sweep.to_rows() if row["layer"] == axis]


def test_page_holds_the_numbers_of_the_table(sweep):
    table = table_of(sweep.to_html())
    assert table["images"] == "80 images"
    assert table["whole"] == "100.00"
    assert table["dense"] == sweep.dense_parameters
    assert [axis["label"] for axis in table["axes"]] == ["0", "3", "all layers"]
    for axis, name in zip(table["axes"], ("0", "3", "*"), strict=True):
        rows = rows_of(sweep, name)
        at = [100 * r["keep"] if name == "*" else r["rank"] for r in rows]
        assert axis["at"] == pytest.approx(at)
        assert axis["accuracy"] == [f"{100 * row['accuracy']:.2f}" for row in rows]
        assert axis["loss"] == [f"{row['loss']:.4g}" for row in rows]
        assert axis["error"] == [f"{row['relative_error']:.3f}" for row in rows]
        assert axis["parameters"] == [row["network_parameters"] for row in rows]
        assert axis["flops"] == [row["network_flops"] for row in rows]


def test_page_of_a_lenet_sweep_is_small():
    sweep = lenet_sweep()
    assert len(sweep) > 300
    assert len(sweep.to_html().encode()) < 100_000


def test_page_refers_to_nothing_outside(sweep):
    page = sweep.to_html()
    assert not re.search(r"\b(src|href)\s*=|@import|url\(|fetch\(|import\(", page)
    assert re.findall(r"https?://[^\"]*", page) == ["http://www.w3.org/2000/svg"]


def test_page_is_written_in_one_step_and_shown_in_a_notebook(sweep, tmp_path):
    page = sweep.to_html(tmp_path / "sweep.html")
    assert (tmp_path / "sweep.html").read_text(encoding="utf-8") == page
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.html"]
    assert sweep._repr_html_() in page
    assert "<html" not in sweep._repr_html_()


def test_page_escapes_names_that_look_like_markup():
    name = "</script><b>"
    net = nn.Sequential()
    net.add_module(name, cpnb.CPLinear(4, 3, rank=2))
    data = torch.randn(9, 4), torch.zeros(9, dtype=torch.long)
    page = cpnb.rank_sweep(net, data, progress=False).to_html()
    assert name not in page and html.escape(name, quote=False) in page
    assert table_of(page)["axes"][0]["label"] == name


def test_page_needs_the_network_at_full_rank(sweep):
    empty = sweep.copy()
    empty._measured.clear()
    with pytest.raises(ValueError, match="no full rank or no axis, expected"):
        empty.to_html()
    assert empty._repr_html_() is None


def test_page_keeps_a_gap_where_the_loss_is_not_finite(sweep):
    other = sweep.copy()
    other.add({"3": 2}, 0.5, float("inf"), {})
    assert table_of(other.to_html())["axes"][1]["loss"][1] is None


def test_wheel_holds_the_parts_of_the_page(tmp_path):
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path))
    names = zipfile.ZipFile(wheel).namelist()
    assert {"cpnb/_sweep/page.js", "cpnb/_sweep/page.css"} <= set(names)


@pytest.fixture(scope="module")
def browser():
    """One Chromium for the module; playwright allows no second one beside it."""
    if find_browser() is None:
        pytest.skip("no Chromium (Debian: apt install chromium)")
    with chromium(find_browser()) as started:
        yield started


@pytest.fixture(scope="module")
def page(browser, sweep, tmp_path_factory):
    """The page in a browser without a network, and what went wrong in it."""
    path = tmp_path_factory.mktemp("page") / "sweep.html"
    path.write_text(sweep.to_html() + sweep._repr_html_(), encoding="utf-8")
    opened = browser.new_context(offline=True).new_page()
    opened.errors = []
    opened.on("pageerror", lambda error: opened.errors.append(str(error)))
    opened.on("requestfailed", lambda request: opened.errors.append(request.url))
    opened.goto(path.as_uri())
    yield opened
    assert opened.errors == []


def first(page, role, **options):
    return page.locator(".cpnb-sweep").first.get_by_role(role, **options)


@pytest.mark.browser
@pytest.mark.parametrize(
    ("axis", "keys"),
    [
        ("0", ["Home"]),
        ("0", ["End", "ArrowLeft", "ArrowLeft"]),
        ("3", ["Home", "ArrowRight"]),
        ("3", ["Home", *["ArrowUp"] * 40]),
        ("*", ["Home", "PageUp"]),
        ("*", ["End", *["ArrowLeft"] * 40]),
    ],
)
def test_page_shows_the_numbers_of_the_point_a_slider_is_moved_to(
    page, sweep, axis, keys
):
    from playwright.sync_api import expect

    name = "all layers" if axis == "*" else axis
    slider, status = first(page, "slider", name=name), first(page, "status")
    slider.focus()
    for key in keys:
        slider.press(key)
    rows = rows_of(sweep, axis)
    row = rows[int(slider.input_value())]
    position = f"{100 * row['keep']:g} %" if axis == "*" else f"rank {row['rank']} of"
    expect(slider).to_have_attribute("aria-valuetext", re.compile(f"^{position}"))
    for text in (
        f"Accuracy {100 * row['accuracy']:.2f} %, loss {row['loss']:.4g} on 80 images",
        f"relative kernel error {row['relative_error']:.3f}.",
        f"Network: {row['network_parameters']:,} parameters, ",
        f"{row['network_flops']:,} FLOPs for one image as chains",
    ):
        expect(status).to_contain_text(text, timeout=WAIT)
    for other in {"0", "3", "all layers"} - {name}:
        slider = first(page, "slider", name=other)
        assert slider.input_value() == slider.get_attribute("max")


@pytest.mark.browser
def test_page_moves_the_marker_to_where_the_curve_is(page, sweep):
    first(page, "slider", name="0").focus()
    places = []
    for key in ("Home", "ArrowRight", "End"):
        page.keyboard.press(key)
        marker = page.locator(".cpnb-sweep").first.locator("circle").first
        places.append([float(marker.get_attribute(name)) for name in ("cx", "cy")])
    assert places[0][0] < places[1][0] < places[2][0]
    accuracies = [row["accuracy"] for row in rows_of(sweep, "0")]
    heights = [accuracies[0], accuracies[1], accuracies[-1]]
    # Higher accuracy is further up, in proportion.
    slope = (places[2][1] - places[0][1]) / (heights[2] - heights[0])
    assert slope < 0
    expected = places[0][1] + slope * (heights[1] - heights[0])
    assert places[1][1] == pytest.approx(expected, abs=0.1)
    assert marker.locator("xpath=..").get_by_text("accuracy 100.00 %").count() == 1


@pytest.mark.browser
def test_page_works_twice_on_a_page_and_names_its_pictures(page):
    roots = page.locator(".cpnb-sweep")
    assert roots.count() == 2
    before = roots.first.get_by_role("status").inner_text()
    second = roots.nth(1).get_by_role("slider", name="3")
    second.focus()
    second.press("Home")
    assert "3: rank 1 of 6" in roots.nth(1).get_by_role("status").inner_text()
    assert roots.first.get_by_role("status").inner_text() == before
    names = {
        image.text_content() for image in roots.nth(1).locator("svg > title").all()
    }
    assert "relative kernel error against rank of 3" in names


@pytest.mark.browser
def test_page_marks_each_point_unless_every_step_is_there(browser, tmp_path):
    sweep = lenet_sweep()
    for rank in range(3, 270, 3):
        sweep.add({"conv2": rank}, 0.5, 0.5, {"conv2": 0.5})
    sweep.to_html(tmp_path / "sweep.html")
    opened = browser.new_context(offline=True).new_page()
    opened.goto((tmp_path / "sweep.html").as_uri())
    marked = {}
    for name in ("conv2", "fc1"):  # gaps in more than 60 ranks; all of 128
        first(opened, "slider", name=name).focus()
        opened.keyboard.press("Home")
        dots = opened.locator('path[stroke-linecap="round"][stroke-width="4"]').first
        marked[name] = dots.get_attribute("d").count("M")
    assert marked == {"conv2": len(rows_of(sweep, "conv2")), "fc1": 0}
    assert marked["conv2"] > 60
