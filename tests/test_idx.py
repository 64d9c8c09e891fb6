"""MNIST and Fashion-MNIST: the four idx files, read once, and every kind of damage."""

import gzip
import os
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from cpnb.data import load_data

FILES = (
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
        for name, values in zip(FILES[number:], (images, labels), strict=False):
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


def rows(images, labels):
    """One tuple of pixels and label per image."""
    pixels = np.asarray(images).reshape(len(images), -1).tolist()
    return [
        (*pixel, label) for pixel, label in zip(pixels, labels.tolist(), strict=True)
    ]


def test_load_data_reads_every_idx_image_once(idx_folder):
    data = load_data("mnist")
    expected = [
        rows(read_by_hand(idx_folder / images), read_by_hand(idx_folder / labels))
        for images, labels in (FILES[:2], FILES[2:])
    ]
    found = [rows(*split) for split in (data.train, data.validation, data.test)]
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
    path = idx_folder / FILES[number]
    change(path)
    with pytest.raises(ValueError, match=re.escape(f"{path} {text}")):
        load_data("mnist")


@pytest.mark.parametrize("name", FILES)
def test_load_data_names_the_missing_file_and_all_four(idx_folder, name):
    (idx_folder / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_data("mnist")
    assert str(caught.value).startswith(
        f"{idx_folder / name} is missing. Set CPNB_DATA"
    )
    assert all(file in str(caught.value) for file in FILES)


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
    if not Path(os.environ.get("CPNB_DATA", ""), name, FILES[0]).is_file():
        pytest.skip(f"CPNB_DATA names no folder with {name}/ and its official files")
    data = load_data(name)
    labels = torch.cat([data.train.labels, data.validation.labels])
    assert len(labels) == 60_000
    assert data.test.labels.bincount().sum() == 10_000
    # The known statistics of the training part; the validation tenth moves them little.
    mean, std = REAL[name]
    assert data.mean[0] / 255 == pytest.approx(mean, abs=1e-3)
    assert data.std[0] / 255 == pytest.approx(std, abs=1e-3)


def test_load_data_names_a_file_whose_pictures_are_empty(idx_folder):
    empty = np.zeros((60, 28, 28), np.uint8)
    (idx_folder / FILES[0]).write_bytes(gzip.compress(idx_bytes(empty)))
    with pytest.raises(ValueError, match=f"{FILES[0]} holds training images with a ch"):
        load_data("mnist")


def test_load_data_says_when_the_folder_is_of_a_user_that_there_is_not(monkeypatch):
    monkeypatch.setenv("CPNB_DATA", "~no-such-user-here/x")
    with pytest.raises(FileNotFoundError, match="CPNB_DATA is '~no-such-user-here/x'"):
        load_data("mnist")
