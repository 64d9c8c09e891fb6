"""CIFAR-10 and CIFAR-100: the binary version, read once, and every kind of damage."""

import functools
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cpnb._data.sources import SOURCES
from cpnb.data import load_data

CIFAR10, CIFAR100 = SOURCES["cifar10"].files, SOURCES["cifar100"].files


def records(images, *labels):
    """Records in the official format: label bytes, then the pixels."""
    columns = [np.asarray(column, np.uint8)[:, None] for column in labels]
    joined = np.concatenate([*columns, images.reshape(len(images), -1)], axis=1)
    return joined.astype(np.uint8).tobytes()


@functools.cache
def contents():
    """Files with 20 images each for CIFAR-10, 1,000 and 200 for CIFAR-100."""
    draw, found = np.random.default_rng(0), {}
    for name in CIFAR10:
        images = draw.integers(0, 256, (20, 3, 32, 32))
        found["cifar10", name] = records(images, np.arange(20) % 10)
    for name, count in zip(CIFAR100, (1000, 200), strict=True):
        images = draw.integers(0, 256, (count, 3, 32, 32))
        fine = np.arange(count) % 100
        found["cifar100", name] = records(images, fine % 20, fine)
    return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """CPNB_DATA with small files of random pixels."""
    for (name, file), content in contents().items():
        path = tmp_path / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setenv("CPNB_DATA", str(tmp_path))
    return tmp_path


def read_by_hand(path, label_bytes):
    """Images and last labels, one record at a time, as the format describes them."""
    content, found = path.read_bytes(), []
    size = label_bytes + 3 * 1024
    for start in range(0, len(content), size):
        record = content[start : start + size]
        pixels = [
            [list(record[label_bytes + 1024 * c + 32 * y :][:32]) for y in range(32)]
            for c in range(3)
        ]
        found.append((pixels, record[label_bytes - 1]))
    return found


def pairs(split):
    images, labels = split
    return list(zip(images.tolist(), labels.tolist(), strict=True))


@pytest.mark.parametrize(
    ("name", "files", "label_bytes"),
    [("cifar10", CIFAR10, 1), ("cifar100", CIFAR100, 2)],
)
def test_load_data_reads_every_record_once(folder, name, files, label_bytes):
    data = load_data(name)
    expected = [read_by_hand(folder / name / file, label_bytes) for file in files]
    training = [pair for part in expected[:-1] for pair in part]
    assert sorted(pairs(data.train) + pairs(data.validation)) == sorted(training)
    assert pairs(data.test) == expected[-1]  # the official test part, in its order
    share = data.validation.labels.bincount(minlength=len(data.classes))
    assert set(share.tolist()) == {1}  # one tenth of each class
    assert data.train.images.dtype == torch.uint8
    assert len(data.mean) == len(data.std) == 3


def test_load_data_keeps_the_seed_and_the_first_training_images(folder):
    whole, part = (
        load_data("cifar10", seed=3),
        load_data("cifar10", seed=3, train_size=9),
    )
    assert torch.equal(part.train.images, whole.train.images[:9])
    assert torch.equal(part.validation.images, whole.validation.images)
    other = load_data("cifar10", seed=4)
    assert not torch.equal(other.validation.images, whole.validation.images)


def test_load_data_names_the_classes_of_cifar(folder):
    ten, hundred = load_data("cifar10"), load_data("cifar100")
    assert (ten.classes[0], ten.classes[9]) == ("airplane", "truck")
    assert len(set(hundred.classes)) == 100
    assert list(hundred.classes) == sorted(hundred.classes)
    assert "Krizhevsky" in ten.licence


def change_bytes(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


def set_byte(position, value):
    return change_bytes(
        lambda content: content[:position] + bytes([value]) + content[position + 1 :]
    )


DAMAGES = {
    "empty": (CIFAR10[0], change_bytes(lambda content: b""), "holds 0 bytes, expected"),
    "cut within an image": (
        CIFAR10[3],
        change_bytes(lambda content: content[:-1]),
        "holds 61,459 bytes, expected a positive multiple of 3073",
    ),
    "cut between images": (
        CIFAR10[2],
        change_bytes(lambda content: content[:-3073]),
        "holds 19 images, expected 20 to go with the other files",
    ),
    "test part cut between images": (
        CIFAR10[5],
        change_bytes(lambda content: content[: 3073 * 7]),
        "holds 7 images, expected 20 to go with the other files",
    ),
    "label out of range": (
        CIFAR10[5],
        set_byte(3073, 10),
        "has the label 10, expected labels below 10",
    ),
    "other kind of file": (
        CIFAR10[4],
        change_bytes(lambda content: b"<html>" * 3073),
        "has the label 116, expected labels below 10",
    ),
    "one label byte too many": (
        CIFAR10[1],
        change_bytes(lambda content: (content[:3073] + b"\0") * 2),
        "holds 6,148 bytes, expected a positive multiple of 3073",
    ),
    "coarse label out of range": (
        CIFAR100[1],
        set_byte(2 * 3074, 20),
        "has the coarse label 20, expected labels below 20",
    ),
    "fine label out of range": (
        CIFAR100[0],
        set_byte(3074 + 1, 100),
        "has the fine label 100, expected labels below 100",
    ),
    "training part cut between images": (
        CIFAR100[0],
        change_bytes(lambda content: content[: 3074 * 900]),
        "holds 900 images, expected 1,000 to go with the other files",
    ),
    "second part cut between images": (
        CIFAR100[1],
        change_bytes(lambda content: content[: 3074 * 100]),
        "holds 100 images, expected 200 to go with the other files",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_load_data_names_the_damaged_file(folder, damage):
    file, change, text = DAMAGES[damage]
    name = "cifar10" if file in CIFAR10 else "cifar100"
    path = folder / name / file
    change(path)
    with pytest.raises(ValueError, match=re.escape(f"{path} {text}")) as caught:
        load_data(name)
    assert "Get the official file again" in str(caught.value)


@pytest.mark.parametrize("file", CIFAR10)
def test_load_data_names_the_missing_file_and_all_of_them(folder, file):
    path = folder / "cifar10" / file
    path.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_data("cifar10")
    assert str(caught.value).startswith(f"{path} is missing. Set CPNB_DATA")
    assert all(name in str(caught.value) for name in CIFAR10)


# The known statistics of the whole training part.
REAL = {
    "cifar10": ([125.3, 123.0, 113.9], [63.0, 62.1, 66.7]),
    "cifar100": ([129.3, 124.1, 112.4], [68.2, 65.4, 70.4]),
}


@pytest.mark.parametrize("name", REAL)
def test_load_data_reads_the_real_files(name):
    source = SOURCES[name]
    if not Path(os.environ.get("CPNB_DATA", ""), name, source.files[0]).is_file():
        pytest.skip(f"CPNB_DATA names no folder with {name}/ and its official files")
    data = load_data(name)
    classes = len(source.classes)
    assert data.train.labels.bincount().tolist() == [45_000 // classes] * classes
    assert data.validation.labels.bincount().tolist() == [5_000 // classes] * classes
    assert data.test.labels.bincount().tolist() == [10_000 // classes] * classes
    mean, std = REAL[name]
    assert data.mean == pytest.approx(mean, abs=0.2)
    assert data.std == pytest.approx(std, abs=0.2)
