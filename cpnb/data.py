"""Data sets as tensors: three separate splits, fixed by a seed."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cpnb._checks import check_count
from cpnb.idx import read_pair, where_to_put

_VALIDATION_SHARE = _TEST_SHARE = 0.2  # of the digits
_IDX_VALIDATION_SHARE = 0.1  # of the official training part of an idx set
_DIGITS = tuple("0123456789")
_CLOTHES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# Class names and licence line of each data set.
_ABOUT = {
    "digits": (_DIGITS, "CC BY 4.0 (UCI, doi:10.24432/C50P49), copy in scikit-learn"),
    "mnist": (_DIGITS, "cite LeCun, Bottou, Bengio, Haffner 1998"),
    "fashion_mnist": (
        _CLOTHES,
        "MIT, Zalando SE 2017; cite Xiao, Rasul, Vollgraf 2017",
    ),
}
NAMES = tuple(_ABOUT)


class Split(NamedTuple):
    """One split; unpacks into ``images, labels``."""

    images: Tensor
    labels: Tensor

    def __repr__(self) -> str:
        """Number, shape and dtype of the images instead of their pixels."""
        shape = "×".join(map(str, self.images.shape[1:]))
        return f"Split({len(self.labels)} images {shape}, {self.images.dtype})"


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Labelled images in a train, a validation and a test split.

    Attributes:
        name: Name under which :func:`load_data` knows the set.
        train: Images ``(n, channels, height, width)`` and labels ``(n,)``.
        validation: For choices made while training, and for rank sweeps.
        test: For the last number only; no function reads it unless it is passed.
        classes: Name of each class, in the order of the labels.
        mean: Mean pixel of the training split before standardising.
        std: Standard deviation of the same pixels.
        licence: Licence and source of the images.
        seed: Seed of the split.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    mean: float
    std: float
    licence: str
    seed: int

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Dataset:
        """Copy with images on ``device`` in ``dtype``, labels on ``device``.

        Raises:
            TypeError: If ``dtype`` is no floating dtype.
        """
        _check_floating(dtype)
        splits = {
            name: Split(
                getattr(self, name).images.to(device=device, dtype=dtype),
                getattr(self, name).labels.to(device=device),
            )
            for name in ("train", "validation", "test")
        }
        return replace(self, **splits)

    def __repr__(self) -> str:
        """Name, image shape, classes and the size of each split."""
        shape = "×".join(map(str, self.train.images.shape[1:]))
        sizes = ", ".join(
            f"{name} {len(getattr(self, name).labels)}"
            for name in ("train", "validation", "test")
        )
        return (
            f"Dataset({self.name!r}: {shape} images, {len(self.classes)} classes; "
            f"{sizes}; seed {self.seed})"
        )


def load_data(
    name: str = "digits",
    *,
    seed: int = 0,
    train_size: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Dataset:
    """Load a data set as standardised tensors.

    ``"digits"`` comes with scikit-learn and needs no network: 1,797 handwritten digits
    of 8×8 pixels by 13 writers. 20 % of each class go to the test and 20 % to the
    validation split. The writer of an image is not recorded, so every split contains
    all writers: accuracy on a new writer is not measured here.

    ``"mnist"`` and ``"fashion_mnist"`` (28×28 pixels) are read from their four official
    idx ``.gz`` files in the subfolder of that name of the folder that the environment
    variable ``CPNB_DATA`` names; nothing is downloaded. The test split is the official
    one, in its order; the validation split is 10 % of each class of the official
    training part.

    Args:
        name: ``"digits"``, ``"mnist"`` or ``"fashion_mnist"``.
        seed: Decides which image goes to which split, and their order.
        train_size: Keep only so many training images, the first in the seed's order.
        device: Device of the tensors; the CPU by default.
        dtype: Floating dtype of the images; float32 by default.

    Returns:
        The data set. Images have shape ``(n, 1, height, width)``; mean 0 and standard
        deviation 1 over the pixels of the training split, the same shift and scale
        elsewhere.

    Raises:
        FileNotFoundError: If ``CPNB_DATA`` is not set or a file is missing.
        ImportError: If the digits are asked for and scikit-learn is missing.
        TypeError: If ``seed`` or ``train_size`` is no int or ``dtype`` no floating
            dtype.
        ValueError: If ``name`` is unknown, ``train_size`` out of range, or a file is
            damaged; the message names the file.

    Example:
        >>> load_data("digits")
        Dataset('digits': 1×8×8 images, 10 classes; train 1079, validation 359,
        test 359; seed 0)

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI
    Machine Learning Repository, 1998, doi:10.24432/C50P49 (its test part). Y. LeCun,
    L. Bottou, Y. Bengio, P. Haffner, Gradient-Based Learning Applied to Document
    Recognition, 1998, doi:10.1109/5.726791. H. Xiao, K. Rasul, R. Vollgraf,
    Fashion-MNIST, 2017, arXiv:1708.07747.
    """
    if name not in _ABOUT:
        known = ", ".join(map(repr, NAMES))
        raise ValueError(
            f"name is {name!r}, expected one of {known}. For images of your own pass a "
            "pair (images, labels) wherever a function takes data."
        )
    seed = check_count(seed, "seed", least=0)
    _check_floating(dtype)
    if name == "digits":
        pixels, labels = _read_digits()
        shares = (_VALIDATION_SHARE, _TEST_SHARE)
        train, *held_out = _stratified_split(labels, seed, shares)
        pairs = [(pixels[i], labels[i]) for i in held_out]
    else:
        folder = _data_folder(name)
        pixels, labels = read_pair(folder, "train")
        train, held_out = _stratified_split(labels, seed, (_IDX_VALIDATION_SHARE,))
        pairs = [(pixels[held_out], labels[held_out]), read_pair(folder, "test")]
    if train_size is not None:
        train_size = check_count(train_size, "train_size")
        if train_size > len(train):
            raise ValueError(
                f"train_size is {train_size}, expected 1 to {len(train)}, the number "
                "of training images."
            )
        train = train[:train_size]
    pairs.insert(0, (pixels[train], labels[train]))
    seen = pairs[0][0] if name == "digits" else pairs[0][0].float()
    mean, std = seen.mean().item(), seen.std(correction=0).item()
    train, validation, test = (
        Split(((x - mean) / std).unsqueeze(1).to(dtype or torch.float32), y)
        for x, y in pairs
    )
    classes, licence = _ABOUT[name]
    return Dataset(name, train, validation, test, classes, mean, std, licence, seed).to(
        device
    )


def _data_folder(name: str) -> Path:
    """Folder of a data set in the one that ``CPNB_DATA`` names."""
    root = os.environ.get("CPNB_DATA", "").strip()
    if not root:
        raise FileNotFoundError(
            f"load_data({name!r}) finds no files: the environment variable CPNB_DATA "
            f"is not set. {where_to_put(name)}"
        )
    return Path(root).expanduser() / name


def _read_digits() -> tuple[Tensor, Tensor]:
    """Pixels from 0 to 16, shape (1797, 8, 8), float64; labels, shape (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'load_data("digits") needs scikit-learn, which holds the images. Install '
            "it with: python -m pip install scikit-learn"
        ) from error
    digits = load_digits()
    return torch.from_numpy(digits.images), torch.from_numpy(digits.target).long()


def _stratified_split(
    labels: Tensor, seed: int, shares: tuple[float, ...]
) -> list[Tensor]:
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


def _check_floating(dtype: torch.dtype | None) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(
            f"dtype is {dtype}, expected a floating dtype such as torch.float32: "
            "standardised pixels are not whole numbers."
        )
