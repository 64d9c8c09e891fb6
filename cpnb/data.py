"""Data sets as tensors: three separate splits, fixed by a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from cpnb._checks import check_count
from cpnb._data.cifar import read_cifar10, read_cifar100
from cpnb._data.download import find_folder
from cpnb._data.idx import read_mnist
from cpnb._data.sources import SOURCES
from cpnb._data.splits import Dataset, Split, channel_statistics, standardize
from cpnb._data.svhn import read_first_crops, read_svhn

__all__ = ["NAMES", "Dataset", "Split", "load_data", "standardize"]

NAMES = tuple(SOURCES)
_READERS = {
    "mnist": read_mnist,
    "fashion_mnist": read_mnist,
    "cifar10": read_cifar10,
    "cifar100": read_cifar100,
    "svhn": read_svhn,
    "svhn_first_1083": read_first_crops,
}
_VALIDATION_SHARE = 0.1  # of the official training part
_HELD_OUT_SHARES = (0.2, 0.2)  # of a set without an official test part


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

    ``"mnist"``, ``"fashion_mnist"`` (28×28 grey pixels), ``"cifar10"``, ``"cifar100"``
    with its 100 fine labels, and ``"svhn"`` (32×32 in three colours) are read from
    their official files. The test split is the official one, in its order; the
    validation split is 10 % of each class of the official training part.

    ``"svhn_first_1083"`` is no official set, but the first 1,083 training crops of
    SVHN, a sample to try things on, split as the digits are: all its images come from
    SVHN's training part.

    The files are looked for in the folder that the environment variable ``CPNB_DATA``
    names, in the subfolders ``mnist/``, ``fashion_mnist/``,
    ``cifar10/cifar-10-batches-bin/``, ``cifar100/cifar-100-binary/``, ``svhn/`` and
    ``svhn-first-1083/``. A set without a subfolder there is downloaded once, checked by
    its hash, into the cache folder of the operating system; after an interruption, run
    again.

    Args:
        name: One of the names above.
        seed: Decides which image goes to which split, and their order.
        train_size: Keep only so many training images, the first in the seed's order.
        device: Device of the tensors; the CPU by default.

    Returns:
        The data set. Images are uint8 of shape ``(n, channels, height, width)``: 0 to
        16 for the digits, else 0 to 255. The mean and standard deviation of each
        channel are those of the training split.

    Raises:
        FileNotFoundError: If a file is missing and cannot be downloaded; the message
            says which files belong where.
        ImportError: If scikit-learn, SciPy or pooch is missing where it is needed.
        TypeError: If ``seed`` or ``train_size`` is no int.
        ValueError: If ``name`` is unknown, ``train_size`` out of range, or a file is
            damaged; the message names the file. Of the pixels of CIFAR, which are
            stored bare, only their number can be checked.

    Example:
        >>> load_data("digits")
        Dataset('digits': 1×8×8 images, 10 classes; train 1079, validation 359,
        test 359; seed 0)

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI
    Machine Learning Repository, 1998, doi:10.24432/C50P49 (its test part). Y. LeCun,
    L. Bottou, Y. Bengio, P. Haffner, Gradient-Based Learning Applied to Document
    Recognition, 1998, doi:10.1109/5.726791. H. Xiao, K. Rasul, R. Vollgraf,
    Fashion-MNIST, 2017, arXiv:1708.07747. A. Krizhevsky, Learning Multiple Layers of
    Features from Tiny Images, 2009. Y. Netzer, T. Wang, A. Coates, A. Bissacco, B. Wu,
    A. Ng, Reading Digits in Natural Images with Unsupervised Feature Learning, 2011.
    """
    if name not in SOURCES:
        known = ", ".join(map(repr, NAMES))
        raise ValueError(
            f"name is {name!r}, expected one of {known}. For images of your own pass a "
            "pair (images, labels) wherever a function takes data."
        )
    seed = check_count(seed, "seed", least=0)
    source = SOURCES[name]
    if name == "digits":
        parts = [_read_digits()]
    else:
        folder = find_folder(name)
        parts = _READERS[name](folder, source.files)
    pixels, labels = parts[0]
    shares = (_VALIDATION_SHARE,) if len(parts) > 1 else _HELD_OUT_SHARES
    train, *held_out = _stratified_split(labels, seed, shares)
    if train_size is not None:
        train_size = check_count(train_size, "train_size")
        if train_size > len(train):
            raise ValueError(
                f"train_size is {train_size}, expected 1 to {len(train)}, the number "
                "of training images."
            )
        train = train[:train_size]
    pairs = [(pixels[i], labels[i]) for i in (train, *held_out)] + parts[1:]
    statistics = channel_statistics(pairs[0][0])
    if not min(statistics[1]) > 0:
        raise ValueError(
            f"{folder / source.files[0]} holds training images with a channel of one "
            "value only, expected pictures. Download the file again."
        )
    splits = (Split(*pair, *statistics) for pair in pairs)
    return Dataset(name, *splits, source.classes, source.licence, seed).to(device)


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
