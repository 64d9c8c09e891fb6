"""Figures: they draw the numbers given, name n and units, and stay readable."""

import itertools
import re
from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex, to_rgb

from cpnb.explore import plots
from cpnb.train.data import load_data

OKABE_ITO = {"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"}


@pytest.fixture(autouse=True)
def _style():
    with mpl.rc_context():
        plots.use_style()
        yield


def run(accuracies, validation=True):
    """What a training leaves behind, as far as figures look at it."""
    rows = [
        (epoch, 1 - share, share if validation else None, 0.5)
        for epoch, share in enumerate(accuracies, start=1)
    ]
    names = ("epoch", "train_loss", "validation_accuracy", "seconds")
    return SimpleNamespace(history=[dict(zip(names, row, strict=True)) for row in rows])


def line_data(ax):
    return [line.get_xydata().T for line in ax.get_lines()]


def texts(ax):
    return [text.get_text() for text in ax.texts]


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# Machado, Oliveira and Fernandes 2009, doi:10.1109/TVCG.2009.113, in linear RGB.
BLINDNESS = {
    "protanopia": "0.152 1.053 -.205  .115 .786 .099  -.004 -.048 1.052",
    "deuteranopia": "0.367 .861 -.228  .280 .673 .047  -.012 .043 .969",
    "tritanopia": "1.256 -.077 -.179  -.078 .931 .148  .005 .691 .304",
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722]])
TO_XYZ = np.vstack([TO_XYZ, [0.0193, 0.1192, 0.9505]])


def seen(color, matrix):
    """CIELAB coordinates of what a colour-blind reader sees."""
    coded = np.array(to_rgb(color))
    linear = np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(TO_XYZ @ (matrix @ linear).clip(0.01, 1) / TO_XYZ.sum(1))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colours_of_a_panel_differ_for_the_colour_blind(kind):
    matrix = np.array(BLINDNESS[kind].split(), float).reshape(3, 3)
    panels = ["none batch weight conditioned scaling canonical"]
    panels += ["none canonical canonical-unified oni SI+FD"]
    panels += ["dense low-rank SI FD SI+FD CP", "dense CP CP+FD"]
    panels += ["lam lam+refit greedy greedy+refit fresh"]
    panels += ["lam greedy gradient activation random"]
    for panel in panels:
        places = [seen(plots.METHOD_STYLES[n].color, matrix) for n in panel.split()]
        for one, other in itertools.combinations(places, 2):
            assert np.linalg.norm(one - other) > 10, panel  # 2 is just noticeable


def test_methods_differ_in_colour_and_marker_from_all_they_are_drawn_with():
    names = list(plots.METHOD_STYLES)
    compared, factorised = names[1 : names.index("low-rank")], ["dense", "low-rank"]
    factorised += ["SI", "FD", "SI+FD", "CP"]
    dropped = ["lam", "lam+refit", "greedy", "greedy+refit", "fresh"]
    keys = ["lam", "greedy", "gradient", "activation", "random"]
    for family in ([*compared, "SI+FD"], factorised, dropped, keys):
        looks = [plots.METHOD_STYLES[name] for name in family]
        for part in ("color", "marker"):
            assert len({getattr(look, part) for look in looks}) == len(family), family
    used = {look.color for look in plots.METHOD_STYLES.values()}
    assert used <= OKABE_ITO | {"#555555", "#000000", "#994f00"}


def test_plot_training_draws_mean_and_sample_deviation():
    runs = [run([0.2, 0.6]), run([0.4, 0.8]), run([0.3, 0.7, 0.9])]
    ax = plots.plot_training({"canonical": runs})
    (line,) = line_data(ax)
    np.testing.assert_allclose(line, [[1, 2], [0.3, 0.7]])
    corners = ax.collections[0].get_paths()[0].get_extents()
    assert (corners.ymin, corners.ymax) == pytest.approx((0.2, 0.8))
    assert labels(ax) == ["canonical (CP), n = 3"]
    assert ax.get_ylabel() == "validation accuracy, mean ± 1 std"
    runs[1].history[1]["seconds"] = 1.0
    ax = plots.plot_training({"canonical": runs}, axis="seconds")
    np.testing.assert_allclose(line_data(ax)[0][0], [0.5, 0.5 + (0.5 + 1 + 0.5) / 3])
    assert ax.get_xlabel() == "seconds of training"


def test_plot_training_draws_a_table_of_curves_like_its_runs():
    runs = {"weight": [run([0.2, 0.6]), run([0.4, 0.8])], "mine": [run([0.5, 0.5])]}
    rows = [
        {"recipe": name, "seed": seed, **epoch}
        for name, group in runs.items()
        for seed, each in enumerate(group)
        for epoch in each.history
    ]
    one = plots.plot_training(runs)
    other = plots.plot_training(pd.DataFrame(rows))
    drawn = {"weight norm, n = 2", "mine, n = 1"}
    assert set(labels(one)) == set(labels(other)) == drawn
    for first, second in zip(line_data(one), line_data(other), strict=True):
        np.testing.assert_array_equal(first, second)


def test_plot_training_draws_no_band_for_one_run():
    ax = plots.plot_training({"dense": run([0.2, 0.6], validation=False)}, "train_loss")
    assert not ax.collections
    assert labels(ax) == ["dense, n = 1"]
    assert ax.get_ylabel() == "train loss in nats"
    assert to_hex(ax.get_lines()[0].get_color()) == "#555555"


