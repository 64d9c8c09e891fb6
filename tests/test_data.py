"""Data sets as tensors: every image once, splits fixed by the seed."""

import builtins
import gzip
import itertools
import os
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

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


# --- the official idx files -----------------------------------------------------------

IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)


def idx_bytes(values):
    """Uint8 values in the idx format: zero, zero, type, axes, sizes, data."""
    sizes = b"".join(struct.pack(">I", size) for size in values.shape)
    return bytes((0, 0, 8, values.ndim)) + sizes + values.tobytes()


@pytest.fixture
def idx_folder(tmp_path, monkeypatch):
    """CPNB_DATA with 60 training and 20 test images of random pixels."""
    draw = np.random.default_rng(0)
    for number, count in ((0, 60), (2, 20)):
        images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, values in zip(IDX_FILES[number:], (images, labels), strict=False):
            for folder in ("mnist", "fashion_mnist"):
                (tmp_path / folder).mkdir(exist_ok=True)
                path = tmp_path / folder / name
                path.write_bytes(gzip.compress(idx_bytes(values)))
    monkeypatch.setenv("CPNB_DATA", str(tmp_path))
    return tmp_path / "mnist"


def read_by_hand(path):
    """Values of an idx file, by numpy and the format's description alone."""
    content = gzip.decompress(path.read_bytes())
    shape = struct.unpack_from(f">{content[3]}I", content, 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def test_load_data_reads_every_idx_image_once(idx_folder):
    data = load_data("mnist")
    expected, found = [], []
    for images, labels in (IDX_FILES[:2], IDX_FILES[2:]):
        pixels = torch.tensor(read_by_hand(idx_folder / images)).flatten(1)
        expected.append(rows(pixels, torch.tensor(read_by_hand(idx_folder / labels))))
    for split in SPLITS:
        found.append(rows(raw_pixels(data, split), getattr(data, split).labels))
    assert sorted(found[0] + found[1]) == sorted(expected[0])
    assert found[2] == expected[1]  # the official test part, in its order
    assert [len(part) for part in found] == [50, 10, 20]


def test_load_data_takes_one_tenth_of_each_class_for_validation(idx_folder):
    data = load_data("mnist")
    assert data.validation.labels.bincount().tolist() == [1] * 10
    other = load_data("mnist", seed=1)
    assert not torch.equal(data.validation.images, other.validation.images)
    assert torch.equal(data.test.labels, other.test.labels)


def test_load_data_standardises_idx_images_with_the_training_split_alone(idx_folder):
    data = load_data("mnist")
    images = data.train.standardized(torch.float64)
    assert images.shape[1:] == (1, 28, 28)
    assert images.mean().item() == pytest.approx(0, abs=1e-12)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-12)
    assert abs(data.test.standardized().mean().item()) > 1e-4


def test_load_data_train_size_keeps_the_first_training_images(idx_folder):
    whole, part = load_data("mnist"), load_data("mnist", train_size=7)
    assert torch.equal(part.train.labels, whole.train.labels[:7])
    assert torch.equal(part.validation.labels, whole.validation.labels)
    assert torch.equal(part.train.images, whole.train.images[:7])
    assert part.mean == part.test.mean != whole.mean
    assert part.train.standardized().mean().item() == pytest.approx(0, abs=1e-6)


def test_load_data_names_the_clothes(idx_folder):
    data = load_data("fashion_mnist")
    assert (data.classes[0], data.classes[9]) == ("T-shirt/top", "Ankle boot")
    assert "MIT" in data.licence
    assert "LeCun" in load_data("mnist").licence


def rewrite(path, change):
    """Change the bytes inside a gzip file."""
    path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def replace_values(path, values):
    path.write_bytes(gzip.compress(idx_bytes(values)))


