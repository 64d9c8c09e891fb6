"""SVHN: files of MATLAB, the digit 0 under label 10, and every kind of damage."""

import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from cpnb.data import load_data

TRAIN, TEST = "train_32x32.mat", "test_32x32.mat"


def crops(count, seed=0):
    """Arrays as the official files have them."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
    return {"X": pixels, "y": (np.arange(count, dtype=np.uint8) % 10 + 1)[:, None]}


def write(path, arrays, **options):
    path.parent.mkdir(exist_ok=True)
    savemat(path, arrays, **{"do_compression": True} | options)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """CPNB_DATA with 100 training and 20 test crops of random pixels."""
    write(tmp_path / "svhn" / TRAIN, crops(100))
    write(tmp_path / "svhn" / TEST, crops(20, seed=1))
    monkeypatch.setenv("CPNB_DATA", str(tmp_path))
    return tmp_path / "svhn"


def expected_pairs(arrays):
    """Image and digit of each crop, one pixel at a time."""
    pixels, labels = arrays["X"].tolist(), arrays["y"].tolist()
    return [
        (
            [
                [[pixels[y][x][c][n] for x in range(32)] for y in range(32)]
                for c in range(3)
            ],
            labels[n][0] % 10,
        )
        for n in range(len(labels))
    ]


def pairs(split):
    images, labels = split
    return list(zip(images.tolist(), labels.tolist(), strict=True))


def test_load_data_reads_every_crop_once_and_calls_label_10_zero(folder):
    data = load_data("svhn")
    training = pairs(data.train) + pairs(data.validation)
    assert sorted(training) == sorted(expected_pairs(crops(100)))
    assert pairs(data.test) == expected_pairs(crops(20, seed=1))
    assert data.validation.labels.bincount().tolist() == [1] * 10
    assert data.classes == tuple("0123456789")
    assert "non-commercial" in data.licence


def test_sample_is_the_first_1083_training_crops_and_says_so(folder):
    arrays = crops(1100)
    write(folder / TRAIN, arrays)
    data = load_data("svhn_first_1083")
    assert repr(data).startswith("Dataset('svhn_first_1083': 3×32×32 images")
    assert "only the first 1,083 training crops" in data.licence
    splits = (data.train, data.validation, data.test)
    found = torch.cat([images for images, _ in splits]).flatten(1).long()
    first = torch.tensor(arrays["X"].transpose(3, 2, 0, 1)[:1083].reshape(1083, -1))
    assert sorted(found.tolist()) == sorted(first.tolist())
    assert len(data.test.labels) == pytest.approx(0.2 * 1083, abs=5)


def test_sample_has_a_folder_of_its_own_that_comes_first(folder):
    own = folder.parent / "svhn-first-1083" / TRAIN
    write(own, crops(1083, seed=7))
    data = load_data("svhn_first_1083")
    (folder / TRAIN).unlink()
    assert torch.equal(load_data("svhn_first_1083").train.images, data.train.images)


def test_sample_refuses_a_file_with_fewer_crops(folder):
    with pytest.raises(ValueError, match="holds 100 images, expected at least 1,083"):
        load_data("svhn_first_1083")


def damaged(**changes):
    """Write a file with other arrays."""
    return lambda path: write(path, {**crops(20), **changes})


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


LABELS = crops(20)["y"]
DAMAGES = {
    **{
        f"cut after {n}": (
            lambda path, n=n: path.write_bytes(path.read_bytes()[:n]),
            "is truncated or corrupt",
        )
        for n in (0, 50, 200, 5000, -1)
    },
    "cut after the header": (
        lambda path: path.write_bytes(path.read_bytes()[:128]),
        "holds X of shape () and y of shape ()",
    ),
    "flipped byte": (flip, "is truncated or corrupt"),
    "other kind of file": (
        lambda path: path.write_bytes(b"<html>" * 999),
        "is truncated or corrupt",
    ),
    "no labels": (
        lambda path: write(path, {"X": crops(20)["X"]}),
        "holds X of shape (32, 32, 3, 20) and y of shape ()",
    ),
    "too few labels": (
        damaged(y=LABELS[:19]),
        "holds X of shape (32, 32, 3, 20) and y of shape (19, 1), expected",
    ),
    "other side": (
        damaged(X=crops(20)["X"][:31]),
        "holds X of shape (31, 32, 3, 20) and y of shape (20, 1), expected",
    ),
    "no images": (
        damaged(X=crops(20)["X"][..., :0], y=LABELS[:0]),
        "expected (32, 32, 3, n) and (n, 1) with n >= 1",
    ),
    "floats": (
        damaged(X=crops(20)["X"] / 255),
        "holds X as float64, expected uint8",
    ),
    "label 0": (damaged(y=LABELS % 10), "has the label 0, expected labels from 1 to"),
    "label 11": (damaged(y=LABELS + 1), "has the label 11, expected labels from 1 to"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", [TRAIN, TEST])
def test_load_data_names_the_damaged_file(folder, file, damage):
    change, text = DAMAGES[damage]
    path = folder / file
    change(path)
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        load_data("svhn")
    assert text in str(caught.value)
    assert "Get the official file again" in str(caught.value)


def test_load_data_names_the_missing_file_and_the_sample(folder):
    (folder / TEST).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_data("svhn")
    assert str(caught.value).startswith(f"{folder / TEST} is missing. Set CPNB_DATA")
    assert "svhn_first_1083" in str(caught.value)


def test_load_data_names_scipy_when_it_is_missing(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(ImportError, match=r"needs SciPy.*pip install scipy"):
        load_data("svhn")


def test_load_data_reads_the_real_sample():
    root = Path(os.environ.get("CPNB_DATA", ""))
    if not (root / "svhn-first-1083" / TRAIN).is_file():
        pytest.skip("CPNB_DATA names no folder with svhn-first-1083/ and its file")
    data = load_data("svhn_first_1083")
    sizes = [len(split.labels) for split in (data.train, data.validation, data.test)]
    assert sum(sizes) == 1083
    for split in (data.train, data.validation, data.test):
        assert split.labels.unique().tolist() == list(range(10))


def test_load_data_reads_the_real_files():
    root = Path(os.environ.get("CPNB_DATA", ""))
    if not (root / "svhn" / TEST).is_file():
        pytest.skip("CPNB_DATA names no folder with svhn/ and its official files")
    data = load_data("svhn")
    assert len(data.train.labels) + len(data.validation.labels) == 73_257
    assert len(data.test.labels) == 26_032
