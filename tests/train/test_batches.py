"""Augmentation against a loop over the images; batches in the seed's order."""

import itertools

import pytest
import torch
from shared import seeded
from torch import nn

from cpnb.train.batches import Augment, Batches
from cpnb.train.data import Split


def specification(augment, images, draws):
    """Crop, mirror and blacken one pixel at a time."""
    _, _, height, width = images.shape
    crop, cutout = augment.crop, augment.cutout
    results = torch.zeros_like(images)
    for n, c, i, j in itertools.product(*map(range, images.shape)):
        top, left, mirrored, y, x = draws[n].tolist()
        row = top + i - crop
        column = left + (width - 1 - j if mirrored else j) - crop
        is_padding = not (0 <= row < height and 0 <= column < width)
        is_covered = -(cutout // 2) <= i - y < cutout - cutout // 2
        is_covered = is_covered and -(cutout // 2) <= j - x < cutout - cutout // 2
        if not (is_padding or is_covered):
            results[n, c, i, j] = images[n, c, row, column]
    return results


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "augment",
    [Augment(), Augment(2, flip=False), Augment(0, False, 3), Augment(1, True, 4)],
    ids=str,
)
def test_augment_equals_the_loop_specification(augment, layout, dtype):
    images = torch.randint(1, 256, (12, 2, 5, 7), generator=seeded()).to(dtype)
    images = images.contiguous(memory_format=layout)
    before, draws = images.clone(), augment.draw(images, seeded(1))
    changed = augment.apply(images, draws)
    assert changed.dtype == dtype
    assert torch.equal(changed, specification(augment, images, draws))
    assert torch.equal(images, before)


def test_augment_draws_every_case_equally_often_from_its_generator_alone():
    augment, images = Augment(crop=1, flip=True, cutout=2), torch.zeros(20_000, 1, 4, 5)
    state = torch.get_rng_state()
    draws = augment.draw(images, seeded())
    assert torch.equal(state, torch.get_rng_state())
    for column, cases in zip(draws.T, (3, 3, 2, 4, 5), strict=True):
        counts = column.bincount(minlength=cases).double()
        assert len(counts) == cases
        # Five standard deviations of a binomial count.
        spread = 5 * (20_000 * (1 / cases) * (1 - 1 / cases)) ** 0.5
        assert (counts - 20_000 / cases).abs().max() < spread


def pixels(n=10, channels=3):
    images = torch.randint(0, 256, (n, channels, 5, 5), generator=seeded()).byte()
    mean, std = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)
    return Split(images, torch.arange(n) % 3, mean[:channels], std[:channels])


def head(channels=3):
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))


class Viewing(nn.Module):
    """Flattens what a convolution gives with ``view``, which wants it outermost."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, 2, 3, padding=1)
        self.last = nn.Linear(50, 3)

    def forward(self, images):
        return self.last(self.conv(images).view(-1, 50))


def made(train, model=None, *, size=4, seed=0, augment=None, held_out=None):
    return Batches(model or head(), train, held_out, size, seed, augment)


def test_batches_hold_each_image_once_in_the_order_of_the_seed():
    split = pixels()
    batches = made(split, seed=4)
    order = seeded(4)
    for _ in range(2):
        index = torch.randperm(10, generator=order)
        images, labels = map(torch.cat, zip(*batches.epoch(), strict=True))
        assert torch.equal(images, split.standardized()[index])
        assert torch.equal(labels, split.labels[index])


@pytest.mark.parametrize(
    ("count", "sizes"), [(10, [4, 4, 2]), (9, [4, 5]), (8, [4, 4]), (1, [1]), (3, [3])]
)
def test_batches_take_a_single_image_left_over_into_the_one_before(count, sizes):
    """Batch norm cannot normalise one row, and the weights would be half trained."""
    batches = made(pixels(count))
    assert [len(labels) for _, labels in batches.epoch()] == sizes
    assert len(batches) == len(sizes)


def test_batches_blacken_pixels_before_they_standardise_them():
    split = pixels()
    black = -torch.tensor(split.mean) / torch.tensor(split.std)
    for images, _ in made(split, augment=Augment(0, False, cutout=99)).epoch():
        torch.testing.assert_close(images, black[:, None, None].expand_as(images))


@pytest.mark.parametrize("augment", [None, Augment(crop=1)], ids=["plain", "augmented"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("views", [False, True])
def test_batches_put_channels_innermost_where_the_network_takes_it(
    views, channels, augment
):
    split = pixels(channels=channels)
    model = (Viewing(channels) if views else head(channels)).double()
    batches = made(split, model, augment=augment, held_out=split)
    strides = (25, 5, 1) if views else (1, 5 * channels, channels)
    for images, _ in [*batches.epoch(), tuple(batches.held_out)]:
        assert images.stride()[1:] == strides
        model(images)
        assert images.dtype == torch.float64
    assert torch.equal(batches.held_out.images, split.standardized(torch.float64))
