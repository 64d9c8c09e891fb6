"""Read the official files of MNIST and Fashion-MNIST: four gzipped idx files each."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path

import torch
from torch import Tensor

FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
_UNSIGNED_BYTE = 0x08
_AGAIN = "Get the official file again."


def read_idx(path: str | os.PathLike[str], ndim: int) -> Tensor:
    """Read a gzipped idx file of unsigned bytes.

    The format: two zero bytes, the type (8 for unsigned bytes), the number of axes, one
    big-endian 32-bit size for each axis, then the data in row-major order.

    Args:
        path: The file.
        ndim: Number of axes that it must have.

    Returns:
        The content as uint8.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is no complete idx file of this kind; the message names it.

    Source: http://yann.lecun.com/exdb/mnist, "The IDX file format".
    """
    path = Path(path)
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path} is truncated or corrupt ({error}), expected a gzip file. {_AGAIN}"
        ) from error
    header = 4 + 4 * ndim
    if len(content) < header or content[:4] != bytes((0, 0, _UNSIGNED_BYTE, ndim)):
        raise ValueError(
            f"{path} starts with {content[:4].hex(' ') or 'nothing'}, expected "
            f"00 00 08 {ndim:02x}: unsigned bytes with {ndim} axes. {_AGAIN}"
        )
    shape = [int.from_bytes(content[i : i + 4]) for i in range(4, header, 4)]
    if len(content) - header != math.prod(shape):
        raise ValueError(
            f"{path} holds {len(content) - header} bytes of data, expected "
            f"{math.prod(shape)} from its shape {tuple(shape)}. {_AGAIN}"
        )
    # bytearray, because torch warns about memory that it may not write to.
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return values[header:].reshape(shape)


def read_pair(
    folder: str | os.PathLike[str], part: str, *, side: int = 28, classes: int = 10
) -> tuple[Tensor, Tensor]:
    """Read the images and labels of one official part, and check that they fit.

    Args:
        folder: Where the four files are.
        part: ``"train"`` or ``"test"``.
        side: Height and width that the images must have.
        classes: Number of classes; labels run from 0 to one less.

    Returns:
        Pixels from 0 to 255, uint8, shape ``(n, 1, side, side)``; labels, int64, shape
        ``(n,)``.

    Raises:
        FileNotFoundError: If a file is missing; the message lists all four.
        ValueError: If a file is damaged or does not fit; the message names it.
    """
    paths = [Path(folder) / name for name in FILES[part]]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing. {where_to_put(folder)}")
    images, labels = read_idx(paths[0], ndim=3), read_idx(paths[1], ndim=1).long()
    if tuple(images.shape[1:]) != (side, side) or not len(images):
        raise ValueError(
            f"{paths[0]} has shape {tuple(images.shape)}, expected (n, {side}, {side}) "
            f"with n >= 1. {_AGAIN}"
        )
    if len(labels) != len(images):
        raise ValueError(
            f"{paths[1]} has {len(labels)} labels, expected {len(images)} from "
            f"{paths[0].name}. The two must come from the same source."
        )
    if (largest := int(labels.max())) >= classes:
        raise ValueError(
            f"{paths[1]} has the label {largest}, expected labels below {classes}. "
            f"{_AGAIN}"
        )
    return images.unsqueeze(1), labels


def where_to_put(folder: str | os.PathLike[str]) -> str:
    """Sentence that says where the four files belong."""
    folder, names = (
        Path(folder),
        ", ".join(name for pair in FILES.values() for name in pair),
    )
    return (
        f"Set CPNB_DATA to a folder whose subfolder {folder.name}/ holds the four "
        f"official files {names}."
    )
