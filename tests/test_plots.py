"""Figures: they draw the numbers given, name n and units, and stay readable."""

import itertools
import re

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from cpnb import plots
from cpnb._figures import style as figure_style
from cpnb.data import load_data
from cpnb.layers import CPConv2d
from cpnb.records import Run

OKABE_ITO = {"#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"}


@pytest.fixture(autouse=True)
def _style():
    with mpl.rc_context():
        plots.use_style()
        yield


def run(accuracies, validation=True):
    history = [
        {
            "epoch": epoch,
            "train_loss": 1 - accuracy,
            "train_accuracy": accuracy,
            "validation_loss": 1 - accuracy if validation else None,
            "validation_accuracy": accuracy if validation else None,
            "seconds": 0.5,
        }
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]
    return Run("finished", history, {}, {})


def row(layer, rank, accuracy, **extra):
    """A 64 × 32 × 3 × 3 layer with bias: 18,496 parameters, 103 per component."""
    sizes = {"parameters": 103 * rank + 65, "dense_parameters": 18_496}
    return {"layer": layer, "rank": rank, "accuracy": accuracy, **sizes, **extra}


def line_data(ax):
    return [line.get_xydata().T for line in ax.get_lines()]


def texts(ax):
    return [text.get_text() for text in ax.texts]


def boxes(ax):
    ax.figure.draw_without_rendering()
    return [text.get_window_extent() for text in ax.texts]


def test_methods_differ_in_colour_or_marker_from_all_they_are_drawn_with():
    names = list(plots.METHOD_STYLES)
    starts = [names.index(name) for name in ("none", "canonical-unified", "lam")]
    keys = names.index("gradient")
    ways, keys = names[starts[2] : keys], ["lam", "greedy", *names[keys:]]
    # Normalizations with and without the starts of a canonical network; the rest.
    families = names[: starts[1]], names[: names.index("low-rank")], ways, keys
    families = *families, ["dense", *names[names.index("low-rank") : starts[2]]]
    for family in families:
        styles = {name: plots.METHOD_STYLES[name][1:] for name in family}
        styles.pop("dense", None)  # looks as "none", which is the same network
        styles.pop("canonical", None)  # looks as its default start
        assert len(set(styles.values())) == len(styles)
        assert {color for color, _ in styles.values()} <= OKABE_ITO | {"#555555"}
    for family in (["dense", "weight", "canonical"], ways, keys):
        for place in (1, 2):
            looks = {plots.METHOD_STYLES[name][place] for name in family}
            assert len(looks) == len(family)
    grey = [name for name in names if plots.METHOD_STYLES[name].color == "#555555"]
    assert grey == ["dense", "none", "random"]


def test_style_sheet_cycles_through_okabe_ito():
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    assert {f"#{color.lstrip('#')}" for color in colors} == OKABE_ITO
    assert plt.rcParams["figure.figsize"] == [6.4, 3.4]
    assert plt.rcParams["figure.dpi"] == 110
    assert not plt.rcParams["axes.spines.top"]


def test_plot_training_draws_mean_and_sample_deviation():
    runs = [run([0.2, 0.6]), run([0.4, 0.8]), run([0.3, 0.7, 0.9])]
    ax = plots.plot_training({"canonical": runs})
    (line,) = line_data(ax)
    np.testing.assert_allclose(line, [[1, 2], [0.3, 0.7]])
    corners = ax.collections[0].get_paths()[0].get_extents()
    assert (corners.ymin, corners.ymax) == pytest.approx((0.2, 0.8))
    assert texts(ax) == ["canonical (CP), n = 3"]
    assert ax.get_ylabel() == "validation accuracy, mean ± 1 std"


def test_plot_training_draws_against_seconds_of_training():
    runs = [run([0.2, 0.6]), run([0.4, 0.8])]
    for number, made in enumerate(runs):
        for epoch, record in enumerate(made.history):
            record["seconds"] = 10.0 + number + epoch
    ax = plots.plot_training({"canonical": runs}, axis="seconds")
    (line,) = line_data(ax)
    np.testing.assert_allclose(line, [[10.5, 22.0], [0.3, 0.7]])
    assert ax.get_xlabel() == "seconds of training"
    with pytest.raises(
        ValueError, match="axis is 'minutes', expected one of epoch, se"
    ):
        plots.plot_training({"canonical": runs}, axis="minutes")


def test_plot_training_draws_no_band_for_one_run():
    ax = plots.plot_training({"dense": run([0.2, 0.6], validation=False)}, "train_loss")
    assert not ax.collections
    assert texts(ax) == ["dense, n = 1"]
    assert ax.get_ylabel() == "train loss in nats"
    assert to_hex(ax.get_lines()[0].get_color()) == "#555555"