DAMAGES = {
    "cut": (0, cut, "is truncated or corrupt"),
    "empty": (0, lambda path: path.write_bytes(b""), "starts with nothing"),
    "flipped byte": (2, flip, "is truncated or corrupt"),
    "no gzip": (1, lambda path: path.write_bytes(b"<html>"), "is truncated or corrupt"),
    "cut before packing": (
        0,
        lambda path: rewrite(path, lambda content: content[:-1]),
        "holds 47039 bytes of data, expected 47040 from its shape (60, 28, 28)",
    ),
    "too long": (
        3,
        lambda path: rewrite(path, lambda content: content + b"\0"),
        "holds 21 bytes of data, expected 20 from its shape (20,)",
    ),
    "other type": (
        1,
        lambda path: rewrite(path, lambda content: b"\0\0\x0d" + content[3:]),
        "starts with 00 00 0d 01, expected 00 00 08 01",
    ),
    "labels for images": (
        0,
        lambda path: replace_values(path, np.zeros(60, np.uint8)),
        "starts with 00 00 08 01, expected 00 00 08 03",
    ),
    "other side": (
        2,
        lambda path: replace_values(path, np.zeros((20, 28, 27), np.uint8)),
        "has shape (20, 28, 27), expected (n, 28, 28)",
    ),
    "no images": (
        2,
        lambda path: replace_values(path, np.zeros((0, 28, 28), np.uint8)),
        "has shape (0, 28, 28), expected (n, 28, 28) with n >= 1",
    ),
    "too few labels": (
        1,
        lambda path: replace_values(path, np.zeros(59, np.uint8)),
        "has 59 labels, expected 60 from train-images-idx3-ubyte.gz",
    ),
    "label out of range": (
        3,
        lambda path: replace_values(path, np.full(20, 10, np.uint8)),
        "has the label 10, expected labels below 10",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_load_data_names_the_damaged_file(idx_folder, damage):
    number, change, text = DAMAGES[damage]
    path = idx_folder / IDX_FILES[number]
    change(path)
    with pytest.raises(ValueError, match=re.escape(f"{path} {text}")):
        load_data("mnist")


@pytest.mark.parametrize("name", IDX_FILES)
def test_load_data_names_the_missing_file_and_all_four(idx_folder, name):
    (idx_folder / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_data("mnist")
    assert str(caught.value).startswith(
        f"{idx_folder / name} is missing. Set CPNB_DATA"
    )
    assert all(file in str(caught.value) for file in IDX_FILES)


def test_load_data_says_what_to_set_without_cpnb_data(monkeypatch):
    monkeypatch.delenv("CPNB_DATA", raising=False)
    with pytest.raises(
        FileNotFoundError, match=r"CPNB_DATA is not set.*mnist/"
    ) as found:
        load_data("mnist")
    assert all(file in str(found.value) for file in IDX_FILES)


@pytest.mark.parametrize(
    ("size", "error", "text"),
    [
        (0, ValueError, "train_size is 0, expected at least 1"),
        (51, ValueError, "train_size is 51, expected 1 to 50"),
        (2.0, TypeError, "train_size is 2.0, expected an int"),
    ],
)
def test_load_data_refuses_a_train_size(idx_folder, size, error, text):
    with pytest.raises(error, match=re.escape(text)):
        load_data("mnist", train_size=size)


REAL = {"mnist": (0.1307, 0.3081), "fashion_mnist": (0.2860, 0.3530)}


@pytest.mark.parametrize("name", REAL)
def test_load_data_reads_the_real_files(name):
    if not Path(os.environ.get("CPNB_DATA", ""), name, IDX_FILES[0]).is_file():
        pytest.skip(f"CPNB_DATA names no folder with {name}/ and its official files")
    data = load_data(name)
    labels = torch.cat([data.train.labels, data.validation.labels])
    assert len(labels) == 60_000
    assert data.test.labels.bincount().sum() == 10_000
    # The known statistics of the training part; the validation tenth moves them little.
    mean, std = REAL[name]
    assert data.mean[0] / 255 == pytest.approx(mean, abs=1e-3)
    assert data.std[0] / 255 == pytest.approx(std, abs=1e-3)