def test_plot_training_gives_strangers_colours_that_are_free():
    names = ["dense", "weight", "canonical", "mine"]
    ax = plots.plot_training({name: run([0.5]) for name in names}, "seconds")
    found = labels(ax)
    assert (found[0], found[3]) == ("dense, n = 1", "mine, n = 1")
    assert len({to_hex(line.get_color()) for line in ax.get_lines()}) == 4
    assert ax.get_ylabel() == "seconds per epoch"


ROWS = [("b", 2, 0.25, 7), ("b", 9, 0.9, 7), ("*", 3, 0.5, 7)]
TABLE = pd.DataFrame(ROWS, columns=["axis", "rank", "accuracy", "break_even_rank"])
SWEEP = SimpleNamespace(table=TABLE, curve=lambda axis: TABLE[TABLE["axis"] == axis])
TRAINING = plots.plot_training
REFUSALS = {
    "lack 'accuracy', expected": lambda: TRAINING({"a": run([0.5])}, "accuracy"),
    "runs['a'] lack": lambda: TRAINING({"a": [run([0.5]), run([])]}, "seconds"),
    "expected a number for": lambda: TRAINING({"a": run([0.5], False)}),
    "layer is 'c', expected an axis of": lambda: plots.plot_rank_curve(SWEEP, "c"),
    "expected (n, 1, height": lambda: plots.plot_images(torch.zeros(1, 3, 8, 8)),
}


@pytest.mark.parametrize(("text", "draw"), REFUSALS.items())
def test_plot_refuses(text, draw):
    with pytest.raises(ValueError, match=re.escape(text)):
        draw()
    assert not plt.get_fignums()


def test_plot_rank_curve_marks_measured_ranks_of_its_layer_and_break_even():
    ax = plots.plot_rank_curve(SWEEP, "b")
    measured, break_even = line_data(ax)
    np.testing.assert_allclose(measured, [[2, 9], [0.25, 0.9]])
    assert break_even[0].tolist() == [7, 7]
    assert ax.get_lines()[0].get_marker() == "o"
    assert texts(ax) == ["break-even: 7", "90.0% at rank 9"]
    assert ax.get_xlabel() == "rank of b"


def test_plot_truncation_panel_shows_each_curve_and_the_kernel_of_zeros():
    curves = {"lam": ([1, 4], [2.5, 0.0]), "greedy": ([1, 4], [0.9, 0.0])}
    ax = plots.plot_truncation_panel(curves)
    drawn = [[[1, 4], [2.5, 0]], [[1, 4], [0.9, 0]], [[0, 1], [1, 1]]]
    np.testing.assert_allclose(line_data(ax), drawn)
    assert texts(ax) == ["kernel of zeros"]
    assert labels(ax) == ["top |λ|", "greedy"]
    assert ax.get_ylim()[0] == 0


def test_plot_components_shares_symmetric_limits_and_one_colour_bar():
    slices = torch.tensor([[[[1.0, 2]], [[-5, 0]]], [[[0.5, 0]], [[0, 3]]]])
    ax = plots.plot_components(slices, ["a", "b", "c", "d"])
    shown = [image.get_array().tolist() for image in ax.images]
    assert shown == [[[1, 2]], [[-5, 0]], [[0.5, 0]], [[0, 3]]]
    assert {image.get_clim() for image in ax.images} == {(-5, 5)}
    assert {image.get_cmap().name for image in ax.images} == {"RdBu_r"}
    assert len(ax.figure.axes) == 2
    assert texts(ax) == ["a", "b", "c", "d"]
    extents = [image.get_extent() for image in ax.images]
    assert extents[0][1] < extents[1][0]  # b beside a
    assert extents[0][2] < extents[2][3]  # c below a
    zeros = plots.plot_components(torch.zeros(3, 2, 2))
    assert zeros.images[0].get_clim() == (-1, 1)


def test_plot_images_draws_real_digits_in_rows():
    images, labels = load_data("digits").test
    ax = plots.plot_images(images[:12], labels[:12].tolist(), columns=5)
    assert len(ax.images) == 12
    np.testing.assert_allclose(ax.images[7].get_array(), images[7, 0])
    assert {image.get_cmap().name for image in ax.images} == {"viridis"}
    assert texts(ax) == [str(label) for label in labels[:12].tolist()]
    assert ax.images[5].get_extent()[:2] == ax.images[0].get_extent()[:2]
    ax.figure.draw_without_rendering()
    extents = [text.get_window_extent() for text in ax.texts]
    for first, second in itertools.combinations(extents, 2):
        assert not first.overlaps(second)


DRAWINGS = {
    "training": lambda ax: plots.plot_training({"dense": run([0.5, 0.6])}, ax=ax),
    "rank_curve": lambda ax: plots.plot_rank_curve(SWEEP, "b", ax=ax),
    "truncation": lambda ax: plots.plot_truncation_panel({"lam": ([1], [1])}, ax=ax),
    "components": lambda ax: plots.plot_components(torch.ones(2, 3, 3), ax=ax),
    "images": lambda ax: plots.plot_images(torch.ones(2, 3, 3), ax=ax),
}


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_plot_draws_on_given_axes_or_a_new_figure_and_changes_no_settings(draw):
    before = dict(plt.rcParams)
    _, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
    assert draw(right) is right
    assert right.has_data() and not left.has_data()
    assert len(plt.get_fignums()) == 1
    ax = draw(None)
    ax.figure.draw_without_rendering()
    assert len(plt.get_fignums()) == 2
    assert dict(plt.rcParams) == before
    assert ax.get_title() == ax.get_title("left") == ""
    assert not any("$" in text.get_text() for text in ax.findobj(mpl.text.Text))