def test_plot_training_labels_keep_apart_and_inside_the_figure():
    runs = {"dense": run([0.1, 0.97]), "weight": run([0.2, 0.97])}
    ax = plots.plot_training({**runs, "canonical": run([0.3, 0.972])})
    extents = boxes(ax)
    assert len(extents) == 3
    for first, second in itertools.combinations(extents, 2):
        assert not first.overlaps(second)
    for extent in extents:
        assert extent.x1 <= ax.figure.bbox.x1
        assert extent.x0 >= ax.bbox.x1 - 1e-6
        assert 0 <= extent.y0 < extent.y1 <= ax.figure.bbox.y1


def test_plot_training_takes_a_legend_for_more_than_three_methods():
    names = ["dense", "weight", "canonical", "mine"]
    ax = plots.plot_training({name: run([0.5]) for name in names}, "seconds")
    found = [text.get_text() for text in ax.get_legend().get_texts()]
    assert found[0] == "dense, n = 1"
    assert found[3] == "mine, n = 1"
    colors = [to_hex(line.get_color()) for line in ax.get_lines()]
    assert len(set(colors)) == 4
    assert ax.get_ylabel() == "seconds per epoch"


@pytest.mark.parametrize(
    ("runs", "measure", "text"),
    [
        ({}, "seconds", "runs is empty, expected at least one curve"),
        ({"a": run([0.5])}, "accuracy", "measure is 'accuracy', expected one of train"),
        (
            {"a": [run([0.5]), run([])]},
            "seconds",
            "runs['a'] hold no seconds, expected",
        ),
        ({"a": []}, "seconds", "runs['a'] hold no seconds, expected at least one run"),
        (
            {"a": run([0.5], validation=False)},
            "validation_loss",
            "runs['a'] hold no validation_loss, expected",
        ),
    ],
)
def test_plot_training_refuses(runs, measure, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        plots.plot_training(runs, measure)
    assert not plt.get_fignums()


def test_plot_rank_curve_marks_measured_ranks_of_its_layer_only():
    rows = [row("b", 9, 0.9), row("b", 2, 0.25), row("b", 5, None), row("a", 3, 0.5)]
    ax = plots.plot_rank_curve(rows, "b")
    np.testing.assert_allclose(line_data(ax)[0], [[2, 9], [0.25, 0.9]])
    assert ax.get_lines()[0].get_marker() == "o"
    assert "90.0% at rank 9" in texts(ax)
    assert ax.get_xlabel() == "rank of b"


def test_plot_rank_curve_finds_the_break_even_rank_from_the_counts():
    ax = plots.plot_rank_curve([row("b", 1, 0.1), row("b", 200, 0.9)], "b")
    # The first rank whose 103 R + 65 parameters reach 18,496.
    assert line_data(ax)[1][0].tolist() == [179, 179]
    assert "break-even: 179" in texts(ax)
    ax = plots.plot_rank_curve([row("b", 3, 0.9, break_even_rank=7)], "b")
    assert line_data(ax)[1][0].tolist() == [7, 7]
    assert ax.get_xlim()[1] > 7
    ax = plots.plot_rank_curve([row("b", 3, 0.9)], "b")
    assert len(ax.get_lines()) == 1


def test_plot_rank_curve_refuses_a_layer_without_accuracy():
    rows = [row("a", 1, 0.5), row("b", 1, None)]
    for layer in ("b", "c"):
        text = f"no accuracy for layer '{layer}'; the layers there are: 'a', 'b'."
        with pytest.raises(ValueError, match=re.escape(text)):
            plots.plot_rank_curve(rows, layer)


def test_plot_truncation_panel_shows_each_curve_and_the_kernel_of_zeros():
    curves = {"lam": ([1, 4], [2.5, 0.0]), "greedy": ([1, 4], [0.9, 0.0])}
    ax = plots.plot_truncation_panel(curves)
    first, second, zero = line_data(ax)
    np.testing.assert_allclose(first, [[1, 4], [2.5, 0]])
    np.testing.assert_allclose(second, [[1, 4], [0.9, 0]])
    assert zero[1].tolist() == [1, 1]
    assert texts(ax) == ["kernel of zeros"]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["top |λ|", "greedy"]
    assert ax.get_ylim()[0] == 0


@pytest.mark.parametrize(
    ("curves", "text"),
    [
        ({}, "curves is empty, expected at least one curve to draw"),
        ({"lam": ([1, 2], [0.5])}, "curves['lam'] has 2 ranks and 1 errors, expected"),
        ({"lam": ([], [])}, "curves['lam'] has 0 ranks and 0 errors, expected as many"),
    ],
)
def test_plot_truncation_panel_refuses(curves, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        plots.plot_truncation_panel(curves)


def test_plot_lambda_spectrum_sorts_sizes_and_ignores_signs():
    layer = CPConv2d(4, 4, 3, rank=3)
    with torch.no_grad():
        layer.lam.copy_(torch.tensor([1.0, -4.0, 2.0]))
    ax = plots.plot_lambda_spectrum({"conv": layer, "zero": torch.zeros(2)})
    first, second = line_data(ax)
    np.testing.assert_allclose(first, [[1 / 3, 2 / 3, 1], [1, 0.5, 0.25]], rtol=1e-6)
    assert second[1].tolist() == [0, 0]
    assert sorted(texts(ax)) == ["conv, rank 3", "zero, rank 2"]
    with pytest.raises(ValueError, match="layers is empty"):
        plots.plot_lambda_spectrum({})


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


def test_plot_components_draws_a_kernel_of_zeros():
    ax = plots.plot_components(torch.zeros(3, 2, 2))
    assert ax.images[0].get_clim() == (-1, 1)


def test_plot_images_draws_real_digits_in_rows():
    images, labels = load_data("digits").test
    ax = plots.plot_images(images[:12], labels[:12].tolist(), columns=5)
    assert len(ax.images) == 12
    np.testing.assert_allclose(ax.images[7].get_array(), images[7, 0])
    assert {image.get_cmap().name for image in ax.images} == {"viridis"}
    assert texts(ax) == [str(label) for label in labels[:12].tolist()]
    assert ax.images[5].get_extent()[:2] == ax.images[0].get_extent()[:2]
    for first, second in itertools.combinations(boxes(ax), 2):
        assert not first.overlaps(second)


@pytest.mark.parametrize(
    ("draw", "text"),
    [
        (lambda: plots.plot_components(torch.zeros(3, 3)), "slices have shape (3, 3)"),
        (
            lambda: plots.plot_components(torch.zeros(0, 3, 3)),
            "slices have shape (0, 3",
        ),
        (
            lambda: plots.plot_components(torch.zeros(2, 3, 3), ["a"]),
            "labels has 1 entries, expected 2",
        ),
        (
            lambda: plots.plot_images(torch.zeros(1, 3, 8, 8)),
            "images have shape (1, 3,",
        ),
        (
            lambda: plots.plot_images(torch.zeros(1, 8, 8), columns=0),
            "columns is 0, expected at least 1",
        ),
    ],
)
def test_tiles_refuse(draw, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        draw()
    assert not plt.get_fignums()


DRAWINGS = {
    "training": lambda ax: plots.plot_training({"dense": run([0.5, 0.6])}, ax=ax),
    "rank_curve": lambda ax: plots.plot_rank_curve([row("a", 1, 0.5)], "a", ax=ax),
    "truncation": lambda ax: plots.plot_truncation_panel({"lam": ([1], [1])}, ax=ax),
    "spectrum": lambda ax: plots.plot_lambda_spectrum({"a": torch.ones(3)}, ax=ax),
    "components": lambda ax: plots.plot_components(torch.ones(2, 3, 3), ax=ax),
    "images": lambda ax: plots.plot_images(torch.ones(2, 3, 3), ax=ax),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_plot_draws_on_given_axes_or_a_new_figure(name):
    _, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
    assert DRAWINGS[name](right) is right
    assert not left.has_data()
    assert right.has_data()
    assert len(plt.get_fignums()) == 1
    new = DRAWINGS[name](None)
    assert len(plt.get_fignums()) == 2
    new.figure.draw_without_rendering()


@pytest.mark.parametrize("name", DRAWINGS)
def test_plot_changes_no_settings_and_sets_no_title_and_no_mathtext(name):
    before = dict(plt.rcParams)
    ax = DRAWINGS[name](None)
    ax.figure.draw_without_rendering()
    assert dict(plt.rcParams) == before
    assert ax.get_title() == ax.get_title("left") == ""
    written = [text.get_text() for text in ax.findobj(mpl.text.Text)]
    assert not any("$" in text for text in written)


def test_strangers_get_colours_that_no_known_method_of_the_figure_has():
    names = ["canonical", "x", "weight", "y"]
    styles = [style for style, _ in figure_style.styled(dict.fromkeys(names, 0))]
    assert styles[0] == plots.METHOD_STYLES["canonical"]
    assert [style.label for style in styles[1::2]] == ["x", "y"]
    assert len({style.color for style in styles}) == 4
