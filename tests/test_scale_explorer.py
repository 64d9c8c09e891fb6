"""The scale explorer without a browser: table, slider, picture, errors."""

import base64
import html
import io
import math
import re
import threading

import numpy as np
import pytest
from PIL import Image

import cpnb
from cpnb._explorer.scale import ScaleFigure
from cpnb._explorer.scale_state import read_points, status_lines


@pytest.fixture
def rows():
    """A table out of order, with an infinite condition number at its end."""
    return [
        {
            "spread": spread,
            "condition": 3 * 10**spread if spread < 1 else math.inf,
            "equilibrated": 3.0,
            "curvature": 2 * 100**spread,
            "balanced_curvature": 1.5,
            "accuracy": 0.97 - spread / 3,
            "rate": 0.4 / 10**spread,
            "balanced_accuracy": 0.975,
        }
        for spread in (0.5, 0.0, 1.0)
    ]


@pytest.fixture
def explorer(rows):
    made = cpnb.ScaleExplorer(rows)
    yield made
    made.close()


def words(explorer):
    """What the status line says, without its markup."""
    text = explorer.status.value.replace("<br>", "\n")
    return html.unescape(re.sub(r"<[^>]*>", "", text))


def test_explorer_starts_at_the_smallest_spread_and_says_its_row(explorer, rows):
    assert explorer.point == read_points(rows)[0]
    assert explorer.point.spread == 0
    explorer.spread.index = 1
    assert explorer.point.spread == 0.5
    assert words(explorer).split("\n") == status_lines(explorer.point)
    said = words(explorer)
    assert "factor of 3.16" in said and "condition number 9.49, " in said
    assert "eigenvalue 20, balanced 1.5" in said
    assert "Best learning rate 0.126491: accuracy 80.3 %, balanced 97.5 %" in said
    assert explorer.status.value.startswith('<div role="status"')


def test_explorer_keeps_slider_and_list_alike(explorer):
    explorer.box.value = 2
    assert explorer.spread.value == 2
    assert "Largest condition number inf" in words(explorer)
    explorer.spread.value = 0
    assert explorer.box.value == 0


def test_explorer_draws_each_position_and_comes_back_to_the_same_picture(explorer):
    first, pictures = explorer.image.value, []
    for position in (1, 2, 0):
        explorer.spread.value = position
        pictures.append(explorer.image.value)
    assert len(set(pictures)) == 3
    assert pictures[-1] == first
    assert np.asarray(Image.open(io.BytesIO(first))).shape == (320, 1000, 3)


def test_figure_shows_the_numbers_of_the_table_without_mathtext(rows):
    points = read_points(rows)
    painter = ScaleFigure(points)
    painter.png(points[1])
    for ax, name in zip(
        painter.figure.axes, ("condition", "curvature", "accuracy"), strict=True
    ):
        line = next(x for x in ax.lines if x.get_color() == "#d55e00")
        assert line.get_ydata() == [getattr(point, name) for point in points]
        texts = [tick.label1.get_text() for tick in ax.yaxis.get_major_ticks()]
        assert not any("$" in text for text in texts)


def test_explorer_shows_errors_escaped_and_recovers(explorer, monkeypatch):
    def fail(*args):
        raise ArithmeticError("<b>no picture</b>")

    with monkeypatch.context() as patch:
        patch.setattr(ScaleFigure, "png", fail)
        explorer.spread.value = 1
        assert explorer.status.value.startswith('<div role="alert"')
        assert "&lt;b&gt;no picture&lt;/b&gt;" in explorer.status.value
    explorer.spread.value = 2
    assert explorer.status.value.startswith('<div role="status"')


def test_explorer_leaves_the_last_position_on_screen_when_moved_from_threads(explorer):
    start = threading.Barrier(2)

    def move(control, values):
        start.wait()
        for value in values:
            control.value = value

    moves = (explorer.spread, [1, 2, 0, 1]), (explorer.box, [2, 0, 1, 2])
    threads = [threading.Thread(target=move, args=each) for each in moves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert explorer.spread.value == explorer.box.value
    assert words(explorer).split("\n") == status_lines(explorer.point)
    assert explorer.image.value == explorer._painter.png(explorer.point)


def test_explorer_is_a_picture_and_text_for_pages_without_a_kernel(explorer):
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]) == explorer.image.value
    lines = bundle["text/plain"].split("\n")
    assert lines == ["ScaleExplorer", *status_lines(explorer.point)]


def test_explorer_close_removes_its_widgets(rows):
    explorer = cpnb.ScaleExplorer(rows)
    explorer.close()
    assert explorer.comm is None and explorer.spread.comm is None
    assert explorer.box.comm is None and explorer.image.comm is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda rows: rows[:1], r"spreads \[0.5\], expected two or more"),
        (lambda rows: [*rows, rows[0]], "each once"),
        (lambda rows: [*rows, {"spread": 2}], r"rows\[3\] has the keys \['spread'\]"),
        (
            lambda rows: [rows[0], rows[1] | {"curvature": -1.0}],
            r"rows\[1\]\['curvature'\] is -1.0, expected a number > 0",
        ),
        (
            lambda rows: [rows[0], rows[1] | {"accuracy": math.nan}],
            r"'accuracy'\] is nan, expected a number >= 0",
        ),
    ],
)
def test_explorer_refuses_malformed_tables(rows, change, match):
    with pytest.raises(ValueError, match=match):
        cpnb.ScaleExplorer(change(rows))
