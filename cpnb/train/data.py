"""Data sets as pixels in tensors: their files, and three splits fixed by a seed."""

from __future__ import annotations

import gzip
import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

_VALIDATION_SHARE = 0.1  # of the official training part
_HELD_OUT_SHARES = (0.2, 0.2)  # of a set without an official test part
_AT_A_TIME = 1000  # images standardised at once: in float64 they take 8× their room

Part = tuple[Tensor, Tensor]  # pixels (n, channels, height, width) and labels (n,)


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """Labelled images; unpacks into ``images, labels``.

    Attributes:
        images: Pixels, uint8, which functions that take data standardise on the way.
            Shape ``(n, channels, height, width)``.
        labels: Class numbers. Shape ``(n,)``.
        mean: Mean pixel of each channel over the training split. None if the images
            are what a network reads; they may then have any shape ``(n, ...)``.
        std: Standard deviation of the same pixels, or None.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        """The images, then the labels."""
        return iter((self.images, self.labels))

    def standardized(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Images with mean 0 and standard deviation 1 over the training split."""
        pieces = self.images.split(_AT_A_TIME)
        return torch.cat([standardize(p, self.mean, self.std, dtype) for p in pieces])

    def to(self, device: torch.device | str | None) -> Split:
        """Copy with images and labels on ``device``."""
        images, labels = self.images.to(device), self.labels.to(device)
        return replace(self, images=images, labels=labels)

    def __repr__(self) -> str:
        """Number and shape of the images."""
        shape = "×".join(map(str, self.images.shape[1:]))
        return f"Split({len(self.labels)} images {shape})"


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Labelled images in a train, a validation and a test split.

    Attributes:
        name: Name under which `load_data` knows the set.
        train: To train on.
        validation: For choices made while training, and for rank sweeps.
        test: For the last number only; no function reads it unless it is passed.
        classes: Name of each class, in the order of the labels.
        licence: Licence and source of the images.
        seed: Seed of the split.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    licence: str
    seed: int

    def to(self, device: torch.device | str | None) -> Dataset:
        """Copy with all images and labels on ``device``."""
        parts = ("train", "validation", "test")
        return replace(self, **{part: getattr(self, part).to(device) for part in parts})

    def __repr__(self) -> str:
        """Name, image shape, classes and the size of each split."""
        shape = "×".join(map(str, self.train.images.shape[1:]))
        return (
            f"Dataset({self.name!r}: {shape} images, {len(self.classes)} classes; "
            f"train {len(self.train.labels)}, validation {len(self.validation.labels)},"
            f" test {len(self.test.labels)}; seed {self.seed})"
        )


