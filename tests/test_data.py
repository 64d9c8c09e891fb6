"""The digits as tensors: every image once, splits fixed by the seed."""

import builtins
import re
import sys

import pytest
import torch
from sklearn.datasets import load_digits

from cpnb.data import Dataset, Split, load_data
from cpnb.evaluation import images_and_labels

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def digits():
    return load_data("digits", dtype=torch.float64)


def raw_pixels(data, split):
    """Pixels from 0 to 16 as rows of whole numbers, standardising undone."""
    images = getattr(data, split).images * data.std + data.mean
    return (images.flatten(1) + 0.5).floor().long()


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


def test_load_data_pixels_are_whole_numbers_after_undoing_the_standardising(digits):
    images = digits.test.images * digits.std + digits.mean
    torch.testing.assert_close(images, images.round(), rtol=0, atol=1e-12)


def test_load_data_splits_are_stratified(digits):
    source = torch.tensor(load_digits().target).bincount()
    for split, share in [("train", 0.6), ("validation", 0.2), ("test", 0.2)]:
        counts = getattr(digits, split).labels.bincount(minlength=10)
        assert ((counts - share * source).abs() <= 1).all()


def test_load_data_splits_mix_the_classes(digits):
    for split in SPLITS:
        assert len(getattr(digits, split).labels[:50].unique()) >= 9


def test_load_data_standardises_with_the_training_split_alone(digits):
    images = digits.train.images
    assert images.mean().item() == pytest.approx(0, abs=1e-12)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-12)
    assert abs(digits.test.images.mean().item()) > 1e-6


def test_load_data_shapes_and_types():
    data = load_data("digits")
    for split in SPLITS:
        images, labels = getattr(data, split)
        assert images.shape[1:] == (1, 8, 8)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
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
    half = digits.to("meta", torch.float16)
    for split in SPLITS:
        images, labels = getattr(half, split)
        assert (images.device.type, images.dtype) == ("meta", torch.float16)
        assert (labels.device.type, labels.dtype) == ("meta", torch.int64)
    assert digits.train.images.dtype == torch.float64
    assert (half.name, half.seed, half.mean) == ("digits", 0, digits.mean)


def test_dataset_cannot_be_changed(digits):
    with pytest.raises(AttributeError, match="seed"):
        digits.seed = 1


def test_dataset_works_where_a_function_takes_data(digits):
    images, labels = images_and_labels(digits)
    assert images is digits.validation.images
    assert labels is digits.validation.labels


def test_repr_names_sizes_and_not_pixels(digits):
    expected = (
        "Dataset('digits': 1×8×8 images, 10 classes; train 1079, validation 359, "
        "test 359; seed 0)"
    )
    assert repr(digits) == expected
    assert repr(digits.test) == "Split(359 images 1×8×8, torch.float64)"
    assert isinstance(digits, Dataset)
    assert isinstance(digits.test, Split)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"name": "mnist"}, ValueError, "name is 'mnist', expected one of 'digits'."),
        ({"seed": 0.5}, TypeError, "seed is 0.5, expected an int"),
        ({"seed": True}, TypeError, "seed is True, expected an int"),
        (
            {"dtype": torch.uint8},
            TypeError,
            "dtype is torch.uint8, expected a floating",
        ),
    ],
)
def test_load_data_refuses(arguments, error, text):
    with pytest.raises(error, match=re.escape(text)):
        load_data(**arguments)


def test_dataset_to_refuses_integer_dtype(digits):
    with pytest.raises(TypeError, match=re.escape("dtype is torch.int64, expected")):
        digits.to(dtype=torch.int64)


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
