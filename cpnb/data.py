"""Data sets as tensors: three separate splits, fixed by a seed."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from cpnb._checks import check_count
from cpnb._data.idx import read_pair, where_to_put
from cpnb._data.splits import Dataset, Split, channel_statistics, standardize

__all__ = ["NAMES", "Dataset", "Split", "load_data", "standardize"]

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


def load_data(
    name: str = "digits",
    *,
    seed: int = 0,
    train_size: int | None = None,
    device: torch.device | str | None = None,
) -> Dataset:
    """Load a data set as pixels in tensors.

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

    Returns:
        The data set. Images are uint8 of shape ``(n, 1, height, width)``: 0 to 16 for
        the digits, else 0 to 255. The mean and standard deviation of each channel are
        those of the training split.

    Raises:
        FileNotFoundError: If ``CPNB_DATA`` is not set or a file is missing.
        ImportError: If the digits are asked for and scikit-learn is missing.
        TypeError: If ``seed`` or ``train_size`` is no int.
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
    statistics = channel_statistics(pairs[0][0])
    splits = (Split(images, labels, *statistics) for images, labels in pairs)
    classes, licence = _ABOUT[name]
    return Dataset(name, *splits, classes, licence, seed).to(device)


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
    """Pixels from 0 to 16, shape (1797, 1, 8, 8); labels, shape (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            'load_data("digits") needs scikit-learn, which holds the images. Install '
            "it with: python -m pip install scikit-learn"
        ) from error
    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    return images, torch.from_numpy(digits.target).long()


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