def standardize(
    images: Tensor,
    mean: Sequence[float] | Tensor | None,
    std: Sequence[float] | Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Shift and scale pixels ``(..., channels, height, width)``, each channel apart.

    In float64 and rounded once, so that a pixel always becomes the same number. Without
    statistics only the dtype changes, and that of integers, such as tokens, does not.

    >>> standardize(torch.tensor([[[0, 8, 16]]], dtype=torch.uint8), [8], [4])
    tensor([[[-2.,  0.,  2.]]])
    """
    if mean is None or std is None:
        return images.to(dtype) if images.is_floating_point() else images
    shift = torch.as_tensor(mean, dtype=torch.float64, device=images.device)
    scale = torch.as_tensor(std, dtype=torch.float64, device=images.device)
    shifted = images.double().sub_(shift[:, None, None])
    return shifted.div_(scale[:, None, None]).to(dtype)


def as_split(data: Any, split: str = "validation") -> Split:
    """Read a split of a data set, or any one split, or a pair; pixels as they are."""
    pair = getattr(data, split, data)
    if isinstance(pair, Split):
        return pair
    is_pair = isinstance(pair, tuple | list) and len(pair) == 2
    if not is_pair or not all(isinstance(part, Tensor) for part in pair):
        raise TypeError(
            f"data is a {type(data).__name__}, expected a data set with train, "
            "validation and test, one of these, or a pair (images, labels) of tensors. "
            'Start with load_data("digits"), or put the batches of a loader together: '
            "tuple(map(torch.cat, zip(*loader)))."
        )
    images, labels = pair
    is_wrong = labels.ndim != 1 or len(images) != len(labels) or not len(labels)
    if images.dtype == torch.uint8 or is_wrong:
        raise ValueError(
            f"images have shape {tuple(images.shape)} and dtype {images.dtype}, labels "
            f"{tuple(labels.shape)}, expected a class for each, at least one, and no "
            "bare pixels: scale those first, for example images.float() / 255."
        )
    if (least := labels.long().min()) < 0:
        raise ValueError(f"labels go down to {least}, expected classes from 0.")
    return Split(images, labels)


def load_data(
    name: str = "digits",
    *,
    seed: int = 0,
    train_size: int | None = None,
    device: torch.device | str | None = None,
) -> Dataset:
    """Load a data set as pixels in tensors.

    ``"digits"`` comes with scikit-learn: 1,797 handwritten digits of 8×8 pixels by 13
    writers. 20 % of each class go to the test and 20 % to the validation split; every
    split contains all writers, so accuracy on a new writer is not measured here.

    ``"mnist"``, ``"fashion_mnist"``, ``"cifar10"``, ``"cifar100"`` and ``"svhn"`` are
    read from their official files. The test split is the official one, in its order;
    the validation split is 10 % of each class of the training part.
    ``"svhn_first_1083"``, the first 1,083 training crops, is a sample to try things on,
    split as the digits are.

    The environment variable ``CPNB_DATA`` names the folder of ``mnist/``,
    ``fashion_mnist/``, ``cifar10/cifar-10-batches-bin/``, ``svhn/``,
    ``cifar100/cifar-100-binary/`` and ``svhn-first-1083/``. A set without a folder
    there is downloaded once, checked by its hash, into the user's cache.

    Args:
        name: One of the names above.
        seed: Decides which image goes to which split, and their order.
        train_size: Keep at most so many training images, the first in the seed's order.
        device: Device of the tensors; the CPU by default.

    Returns:
        The data set, its images uint8: 0 to 16 for the digits, else 0 to 255.

    Example:
        >>> load_data("digits")
        Dataset('digits': 1×8×8 images, 10 classes; train 1079, validation 359,
        test 359; seed 0)
    """
    if name not in SOURCES:
        raise ValueError(
            f"name is {name!r}, expected one of {', '.join(map(repr, SOURCES))}. Your "
            "own images need no name: pass (images, labels) where data is asked for."
        )
    source = SOURCES[name]
    (pixels, labels), *official_test = _read_parts(source)
    shares = (_VALIDATION_SHARE,) if official_test else _HELD_OUT_SHARES
    first, *held_out = _stratified(labels, seed, shares)
    pairs = [(pixels[i], labels[i]) for i in (first[:train_size], *held_out)]
    mean, std = _channel_statistics(pairs[0][0])
    train, validation, test = (
        Split(*pair, mean, std).to(device) for pair in (*pairs, *official_test)
    )
    return Dataset(name, train, validation, test, source.classes, source.licence, seed)


def _stratified(labels: Tensor, seed: int, shares: Sequence[float]) -> list[Tensor]:
    """Indices of the training split and of one per share, each in random order."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in (0, *shares)]
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        sizes = [round(share * len(members)) for share in shares]
        sizes.insert(0, len(members) - sum(sizes))
        for part, piece in zip(parts, members.split(sizes), strict=True):
            part.append(piece)
    joined = [torch.cat(part) for part in parts]
    return [i[torch.randperm(len(i), generator=generator)] for i in joined]


def _channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, from exact counts of its pixels."""
    values = torch.arange(256, dtype=torch.float64)
    means, deviations = [], []
    for channel in images.unbind(1):
        counts = channel.flatten().bincount(minlength=256).double()
        means.append((counts @ values / counts.sum()).item())
        squares = (values - means[-1]).square()
        deviations.append((counts @ squares / counts.sum()).sqrt().item())
    return tuple(means), tuple(deviations)


@dataclass(frozen=True)
class Source:
    """One data set as its makers publish it."""

    read: Callable[[Sequence[Path]], list[Part]]  # training part, then any test part
    classes: tuple[str, ...]
    licence: str  # and whom to cite
    folders: Sequence[str] = ()  # to look for in CPNB_DATA; the last is the cache's
    url: str = ""  # where the downloads are
    hashes: Mapping[str, str] = field(default_factory=dict)  # a .tar.gz is unpacked
    unpacked: Sequence[str] = ()  # files in the folder, if not the downloads


def _read_parts(source: Source) -> list[Part]:
    """Read a set from ``CPNB_DATA`` or the cache, downloaded if it is in neither."""
    if not source.folders:
        return source.read([])
    files = source.unpacked or tuple(source.hashes)
    root = os.path.expanduser(os.environ.get("CPNB_DATA", ""))
    advice = (
        f"Set CPNB_DATA (now {root!r}) to a folder whose subfolder "
        f"{source.folders[0]}/ holds the official files: {', '.join(files)}."
    )
    places = [Path(root, folder) for folder in source.folders if root]
    place = next(filter(Path.is_dir, places), None) or _download(source, files, advice)
    paths = [_unzipped(place / file) for file in files]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing. {advice}")
    return source.read(paths)


def _unzipped(path: Path) -> Path:
    """The path, or that of the same file without ``.gz`` if only that is there."""
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    return plain if plain.is_file() and not path.is_file() else path


def _download(source: Source, files: Sequence[str], advice: str) -> Path:
    """Fetch what is not in the cache yet, and return its folder."""
    import pooch

    place = Path(pooch.os_cache("cpnb"), source.folders[-1])
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / ".lock"):  # of two processes the second finds all there
        if not all((place / file).is_file() for file in files):
            _fetch(source, place, advice)
    return place


def _fetch(source: Source, place: Path, advice: str) -> None:
    import pooch

    cache = pooch.create(place, source.url, registry=dict(source.hashes))
    load: Any = pooch.HTTPDownloader(progressbar=True, timeout=20)
    for file in source.hashes:
        unpack = pooch.Untar(extract_dir=".") if file.endswith(".tar.gz") else None
        try:
            cache.fetch(file, processor=unpack, downloader=load)
        except (OSError, ValueError) as error:  # no network, or another hash
            raise FileNotFoundError(
                f"{source.url}{file} cannot be downloaded ({type(error).__name__}: "
                f"{error}). Run again when it can, or use files you have. {advice}"
            ) from None


def _read_digits(paths: Sequence[Path]) -> list[Part]:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    return [(images, torch.from_numpy(digits.target).long())]


def _read_mnist(paths: Sequence[Path]) -> list[Part]:
    pairs = zip(paths[::2], paths[1::2], strict=True)  # images, labels
    return [(_read_idx(x)[:, None], _read_idx(y).long()) for x, y in pairs]


def _read_idx(path: Path) -> Tensor:
    """Two zeros, the type, the number of axes, big-endian sizes, then the bytes."""
    content = path.read_bytes()
    content = gzip.decompress(content) if path.suffix == ".gz" else content
    shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
    return torch.from_numpy(values.reshape(shape).copy())


def _read_cifar(paths: Sequence[Path], label_bytes: int) -> list[Part]:
    """Records of label bytes, of which the last one counts, and 3×32×32 pixels."""
    size = label_bytes + 3 * 32 * 32
    rows = [torch.from_numpy(np.fromfile(p, np.uint8)).view(-1, size) for p in paths]
    return [
        (part[:, label_bytes:].reshape(-1, 3, 32, 32), part[:, label_bytes - 1].long())
        for part in (torch.cat(rows[:-1]), rows[-1])
    ]


def _read_svhn(paths: Sequence[Path], first: int | None = None) -> list[Part]:
    """Arrays ``X``, ``(32, 32, 3, n)``, and ``y``, ``(n, 1)``, where 10 is a zero."""
    from scipy.io import loadmat

    contents = [loadmat(path, variable_names=["X", "y"]) for path in paths]
    return [
        (
            torch.from_numpy(content["X"]).permute(3, 2, 0, 1)[:first].contiguous(),
            torch.from_numpy(content["y"])[:first, 0].long() % 10,
        )
        for content in contents
    ]


READERS: dict[str, Callable[[Sequence[Path]], list[Part]]] = {
    "digits": _read_digits,
    "mnist": _read_mnist,
    "cifar10": partial(_read_cifar, label_bytes=1),
    "cifar100": partial(_read_cifar, label_bytes=2),  # the coarse label, then the fine
    "svhn": _read_svhn,
    "svhn_first_1083": partial(_read_svhn, first=1083),
}


def _sources() -> dict[str, Source]:
    listed = tomllib.loads(Path(__file__).with_name("sources.toml").read_text("utf-8"))
    sources = {}
    for name, entry in listed.items():
        read, classes = READERS[entry.pop("format")], entry.pop("classes")
        names = range(classes) if isinstance(classes, int) else classes.split(", ")
        sources[name] = Source(read, tuple(map(str, names)), **entry)
    return sources


SOURCES = _sources()
