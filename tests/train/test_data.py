"""Data sets: every image once, splits fixed by the seed, files found or downloaded."""

import gzip
import io
import itertools
import os
import re
import struct
import tarfile
import threading
from dataclasses import replace
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pooch
import pytest
import torch
from scipy.io import savemat
from sklearn.datasets import load_digits

from cpnb.train.data import SOURCES, as_split, load_data, standardize

SPLITS = ("train", "validation", "test")
MNIST = tuple(SOURCES["mnist"].hashes)
DIGITS = load_data("digits")
CIFAR10, CIFAR100 = SOURCES["cifar10"].unpacked, SOURCES["cifar100"].unpacked


def keys(*pairs):
    """Bytes of every image with its label."""
    return [
        (np.asarray(image).tobytes(), int(label))
        for images, labels in pairs
        for image, label in zip(images, labels, strict=True)
    ]


def test_load_data_splits_hold_each_image_of_scikit_learn_once():
    source = load_digits()
    expected = keys((source.images.astype(np.uint8), source.target))
    # All 1,797 images differ, so equal sorted lists mean disjoint and covering.
    assert len(set(expected)) == 1797
    assert sorted(keys(*(getattr(DIGITS, s) for s in SPLITS))) == sorted(expected)
    for split, share in zip(SPLITS, (0.6, 0.2, 0.2), strict=True):
        images, labels = getattr(DIGITS, split)
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        wanted = share * torch.tensor(source.target).bincount()
        assert ((labels.bincount() - wanted).abs() <= 1).all()
        assert len(labels[:50].unique()) >= 9  # in mixed order


def test_load_data_gives_the_same_split_for_a_seed_in_every_version():
    """Records name a seed: these are the first labels that version 0.1 gave."""
    state = torch.get_rng_state()
    data = load_data("digits", seed=3)
    assert data.train.labels[:12].tolist() == [4, 9, 5, 7, 3, 9, 5, 0, 5, 6, 8, 7]
    assert data.validation.labels[:12].tolist() == [3, 4, 3, 3, 7, 1, 4, 1, 0, 3, 0, 7]
    assert data.test.labels[:12].tolist() == [1, 1, 1, 3, 3, 2, 0, 6, 2, 8, 3, 9]
    assert torch.equal(state, torch.get_rng_state())


def test_load_data_statistics_are_those_of_the_training_split_alone():
    images = DIGITS.train.standardized(torch.float64)
    assert images.mean().item() == pytest.approx(0, abs=1e-12)
    assert images.std(correction=0).item() == pytest.approx(1, abs=1e-12)
    assert (DIGITS.test.mean, DIGITS.test.std) == (DIGITS.train.mean, DIGITS.train.std)


def test_load_data_train_size_keeps_the_first_training_images():
    part = load_data("digits", train_size=70)
    assert torch.equal(part.train.images, DIGITS.train.images[:70])
    assert part.train.mean == part.test.mean != DIGITS.train.mean


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_standardize_shifts_and_scales_each_channel_and_rounds_once(dtype):
    images = torch.randint(256, (5, 2, 3, 4), dtype=torch.uint8)
    before, mean, std = images.clone(), (100.0, 7.5), (50.0, 80.25)
    scaled = standardize(images, mean, std, dtype)
    assert scaled.dtype == dtype
    for index in itertools.product(*map(range, images.shape)):
        exact = (int(images[index]) - mean[index[1]]) / std[index[1]]
        assert scaled[index] == torch.tensor(exact, dtype=torch.float64).to(dtype)
    assert torch.equal(images, before)


def test_as_split_takes_a_data_set_a_split_and_a_pair():
    assert as_split(DIGITS) is DIGITS.validation
    assert as_split(DIGITS, "train") is DIGITS.train
    assert as_split(DIGITS.test, "train") is DIGITS.test
    images, labels = torch.zeros(3, 6), torch.arange(3)
    own = SimpleNamespace(train=None, validation=(images, labels), test=None)
    for data in ((images, labels), [images, labels], own):
        assert [*map(id, as_split(data))] == [id(images), id(labels)]


