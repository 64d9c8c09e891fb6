"""Data sets as tensors: every image once, splits fixed by the seed."""

import builtins
import itertools
import re
import sys

import pytest
import torch
from sklearn.datasets import load_digits

from cpnb._data.splits import channel_statistics
from cpnb.data import Dataset, Split, load_data, standardize
from cpnb.evaluation import images_and_labels

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def raw_pixels(data, split):
    """Pixels as rows of whole numbers."""
    return getattr(data, split).images.flatten(1)


def rows(pixels, labels):
    pairs = zip(pixels.tolist(), labels.tolist(), strict=True)
    return [(*pixel, label) for pixel, label in pairs]


def test_load_data_splits_hold_each_image_of_scikit_learn_once(digits):
    source = load_digits()
    expected = rows(torch.tensor(source.data).long(), torch.tensor(source.target))
    found = []
    for split in SPLITS:
        found += rows(raw_pixels(digits, split), getattr(digits, split).labels)
    # All 1,797 images differ, so equal sorted lists mean disjoint and covering.
    assert len(set(expected)) == 1797
    assert sorted(found) == sorted(expected)


def test_load_data_splits_are_stratified(digits):
    source = torch.tensor(load_digits().target).bincount()
    for split, share in [("train", 0.6), ("validation", 0.2), ("test", 0.2)]:
        counts = getattr(digits, split).labels.bincount(minlength=10)
        assert ((counts - share * source).abs() <= 1).all()


def test_load_data_splits_mix_the_classes(digits):
    for split in SPLITS:
        assert len(getattr(digits, split).labels[:50].unique()) >= 9


def test_load_data_statistics_are_those_of_the_training_split_alone(digits):
    images = digits.train.standardized(torch.float64)
    assert images.mean().item() == pytest.approx(0, abs=1e-12)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-12)
    test = digits.test.standardized(torch.float64)
    assert abs(test.mean().item()) > 1e-6
    pixels = digits.test.images.double()
    expected = (pixels - digits.mean[0]) / digits.std[0]
    torch.testing.assert_close(test, expected, rtol=1e-14, atol=0)


def test_load_data_shapes_and_types():
    data = load_data("digits")
    for split in SPLITS:
        images, labels = getattr(data, split)
        assert images.shape[1:] == (1, 8, 8)
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
    assert data.classes == tuple("0123456789")
    assert "CC BY 4.0" in data.licence


def test_load_data_depends_on_the_seed_alone():
    first = load_data("digits", seed=3)
    torch.randn(5)
    state = torch.get_rng_state()
    again, other = load_data("digits", seed=3), load_data("digits", seed=4)
    assert torch.equal(first.test.images, again.test.images)
    assert not torch.equal(first.test.labels, other.test.labels)
    assert torch.equal(state, torch.get_rng_state())


def test_dataset_to_moves_a_copy(digits):
    moved = digits.to("meta")
    for split in SPLITS:
        images, labels = getattr(moved, split)
        assert (images.device.type, images.dtype) == ("meta", torch.uint8)
        assert (labels.device.type, labels.dtype) == ("meta", torch.int64)
    assert digits.train.images.device.type == "cpu"
    assert (moved.name, moved.seed, moved.mean) == ("digits", 0, digits.mean)


def test_dataset_cannot_be_changed(digits):
    with pytest.raises(AttributeError, match="seed"):
        digits.seed = 1


def test_dataset_works_where_a_function_takes_data(digits):
    images, labels = images_and_labels(digits)
    assert torch.equal(images, digits.validation.standardized())
    assert labels is digits.validation.labels
    assert torch.equal(images_and_labels(digits.test)[0], digits.test.standardized())


def test_repr_names_sizes_and_not_pixels(digits):
    expected = (
        "Dataset('digits': 1×8×8 images, 10 classes; train 1079, validation 359, "
        "test 359; seed 0)"
    )
    assert repr(digits) == expected
    assert repr(digits.test) == "Split(359 images 1×8×8)"
    assert isinstance(digits, Dataset)
    assert isinstance(digits.test, Split)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"name": "cifar"},
            ValueError,
            "name is 'cifar', expected one of 'digits', 'm",
        ),
        ({"seed": 0.5}, TypeError, "seed is 0.5, expected an int"),
        ({"seed": True}, TypeError, "seed is True, expected an int"),
    ],
)
def test_load_data_refuses(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        load_data(**arguments)


def test_channel_statistics_equal_those_of_the_numbers():
    images = colour_split(7).images
    mean, std = channel_statistics(images)
    numbers = images.double().transpose(0, 1).flatten(1)
    assert mean == pytest.approx(numbers.mean(1).tolist(), rel=1e-14)
    assert std == pytest.approx(numbers.std(1, correction=0).tolist(), rel=1e-14)


def colour_split(n=5, seed=0, **changes):
    """Random pixels in two channels of different statistics."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (n, 2, 3, 4), dtype=torch.uint8, generator=generator)
    arguments = {"images": images, "labels": torch.arange(n) % 3}
    return Split(**arguments | {"mean": (100.0, 7.5), "std": (50.0, 80.25)} | changes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_standardize_shifts_and_scales_each_channel_and_rounds_once(dtype):
    split = colour_split()
    found = standardize(split.images, split.mean, split.std, dtype)
    assert found.dtype == dtype
    for index in itertools.product(*map(range, split.images.shape)):
        c = index[1]
        exact = (int(split.images[index]) - split.mean[c]) / split.std[c]
        assert found[index] == torch.tensor(exact, dtype=torch.float64).to(dtype)


def test_standardize_takes_tensors_and_leaves_the_pixels_alone():
    split = colour_split()
    before = split.images.clone()
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (split.mean, split.std))
    found = standardize(split.images, mean, std)
    assert torch.equal(found, standardize(split.images, split.mean, split.std))
    assert torch.equal(split.images, before)


def test_split_standardizes_in_parts(monkeypatch):
    split = colour_split(5)
    whole = split.standardized()
    monkeypatch.setattr("cpnb._data.splits._PART", 2)
    assert torch.equal(split.standardized(), whole)
    assert whole.dtype == torch.float32
    assert split.standardized(torch.float16).dtype == torch.float16


def test_standardize_refuses_an_integer_dtype():
    with pytest.raises(TypeError, match=re.escape("dtype is torch.int64, expected")):
        colour_split().standardized(torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        (
            {"images": torch.zeros(5, 2, 3, 4)},
            TypeError,
            "images have dtype torch.float32, expected torch.uint8: a split holds pix",
        ),
        (
            {"labels": torch.arange(4)},
            ValueError,
            "images have shape (5, 2, 3, 4), expected (4, channels, height, width)",
        ),
        ({"mean": (1.0,)}, ValueError, "mean has 1 entries, expected 2, one per chan"),
        ({"std": (1.0, 0.0)}, ValueError, "std is (1.0, 0.0), expected positive"),
    ],
)
def test_split_refuses_parts_that_do_not_fit(changes, error, text):
    with pytest.raises(error, match=re.escape(text)):
        colour_split(**changes)


def test_load_data_names_scikit_learn_when_it_is_missing(monkeypatch):
    original = builtins.__import__

    def without_sklearn(name, *arguments, **keywords):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return original(name, *arguments, **keywords)

    for name in [name for name in sys.modules if name.startswith("sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without_sklearn)
    with pytest.raises(ImportError, match=r"needs scikit-learn.*pip install"):
        load_data("digits")
