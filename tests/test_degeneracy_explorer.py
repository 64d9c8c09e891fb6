"""The degeneracy explorer without a browser: numbers, sliders, picture, errors."""

import base64
import html
import io
import re
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import cpnb
from cpnb._explorer import degeneracy as explorer_module
from cpnb._explorer.degeneracy import RIDGES, DegeneracyFigure
from cpnb._explorer.degeneracy_state import degeneracy_point, status_lines


@pytest.fixture
def kernel():
    return torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def border():
    """A tensor of rank three, aab + aba + baa, that two terms come close to."""
    a, b = torch.eye(2)
    terms = [(a, a, b), (a, b, a), (b, a, a)]
    return sum(torch.einsum("i,j,k->ijk", *term) for term in terms)


@pytest.fixture
def explore():
    """DegeneracyExplorer, closed after the test."""
    made = []

    def make(*args):
        made.append(cpnb.DegeneracyExplorer(*args))
        return made[-1]

    yield make
    for explorer in made:
        explorer.close()


def words(explorer):
    """What the status line says, without its markup."""
    text = explorer.status.value.replace("<br>", "\n")
    return html.unescape(re.sub(r"<[^>]*>", "", text))


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
def test_point_cut_errors_are_those_of_the_cut_kernels(kernel, ridge):
    point = degeneracy_point(kernel, 7, ridge)
    fit = cpnb.als(
        kernel.double(),
        7,
        damping=0,
        ridge=ridge,
        extrapolate=False,
        start="random",
        generator=torch.Generator().manual_seed(0),
    )
    expected = [
        cpnb.relative_error(
            kernel.double(),
            cpnb.cp_to_kernel(fit.lam[:k], [f[:, :k] for f in fit.factors]),
        ).item()
        for k in range(1, 8)
    ]
    assert point.cut_errors == pytest.approx(expected, abs=1e-7)
    assert point.relative_error == pytest.approx(expected[-1], abs=1e-7)
    assert point.degeneracy == fit.info.degeneracy


def test_point_shows_cancellation_that_a_ridge_holds_down(border):
    plain, held = (degeneracy_point(border, 2, ridge) for ridge in (0.0, 1e-2))
    assert plain.degeneracy.energy > 2 * held.degeneracy.energy
    assert plain.degeneracy.worst_cancellation < held.degeneracy.worst_cancellation
    assert plain.relative_error < held.relative_error
    assert plain.cut_errors[0] > 1  # one of the two alone is worse than nothing


def test_explorer_refuses_a_zero_kernel(explore):
    with pytest.raises(ValueError, match="kernel is zero everywhere"):
        explore(torch.zeros(3, 2, 2), 2)


def test_explorer_says_the_numbers_of_its_position(explore, kernel):
    explorer = explore(kernel, 9)
    explorer.rank.value = 4
    explorer.ridge.value = RIDGES[3]
    expected = degeneracy_point(kernel, 4, RIDGES[3])
    assert explorer.point == expected
    assert words(explorer).split("\n") == status_lines(expected)
    assert f"Rank 4, ridge {RIDGES[3]:.2g}" in words(explorer)
    assert f"energy Σλ²/‖W‖² {expected.degeneracy.energy:.2f}" in words(explorer)
    assert explorer.status.value.startswith('<div role="status"')


def test_explorer_keeps_sliders_and_boxes_alike(explore, kernel):
    explorer = explore(kernel)
    assert explorer.rank.max == cpnb.break_even_rank(kernel.shape)
    explorer.boxes["rank"].value = 3
    explorer.boxes["ridge"].value = RIDGES[-1]
    assert (explorer.rank.value, explorer.ridge.value) == (3, RIDGES[-1])
    assert "Rank 3, ridge 0.1" in words(explorer)
    explorer.ridge.index = 0
    assert explorer.boxes["ridge"].value == 0
    for control in (explorer.rank, explorer.ridge, *explorer.boxes.values()):
        assert control.description


def test_explorer_picture_changes_with_each_slider_and_shows_the_curve(explore, border):
    explorer = explore(border, 3)
    pictures = [explorer.image.value]
    explorer.rank.value = 2
    pictures.append(explorer.image.value)
    explorer.ridge.value = RIDGES[9]
    pictures.append(explorer.image.value)
    assert len(set(pictures)) == 3
    assert np.asarray(Image.open(io.BytesIO(pictures[-1]))).shape == (320, 1000, 3)
    cut, energy = explorer._painter.figure.axes
    curve = next(line for line in cut.lines if line.get_color() == "#d55e00")
    assert curve.get_ydata() == explorer.point.cut_errors
    seen = next(line for line in energy.lines if line.get_alpha() == 0.5)
    assert len(seen.get_xdata()) == 3  # every fit visited stays in the picture


