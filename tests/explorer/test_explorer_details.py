"""What the rank explorer shows beside its numbers: kernels, classes, flipped images."""

import html
import io
import math
import threading

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from parts import LONG, Net
from PIL import Image

import cpnb
from cpnb._data.splits import Split
from cpnb._explorer.details import (
    STRIP,
    Flip,
    Observer,
    class_accuracy,
    details_lines,
    flip_words,
    flips,
    predictions,
)
from cpnb._explorer.details_figure import DetailsFigure
from cpnb._explorer.pictures import SIDE, image_picture, kernel_picture
from cpnb.layers import CPLinear


@pytest.fixture
def data(data):
    images, labels = data
    labels[::9] = 0  # some are wrong from the start
    return images, labels


def words(explorer):
    return html.unescape(explorer.details.words.value)


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_predictions_are_those_that_accuracy_counts(model, data, batch_size):
    found, classes = predictions(model.train(), data, batch_size)
    assert classes == 5 and model.training
    assert torch.equal(found, model(data[0]).argmax(1))
    right = (found == data[1]).double().mean().item()
    assert right == cpnb.accuracy(model, data)


def test_predictions_standardise_the_pixels_of_a_split(model):
    pixels = torch.randint(0, 256, (30, 1, 4, 4), dtype=torch.uint8)
    split = Split(pixels, torch.zeros(30, dtype=torch.long), (100.0,), (60.0,))
    expected = model((pixels.float() - 100) / 60).argmax(1)
    assert torch.equal(predictions(model, split)[0], expected)


def test_class_accuracy_and_flips_count_by_hand():
    labels = torch.tensor([0, 0, 1, 1, 2])
    before, after = torch.tensor([0, 0, 1, 2, 0]), torch.tensor([0, 2, 1, 1, 1])
    assert class_accuracy(before, labels, 4)[:3].tolist() == [1.0, 0.5, 0.0]
    assert math.isnan(class_accuracy(before, labels, 4)[3])
    found = flips(before, after, labels)
    # What was right comes first.
    assert found == [Flip(1, 0, 0, 2), Flip(3, 1, 2, 1), Flip(4, 2, 0, 1)]
    assert flip_words(found) == "3 predictions flip: 1 from right to wrong, 1 to right"
    assert flip_words(found[:1]).startswith("1 prediction flips: 1")


def test_details_agree_with_the_library(model, data):
    cut = cpnb.truncate(model, rank={"conv": 2, "fc": 3})
    details = Observer(model, data).details(cut, "conv")
    counts = data[1].bincount(minlength=5).numpy()
    for network, found in ((model, details.before), (cut, details.after)):
        total = np.nansum(found * counts) / counts.sum()
        assert total == pytest.approx(cpnb.accuracy(network, data))
    lost = sum(flip.before == flip.label for flip in details.flips)
    gained = sum(flip.after == flip.label for flip in details.flips)
    change = cpnb.accuracy(cut, data) - cpnb.accuracy(model, data)
    assert gained - lost == round(80 * change)
    assert details.ranks == {"conv": 2, "fc": 3}
    whole, kept, difference = details.kernels
    np.testing.assert_allclose(whole - kept, difference)
    error = cpnb.relative_error(model.conv.weight, cut.conv.weight).item()
    ratio = np.nansum(difference**2) ** 0.5 / np.nansum(whole**2) ** 0.5
    assert details.error == error == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("shape", "picture", "extract"),
    [
        ((6, 4, 3, 3), (5 * 4 - 1, 5 * 4 - 1), "all 24 slices of 3 × 3"),
        ((64, 32, 3, 3), (39, 39), "first 100 of 2048 slices of 3 × 3"),
        ((2, 1, 50, 50), (50, 50), "first 1 of 2 slices of 50 × 50"),
        ((4, 2, 2, 3, 5), (4 * 4 - 1, 4 * 6 - 1), "all 16 slices of 3 × 5"),
        ((6, 4, 1, 1), (6, 4), "all 6 × 4 entries"),
        ((6, 4, 3), (6, 12), "all 6 × 12 entries"),
        ((5, 90), (5, SIDE), f"first 5 × {SIDE} of 5 × 90 entries"),
    ],
)
def test_kernel_picture_lays_out_the_first_entries(shape, picture, extract):
    kernel = torch.randn(shape)
    matrix, shown = kernel_picture(kernel)
    assert matrix.shape == picture and shown == extract
    if len(shape) >= 4 and shape[-1] > 1:
        np.testing.assert_allclose(
            matrix[: shape[-2], : shape[-1]], kernel.flatten(0, -3)[0]
        )
        entries = int(extract.split()[1])
        assert np.isfinite(matrix).sum() == entries * shape[-1] * shape[-2]
    else:
        np.testing.assert_allclose(matrix, kernel.flatten(1)[:SIDE, :SIDE])


def test_image_picture_stretches_grey_and_colour_and_refuses_the_rest():
    grey = image_picture(torch.tensor([[[-1.0, 1.0], [0.0, 0.0]]]))
    assert grey.tolist() == [[0, 1], [0.5, 0.5]]
    colour = torch.randint(0, 256, (3, 4, 5), dtype=torch.uint8)
    assert image_picture(colour).shape == (4, 5, 3)
    assert image_picture(torch.ones(1, 2, 2)).tolist() == [[0, 0], [0, 0]]
    assert image_picture(torch.randn(6)) is None
    assert image_picture(torch.randn(2, 4, 4)) is None


