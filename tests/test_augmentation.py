"""Augmentation: against a loop over the images, its randomness, what it refuses."""

import re

import pytest
import torch

from cpnb.augmentation import Augment


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def specification(augment, images, draws):
    """Pad, crop, mirror and blacken one pixel at a time."""
    count, channels, height, width = images.shape
    crop, half = augment.crop, augment.cutout // 2
    results = torch.zeros_like(images)
    for n in range(count):
        top, left, mirrored, y, x = draws[n].tolist()
        for c in range(channels):
            padded = torch.zeros(height + 2 * crop, width + 2 * crop)
            padded[crop : crop + height, crop : crop + width] = images[n, c]
            cut = padded[top : top + height, left : left + width]
            for i in range(height):
                for j in range(width):
                    column = width - 1 - j if mirrored else j
                    covered = 0 <= i - (y - half) < augment.cutout
                    covered = covered and 0 <= j - (x - half) < augment.cutout
                    results[n, c, i, j] = 0 if covered else cut[i, column]
    return results


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
@pytest.mark.parametrize("innermost", [False, True])
@pytest.mark.parametrize(
    "augment",
    [
        Augment(),
        Augment(crop=0, flip=True),
        Augment(crop=2, flip=False),
        Augment(crop=0, flip=False, cutout=3),
        Augment(crop=1, flip=True, cutout=4),
        Augment(crop=0, flip=False),
    ],
    ids=str,
)
def test_augment_equals_the_loop_specification(augment, innermost, dtype):
    images = torch.randint(1, 256, (12, 2, 5, 7), generator=seeded()).to(dtype)
    if innermost:
        images = images.contiguous(memory_format=torch.channels_last)
    draws = augment.draw(12, images.shape, seeded(1))
    found = augment.apply(images, draws)
    assert found.dtype == dtype
    assert torch.equal(found, specification(augment, images, draws))
    assert torch.equal(found, augment(images, seeded(1)))
    if augment == Augment(crop=0, flip=False):
        assert torch.equal(found, images)


def test_augment_draws_every_case_equally_often():
    augment = Augment(crop=1, flip=True, cutout=2)
    draws = augment.draw(20_000, (1, 1, 4, 5), seeded())
    for column, cases in zip(draws.T, (3, 3, 2, 4, 5), strict=True):
        counts = column.bincount(minlength=cases).double()
        assert len(counts) == cases
        # Five standard deviations of a binomial count.
        spread = 5 * (20_000 * (1 / cases) * (1 - 1 / cases)) ** 0.5
        assert (counts - 20_000 / cases).abs().max() < spread


def test_augment_leaves_its_input_and_the_global_randomness_alone():
    images = torch.ones(3, 1, 4, 4)
    state = torch.get_rng_state()
    changed = Augment(crop=3)(images, seeded())
    assert torch.equal(images, torch.ones(3, 1, 4, 4))
    assert not torch.equal(changed, images)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: Augment(crop=-1), ValueError, "crop is -1, expected at least 0"),
        (lambda: Augment(cutout=1.5), TypeError, "cutout is 1.5, expected an int"),
        (lambda: Augment(flip=1), TypeError, "flip is 1, expected True or False"),
        (
            lambda: Augment()(torch.ones(3, 5)),
            ValueError,
            "images have shape (3, 5), expected (n, channels, height, width)",
        ),
    ],
)
def test_augment_refuses_what_it_cannot_do(call, error, text):
    with pytest.raises(error, match=re.escape(text)):
        call()