IMAGES, LABELS = torch.zeros(3, 6), torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize(
    ("read", "data", "error", "text"),
    [
        (load_data, "cifar", ValueError, "name is 'cifar', expected one of 'digits', "),
        (as_split, "digits", TypeError, "data is a str, expected a data set with tra"),
        (as_split, (IMAGES.numpy(), LABELS), TypeError, "or a pair (images, labels) o"),
        (as_split, (IMAGES.byte(), LABELS), ValueError, "dtype torch.uint8, labels (3"),
        (as_split, (IMAGES[:2], LABELS), ValueError, "images have shape (2, 6) and dt"),
        (as_split, (IMAGES[:0], LABELS[:0]), ValueError, "expected a class for each"),
        (as_split, (IMAGES, LABELS - 100), ValueError, "labels go down to -100, expec"),
    ],
    ids=["name", "string", "numpy", "pixels", "lengths", "empty", "negative"],
)
def test_load_data_and_as_split_say_what_they_expect(read, data, error, text):
    with pytest.raises(error, match=re.escape(text)):
        read(data)


def idx_bytes(values):
    """Uint8 values in the idx format: zero, zero, type, axes, sizes, data."""
    sizes = b"".join(struct.pack(">I", size) for size in values.shape)
    return bytes((0, 0, 8, values.ndim)) + sizes + values.tobytes()


@cache
def official_sets():
    """Files of each set, small, by their paths, and the pairs that they hold.

    The first pairs are those of the training part, the last one is the test part.
    """
    draw = np.random.default_rng(0)
    files = {}
    pairs = {name: [] for name in ("mnist", "cifar10", "cifar100", "svhn")}

    def add_pair(name, count, shape, classes=10):
        images = draw.integers(0, 256, (count, *shape), dtype=np.uint8)
        pairs[name].append((images, (np.arange(count) % classes).astype(np.uint8)))
        return pairs[name][-1]

    for number, count in ((0, 60), (2, 20)):
        images, labels = add_pair("mnist", count, (1, 28, 28))
        files[f"mnist/{MNIST[number]}"] = gzip.compress(idx_bytes(images[:, 0]))
        files[f"mnist/{MNIST[number + 1]}"] = gzip.compress(idx_bytes(labels))
    for file, count in zip(CIFAR10 + CIFAR100, [20] * 6 + [1000, 200], strict=True):
        name, coarse = ("cifar10", 0) if file in CIFAR10 else ("cifar100", 1)
        images, labels = add_pair(name, count, (3, 32, 32), 100 if coarse else 10)
        columns = [labels[:, None] % 20] * coarse + [labels[:, None]]
        content = np.concatenate([*columns, images.reshape(count, -1)], 1)
        files[f"{name}/{file}"] = content.tobytes()
    for name, count in (("train_32x32.mat", 1100), ("test_32x32.mat", 20)):
        images, labels = add_pair("svhn", count, (3, 32, 32))
        stored = np.where(labels == 0, 10, labels)[:, None]
        content = io.BytesIO()
        savemat(content, {"X": images.transpose(2, 3, 1, 0), "y": stored})
        files[f"svhn/{name}"] = content.getvalue()
    return files, pairs


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """CPNB_DATA, from the home folder, with a small copy of every official file."""
    for name, content in official_sets()[0].items():
        path = tmp_path / name
        if name.endswith(f"mnist/{MNIST[1]}"):  # a file that somebody unzipped
            path, content = path.with_suffix(""), gzip.decompress(content)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("CPNB_DATA", f"~/{tmp_path.name}")
    return tmp_path


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100", "svhn"])
def test_load_data_reads_official_files_and_holds_out_a_tenth(folder, name):
    data, other = load_data(name), load_data(name, seed=1)
    *training, test = official_sets()[1][name]
    assert sorted(keys(data.train, data.validation)) == sorted(keys(*training))
    assert keys(data.test) == keys(other.test) == keys(test)  # in its order
    assert data.train.images.shape[1:] == test[0].shape[1:]
    assert data.train.images.dtype == torch.uint8
    assert data.train.images.is_contiguous()
    held_out = data.validation.labels.bincount(minlength=len(data.classes))
    of_all = held_out + data.train.labels.bincount(minlength=len(data.classes))
    assert torch.equal(held_out, (of_all / 10).round().long())
    assert not torch.equal(data.validation.images, other.validation.images)