def test_details_figure_is_the_same_artists_for_every_layer_and_rank(model, data):
    observer, figure = Observer(model, data), DetailsFigure(5)
    kept = [figure._kernels, figure._bars, figure._images, figure.figure.axes]
    artists = [list(each) for each in kept]
    seen = set()
    for layer, rank in (("conv", 2), ("fc", 2), ("conv", 8), ("fc", 2)):
        cut = cpnb.truncate(model, rank={layer: rank})
        details = observer.details(cut, layer)
        png = figure.png(details, observer.strip(details))
        limits = {image.get_clim() for image in figure._kernels}
        ((low, high),) = limits
        assert low == -high
        assert high == max(np.nanmax(np.abs(each)) for each in details.kernels)
        seen.add(png)
    assert png == DetailsFigure(5).png(details, observer.strip(details))
    assert len(seen) == 3
    kept = [figure._kernels, figure._bars, figure._images, figure.figure.axes]
    assert [list(each) for each in kept] == artists
    assert [len(axes.images) for axes in figure.figure.axes[:3]] == [1, 1, 1]
    with Image.open(io.BytesIO(png)) as image:
        assert image.size == (1000, 430)
    assert plt.get_fignums() == []


def test_explorer_details_follow_the_layer_moved_last(explore, model, data):
    explorer = explore(model, data, background=False)
    assert explorer.details.layout.display == "none"  # closed where it is waited for
    explorer.switches.details.value = True
    assert explorer.details.layout.display is None
    observer, pictures, figure = Observer(model, data), set(), DetailsFigure(5)
    for axis, value, layer in (
        ("conv", 3, "conv"),
        ("fc", 2, "fc"),
        ("*", 60, "fc"),
    ):
        explorer.sliders[axis].value = value
        expected = observer.details(explorer.truncated(), layer)
        for line in details_lines(expected):
            assert line in words(explorer)
        for flip in expected.flips[:STRIP]:
            line = f"image {flip.number}: {flip.label}, {flip.before} → {flip.after}"
            assert line in words(explorer)
        png = figure.png(expected, observer.strip(expected))
        assert explorer.details.image.value == png
        pictures.add(png)
    assert len(pictures) == 3
    explorer.switches.key.value = "greedy"
    expected = observer.details(explorer.truncated(), "fc")
    assert details_lines(expected)[1] in words(explorer)


def test_explorer_details_are_drawn_when_the_position_rests(explore, model, data):
    explorer = explore(model, data)
    drawn = threading.Event()
    explorer.details.words.observe(lambda _: drawn.set(), "value")
    explorer.sliders["conv"].value = 3
    while "conv 3" not in words(explorer):
        drawn.clear()
        assert "conv 3" in words(explorer) or drawn.wait(LONG)
    expected = Observer(model, data).details(explorer.truncated(), "conv")
    assert details_lines(expected)[2] in words(explorer)


def test_explorer_details_of_a_position_left_behind_are_dropped(explore, model, data):
    explorer = explore(model, data, background=False)
    explorer.switches.details.value = True
    explorer.sliders["conv"].value = 3
    old = explorer._live.job(explorer.ranks, "conv")
    outcome = explorer.details.draw(old, explorer.truncated())
    explorer.sliders["conv"].value = 5
    shown = words(explorer), explorer.details.image.value
    explorer._studied(old, outcome)
    explorer._studied(old, ValueError("late"))
    assert (words(explorer), explorer.details.image.value) == shown


def test_explorer_details_cost_nothing_while_hidden(explore, model, data):
    calls = []

    class Counted(Net):
        def forward(self, images):
            calls.append(len(images))
            return super().forward(images)

    explorer = explore(Counted(), data, background=False)
    calls.clear()
    explorer.sliders["conv"].value = 3
    assert len(calls) == 1
    explorer.switches.details.value = True
    calls.clear()
    explorer.sliders["conv"].value = 4
    assert len(calls) == 2


def test_explorer_details_show_their_errors_and_recover(
    explore, model, data, monkeypatch
):
    def broken(self, details, strip):
        raise RuntimeError("<b>no ink</b>")

    explorer = explore(model, data, background=False)
    explorer.switches.details.value = True
    with monkeypatch.context() as patched:
        patched.setattr(DetailsFigure, "png", broken)
        explorer.sliders["conv"].value = 3
        assert "RuntimeError: <b>no ink</b>" in words(explorer)
        assert "<b>" not in explorer.details.words.value
        assert explorer.details.image.layout.display == "none"
        assert explorer.status.value.startswith('<div role="status"')
    explorer.sliders["conv"].value = 4
    assert "conv 4" in words(explorer)
    assert explorer.details.image.layout.display is None


def test_explorer_details_of_a_data_set_are_of_its_validation_split(explore):
    data = cpnb.load_data("digits")
    net = cpnb.canonicalize(cpnb.DigitsNet(), rank=4, init="gaussian")
    explorer = explore(net, data, background=False)
    explorer.switches.details.value = True
    explorer.sliders["fc2"].value = 2
    expected = Observer(net, data.validation).details(explorer.truncated(), "fc2")
    for line in details_lines(expected):
        assert line in words(explorer)


def test_explorer_details_without_images_say_the_rest(explore):
    layer = CPLinear(6, 3, rank=4)
    images = torch.randn(40, 6)
    explorer = explore(layer, (images, layer(images).argmax(1)), background=False)
    explorer.switches.details.value = True
    explorer.sliders[""].value = 1
    assert "Kernel of layer, all 3 × 6 entries" in words(explorer)
    assert "Flipped (true class" in words(explorer)


def test_explorer_close_removes_the_details(explore, model, data):
    explorer = explore(model, data, background=False)
    explorer.close()
    assert explorer.details.image.comm is None and explorer.details.comm is None
    assert explorer.switches.key.comm is None and explorer.code.comm is None
