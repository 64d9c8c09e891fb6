"""Data sets as tensors: three separate splits, fixed by a seed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("digits",)
_VALIDATION_SHARE = _TEST_SHARE = 0.2


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
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Dataset:
    """Load a data set as standardised tensors.

    ``"digits"`` comes with scikit-learn and needs no network: 1,797 handwritten digits
    of 8×8 pixels by 13 writers. 20 % of each class go to the test and 20 % to the
    validation split. The writer of an image is not recorded, so every split contains
    all writers: accuracy on a new writer is not measured here.

    Args:
        name: Name of the data set; only ``"digits"`` in this release.
        seed: Decides which image goes to which split, and their order.
        device: Device of the tensors; the CPU by default.
        dtype: Floating dtype of the images; float32 by default.

    Returns:
        The data set. Images have shape ``(n, 1, 8, 8)``; mean 0 and standard deviation
        1 over the pixels of the training split, the same shift and scale elsewhere.

    Raises:
        ImportError: If scikit-learn is missing.
        TypeError: If ``seed`` is no int or ``dtype`` no floating dtype.
        ValueError: If ``name`` is unknown.

    Example:
        >>> load_data("digits")
        Dataset('digits': 1×8×8 images, 10 classes; train 1079, validation 359,
        test 359; seed 0)

    Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI
    Machine Learning Repository, 1998, doi:10.24432/C50P49 (its test part).
    """
    if name not in NAMES:
        known = ", ".join(map(repr, NAMES))
        raise ValueError(
            f"name is {name!r}, expected one of {known}. For images of your own pass a "
            "pair (images, labels) wherever a function takes data."
        )
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed is {seed!r}, expected an int.")
    _check_floating(dtype)
    pixels, labels = _read_digits()
    train, validation, test = _stratified_split(labels, seed)
    mean, std = pixels[train].mean().item(), pixels[train].std(correction=0).item()
    images = ((pixels - mean) / std).unsqueeze(1).to(dtype or torch.float32)
    parts = [Split(images[i], labels[i]) for i in (train, validation, test)]
    return Dataset(
        name=name,
        train=parts[0],
        validation=parts[1],
        test=parts[2],
        classes=tuple("0123456789"),
        mean=mean,
        std=std,
        licence="CC BY 4.0 (UCI, doi:10.24432/C50P49), copy in scikit-learn",
        seed=seed,
    ).to(device)


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


def _stratified_split(labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of the train, validation and test split, each in random order."""
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], ...] = ([], [], [])
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        validation = round(_VALIDATION_SHARE * len(members))
        test = round(_TEST_SHARE * len(members))
        sizes = [len(members) - validation - test, validation, test]
        for part, piece in zip(parts, members.split(sizes), strict=True):
            part.append(piece)
    joined = [torch.cat(part) for part in parts]
    shuffled = [i[torch.randperm(len(i), generator=generator)] for i in joined]
    return shuffled[0], shuffled[1], shuffled[2]


def _check_floating(dtype: torch.dtype | None) -> None:
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(
            f"dtype is {dtype}, expected a floating dtype such as torch.float32: "
            "standardised pixels are not whole numbers."
        )
