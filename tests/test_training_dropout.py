"""Keyed dropout: its distribution, what its masks depend on, and where it acts."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cpnb._training.dropout import KeyedDropout

KINDS = [F.dropout, F.dropout1d, F.dropout2d, F.dropout3d]


def keys(seed=0, count=None):
    generator = torch.Generator().manual_seed(seed)
    shape = (2,) if count is None else (count, 2)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).int()


def dropped(tensor, seed=0, p=0.5, kind=F.dropout, **options):
    with KeyedDropout(keys(seed)):
        return kind(tensor, p, True, **options)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_dropout_keeps_each_number_with_its_probability_and_scales_it(p):
    ones = torch.ones(1000, 300, dtype=torch.float64)
    found = dropped(ones, p=p)
    assert found.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
    kept = (found != 0).double()
    # Five standard deviations of a mean over all, and over each row and column.
    for axis, count in ((None, 300_000), (0, 1000), (1, 300)):
        spread = 5 * (p * (1 - p) / count) ** 0.5
        assert (kept.mean(axis) - (1 - p)).abs().max() < spread


def test_dropout_masks_of_other_keys_calls_and_neighbours_are_uncorrelated():
    ones = torch.ones(200_000)
    with KeyedDropout(keys(0)):
        first, second = F.dropout(ones), F.dropout(ones)
    third = dropped(ones, seed=1)
    step = dropped(ones, seed=2)
    masks = [mask.sign() - 0.5 for mask in (first, second, third, step)]
    masks += [masks[0].roll(shift) for shift in (1, 2, 8, 1024)]
    correlations = torch.corrcoef(torch.stack(masks))
    assert (correlations - torch.eye(len(masks))).abs().max() < 5 / 200_000**0.5


def test_dropout_repeats_with_its_keys_and_leaves_the_global_randomness_alone():
    ones, state = torch.ones(50), torch.get_rng_state()
    assert torch.equal(dropped(ones), dropped(ones))
    assert not torch.equal(dropped(ones), dropped(ones, seed=1))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_dropout_under_vmap_gives_each_network_the_masks_of_its_keys(kind):
    axes = {"dropout1d": 1, "dropout2d": 2, "dropout3d": 3}.get(kind.__name__, 1)
    images = torch.randn(3, 4, 5, *[6] * axes)

    def one(key, image):
        with KeyedDropout(key):
            return kind(kind(image.clone(), 0.3, True), 0.5, True)

    given = keys(0, 3)
    together = torch.vmap(one, randomness="error")(given, images)
    alone = [one(key, image) for key, image in zip(given, images, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone))
    assert (together == 0).any()


@pytest.mark.parametrize("kind", KINDS[1:], ids=lambda kind: kind.__name__)
def test_dropout_of_channels_drops_them_whole(kind):
    size = [6] * KINDS.index(kind)
    found = dropped(torch.ones(40, 30, *size), kind=kind).flatten(2)
    assert ((found == 0).all(2) | (found == 2).all(2)).all()
    assert 0.4 < (found == 0).double().mean() < 0.6


def test_dropout_in_place_changes_its_input():
    numbers = torch.ones(50)
    found = dropped(numbers, inplace=True)
    assert found is numbers
    assert (numbers == 0).any()


def test_dropout_is_torchs_own_in_evaluation_and_at_the_limits():
    numbers = torch.randn(6)
    with KeyedDropout(keys()):
        assert torch.equal(nn.Dropout(0.5).eval()(numbers), numbers)
        assert torch.equal(F.dropout(numbers, 0.0), numbers)
        assert torch.equal(F.dropout(numbers, 1.0), torch.zeros(6))
        with pytest.raises(ValueError, match="has to be between 0 and 1"):
            F.dropout(numbers, 1.5)


def test_dropout_passes_the_gradient_of_what_it_keeps():
    numbers = torch.randn(50, requires_grad=True)
    found = dropped(numbers)
    found.sum().backward()
    torch.testing.assert_close(numbers.grad, (found != 0) * 2.0)