def test_explorer_fits_each_position_once(explore, kernel, monkeypatch):
    fitted = []

    def counted(kernel, rank, ridge):
        fitted.append(rank)
        return degeneracy_point(kernel, rank, ridge)

    monkeypatch.setattr(explorer_module, "degeneracy_point", counted)
    explorer = explore(kernel, 5)
    for rank in (4, 5, 4, 3):
        explorer.rank.value = rank
    assert fitted == [5, 4, 3]


@pytest.mark.parametrize("broken", ["degeneracy_point", "png"])
def test_explorer_shows_errors_escaped_and_recovers(
    explore, kernel, monkeypatch, broken
):
    explorer = explore(kernel, 5)

    def fail(*args):
        raise ArithmeticError("<b>no fit</b> & more")

    owner = explorer_module if broken == "degeneracy_point" else DegeneracyFigure
    with monkeypatch.context() as patch:
        patch.setattr(owner, broken, fail)
        explorer.rank.value = 4
        assert explorer.status.value.startswith('<div role="alert"')
        assert "&lt;b&gt;no fit&lt;/b&gt; &amp; more" in explorer.status.value
        assert "Failed at rank 4, ridge 0" in words(explorer)
    explorer.rank.value = 3
    assert explorer.status.value.startswith('<div role="status"')


def test_explorer_leaves_the_kernel_alone_and_works_on_a_copy(explore, kernel):
    before = kernel.clone()
    explorer = explore(kernel, 4)
    assert torch.equal(kernel, before)
    kernel.zero_()
    explorer.rank.value = 3
    assert explorer.point == degeneracy_point(before, 3, 0.0)


def test_explorer_leaves_the_last_position_on_screen_when_moved_from_threads(
    explore, kernel
):
    explorer = explore(kernel, 6)
    start = threading.Barrier(3)

    def move(control, values):
        start.wait()
        for value in values:
            control.value = value

    moves = [
        (explorer.rank, [1, 6, 2, 5, 3]),
        (explorer.boxes["rank"], [2, 4]),
        (explorer.ridge, [RIDGES[n] for n in (4, 7, 2)]),
    ]
    threads = [threading.Thread(target=move, args=each) for each in moves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert explorer.rank.value == explorer.boxes["rank"].value
    assert explorer.ridge.value == explorer.boxes["ridge"].value == RIDGES[2]
    assert words(explorer).split("\n") == status_lines(explorer.point)
    painter, seen = explorer._painter, list(explorer._points.values())
    assert explorer.image.value == painter.png(explorer.point, seen)
    # What is kept from frame to frame leaves no trace of where the sliders have been.
    assert explorer.image.value == DegeneracyFigure(6).png(explorer.point, seen)


def test_explorer_is_a_picture_and_text_for_pages_without_a_kernel(explore, kernel):
    explorer = explore(kernel, 4)
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert base64.b64decode(bundle["image/png"]) == explorer.image.value
    assert bundle["text/plain"].split("\n") == [
        "DegeneracyExplorer",
        *status_lines(explorer.point),
    ]


def test_explorer_close_removes_its_widgets(explore, kernel):
    explorer = explore(kernel, 3)
    explorer.close()
    assert explorer.comm is None and explorer.rank.comm is None
    explorer.close()


@pytest.mark.parametrize(
    ("kernel", "rank", "error", "match"),
    [
        ([1.0], 2, TypeError, "kernel is a list"),
        (torch.ones(3, 2, 2).int(), 2, TypeError, "floating-point"),
        (torch.full((3, 2, 2), torch.nan), 2, ValueError, "12 NaN or infinite"),
        (torch.ones(4, 3), 2, ValueError, r"shape \(4, 3\), expected order 3 or more"),
        (torch.ones(3, 2, 2), 0, ValueError, "rank is 0"),
        (torch.ones(3, 2, 2), "all", ValueError, "rank is 'all'"),
    ],
)
def test_explorer_refuses_bad_arguments(kernel, rank, error, match):
    with pytest.raises(error, match=match):
        cpnb.DegeneracyExplorer(kernel, rank)