def test_load_data_splits_the_first_crops_of_svhn_as_the_digits(folder):
    (images, labels), _ = official_sets()[1]["svhn"]
    data = load_data("svhn_first_1083")
    splits = keys(data.train, data.validation, data.test)
    assert sorted(splits) == sorted(keys((images[:1083], labels[:1083])))
    fifth = sum(round(0.2 * count) for count in np.bincount(labels[:1083]))
    assert len(data.validation.labels) == len(data.test.labels) == fifth
    # A folder that holds nothing but the sample comes first.
    (folder / "svhn").rename(folder / "svhn-first-1083")
    assert keys(load_data("svhn_first_1083").test) == keys(data.test)


class Handler(SimpleHTTPRequestHandler):
    """Notes in ``server.asked`` what was asked for."""

    def log_message(self, *_):
        self.server.asked.append(self.path.strip("/"))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The downloads of mnist and cifar10 on this machine, and an empty cache."""
    official, served = official_sets()[0], tmp_path / "served"
    served.mkdir()
    for file in MNIST:
        (served / file).write_bytes(official[f"mnist/{file}"])
    with tarfile.open(served / "cifar-10-binary.tar.gz", mode="w:gz") as tar:
        for file in CIFAR10:
            member = tarfile.TarInfo(file)
            member.size = len(official[f"cifar10/{file}"])
            tar.addfile(member, io.BytesIO(official[f"cifar10/{file}"]))
    handler = partial(Handler, directory=served)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.asked = []
    for name in ("mnist", "cifar10"):
        digests = {f: pooch.file_hash(served / f, "md5") for f in SOURCES[name].hashes}
        hashes = {file: f"md5:{digest}" for file, digest in digests.items()}
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        local = replace(SOURCES[name], url=url, hashes=hashes)
        monkeypatch.setitem(SOURCES, name, local)
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache")
    monkeypatch.delenv("CPNB_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join(10)
    server.server_close()


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_load_data_downloads_once_into_the_cache(server, name, tmp_path):
    first, again = load_data(name), load_data(name)
    assert server.asked == list(SOURCES[name].hashes)
    assert keys(first.test) == keys(again.test) == keys(official_sets()[1][name][-1])
    files = SOURCES[name].unpacked or tuple(SOURCES[name].hashes)
    assert all((tmp_path / "cache" / name / file).is_file() for file in files)


@pytest.mark.parametrize(
    ("url", "reason"),
    [(None, "ValueError: MD5 hash"), ("http://127.0.0.1:9/", "ConnectionError")],
    ids=["another hash", "no network"],
)
def test_load_data_says_why_a_download_failed(server, url, reason, tmp_path):
    (tmp_path / "served" / MNIST[0]).write_bytes(b"something else")
    url = url or SOURCES["mnist"].url
    SOURCES["mnist"] = replace(SOURCES["mnist"], url=url)
    with pytest.raises(FileNotFoundError) as caught:
        load_data("mnist")
    text = str(caught.value)
    assert f"{url}{MNIST[0]} cannot be downloaded ({reason}" in text
    assert "Set CPNB_DATA (now '') to a folder whose subfolder mnist/ holds" in text
    assert not any((tmp_path / "cache").rglob("*.gz"))


def test_load_data_downloads_only_what_cpnb_data_has_no_folder_for(server, folder):
    (folder / "mnist" / MNIST[0]).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_data("mnist")  # a folder that is there is never written to
    text = str(caught.value)
    assert f"{folder / 'mnist' / MNIST[0]} is missing. Set CPNB_DATA (now '" in text
    assert all(file in text for file in MNIST)
    assert server.asked == []
    (folder / "mnist").rename(folder / "else")
    assert len(load_data("mnist").test.labels) == 20
    assert server.asked == list(MNIST)


# The known statistics of the whole training part.
REAL = {
    "mnist": ([33.3], [78.6]),
    "fashion_mnist": ([72.9], [90.0]),
    "cifar10": ([125.3, 123.0, 113.9], [63.0, 62.1, 66.7]),
    "cifar100": ([129.3, 124.1, 112.4], [68.2, 65.4, 70.4]),
}


@pytest.mark.parametrize("name", REAL)
def test_load_data_reads_the_real_files(name):
    file = (SOURCES[name].unpacked or tuple(SOURCES[name].hashes))[0]
    if not Path(os.environ.get("CPNB_DATA", ""), name, file).is_file():
        pytest.skip(f"CPNB_DATA names no folder with {name}/ and its official files")
    data, (mean, std) = load_data(name), REAL[name]
    assert len(data.test.labels) == 10_000
    assert data.train.mean == pytest.approx(mean, abs=0.3)
    assert data.train.std == pytest.approx(std, abs=0.3)
