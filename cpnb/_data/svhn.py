"""Read the cropped digits of SVHN: two files of MATLAB."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cpnb._data.sources import AGAIN

FIRST = 1083


def read_svhn(folder: Path, files: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Read the training and the test part."""
    return [read_crops(folder / name) for name in files]


def read_first_crops(folder: Path, files: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Read the first 1,083 crops of the training part."""
    (name,) = files
    images, labels = read_crops(folder / name)
    if len(labels) < FIRST:
        raise ValueError(
            f"{folder / name} holds {len(labels)} images, expected at least {FIRST:,}. "
            f"{AGAIN}"
        )
    return [(images[:FIRST].clone(), labels[:FIRST])]


def read_crops(path: Path) -> tuple[Tensor, Tensor]:
    """Read a file with the arrays ``X``, ``(32, 32, 3, n)``, and ``y``, ``(n, 1)``.

    The file says 10 for the digit 0.

    Args:
        path: The file.

    Returns:
        Pixels from 0 to 255, uint8, shape ``(n, 3, 32, 32)``; digits, int64, shape
        ``(n,)``.

    Raises:
        ImportError: If SciPy is missing.
        ValueError: If the file is damaged or holds something else; the message names
            it.

    Source: http://ufldl.stanford.edu/housenumbers, "Format 2: Cropped Digits".
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError(
            f"{path} needs SciPy to be read. Install it with: "
            "python -m pip install scipy"
        ) from error
    try:
        content = loadmat(path, variable_names=["X", "y"])
    # Whatever the parser stumbles over in the middle of a damaged file.
    except Exception as error:
        raise ValueError(
            f"{path} is truncated or corrupt ({error}), expected a MATLAB file. {AGAIN}"
        ) from error
    shapes = [np.shape(content.get(name)) for name in ("X", "y")]
    count = shapes[0][-1] if shapes[0] else 0
    if shapes != [(32, 32, 3, count), (count, 1)] or not count:
        raise ValueError(
            f"{path} holds X of shape {shapes[0]} and y of shape {shapes[1]}, expected "
            f"(32, 32, 3, n) and (n, 1) with n >= 1. {AGAIN}"
        )
    pixels, digits = content["X"], content["y"].squeeze(1)
    if pixels.dtype != np.uint8:
        raise ValueError(f"{path} holds X as {pixels.dtype}, expected uint8. {AGAIN}")
    wrong = digits[~np.isin(digits, np.arange(1, 11))]
    if wrong.size:
        raise ValueError(
            f"{path} has the label {wrong[0]}, expected labels from 1 to 10. {AGAIN}"
        )
    images = np.ascontiguousarray(pixels.transpose(3, 2, 0, 1))
    return torch.from_numpy(images), torch.from_numpy(digits.astype(np.int64) % 10)
