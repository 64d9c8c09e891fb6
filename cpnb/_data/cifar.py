"""Read the binary versions of CIFAR-10 and CIFAR-100: label bytes, then pixels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cpnb._data.sources import AGAIN

_PIXELS = 3 * 32 * 32


def read_cifar10(folder: Path, files: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Read the training and the test part: five files and one, of equal length."""
    paths = [folder / name for name in files]
    parts = [read_records(path, {"label": 10}) for path in paths]
    _check_lengths(paths, parts, [1] * len(parts))
    images, labels = zip(*parts[:-1], strict=True)
    return [(torch.cat(images), torch.cat(labels)), parts[-1]]


def read_cifar100(folder: Path, files: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Read the training part and the test part, a fifth as long; fine labels."""
    paths = [folder / name for name in files]
    labels = {"coarse label": 20, "fine label": 100}
    parts = [read_records(path, labels) for path in paths]
    _check_lengths(paths, parts, [5, 1])
    return parts


def read_records(path: Path, labels: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Read a file of records: one byte for each kind of label, then 3×32×32 pixels.

    Args:
        path: The file.
        labels: Kinds of label in their order, each with its number of classes.

    Returns:
        Pixels from 0 to 255, uint8, shape ``(n, 3, 32, 32)``; the last kind of labels,
        int64, shape ``(n,)``.

    Raises:
        ValueError: If there are no whole records or a label is out of range; the
            message names the file.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html, "Binary version".
    """
    content, size = np.fromfile(path, np.uint8), len(labels) + _PIXELS
    if not content.size or content.size % size:
        raise ValueError(
            f"{path} holds {content.size:,} bytes, expected a positive multiple of "
            f"{size}, the size of one image with its labels: the file is truncated or "
            f"of another kind. {AGAIN}"
        )
    records = torch.from_numpy(content).view(-1, size)
    for column, (kind, classes) in enumerate(labels.items()):
        if (largest := int(records[:, column].max())) >= classes:
            raise ValueError(
                f"{path} has the {kind} {largest}, expected labels below {classes}: "
                f"the file is corrupt or of another kind. {AGAIN}"
            )
    images = records[:, len(labels) :].reshape(-1, 3, 32, 32)
    return images, records[:, len(labels) - 1].long()


def _check_lengths(
    paths: Sequence[Path], parts: Sequence[tuple[Tensor, Tensor]], shares: Sequence[int]
) -> None:
    """Refuse a file that was cut between two records: it is too short for the others.

    The official numbers of images are not asked for, so that a small set of files of
    one's own in the same format is fine.
    """
    counts = [len(labels) for _, labels in parts]
    unit = max(-(-n // share) for n, share in zip(counts, shares, strict=True))
    for path, count, share in zip(paths, counts, shares, strict=True):
        if count != unit * share:
            raise ValueError(
                f"{path} holds {count:,} images, expected {unit * share:,} to go with "
                f"the other files of the set: it is truncated. {AGAIN}"
            )
