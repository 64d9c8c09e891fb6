"""Read the official files of MNIST and Fashion-MNIST: four gzipped idx files each."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cpnb._data.sources import AGAIN

_UNSIGNED_BYTE = 0x08
_SIDE, _CLASSES = 28, 10


def read_idx(path: Path, ndim: int) -> Tensor:
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
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path} is truncated or corrupt ({error}), expected a gzip file. {AGAIN}"
        ) from error
    header = 4 + 4 * ndim
    if len(content) < header or content[:4] != bytes((0, 0, _UNSIGNED_BYTE, ndim)):
        raise ValueError(
            f"{path} starts with {content[:4].hex(' ') or 'nothing'}, expected "
            f"00 00 08 {ndim:02x}: unsigned bytes with {ndim} axes. {AGAIN}"
        )
    shape = [int.from_bytes(content[i : i + 4]) for i in range(4, header, 4)]
    if len(content) - header != math.prod(shape):
        raise ValueError(
            f"{path} holds {len(content) - header} bytes of data, expected "
            f"{math.prod(shape)} from its shape {tuple(shape)}. {AGAIN}"
        )
    # bytearray, because torch warns about memory that it may not write to.
    values = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    return values[header:].reshape(shape)


def read_mnist(folder: Path, files: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Read the training and the test part, from two files each."""
    paths = [folder / name for name in files]
    return [read_pair(*paths[:2]), read_pair(*paths[2:])]


def read_pair(images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
    """Read the images and labels of one official part, and check that they fit.

    Args:
        images_path: File of the images.
        labels_path: File of their labels.

    Returns:
        Pixels from 0 to 255, uint8, shape ``(n, 1, 28, 28)``; labels, int64, shape
        ``(n,)``.

    Raises:
        ValueError: If a file is damaged or does not fit; the message names it.
    """
    images, labels = read_idx(images_path, ndim=3), read_idx(labels_path, ndim=1).long()
    if tuple(images.shape[1:]) != (_SIDE, _SIDE) or not len(images):
        raise ValueError(
            f"{images_path} has shape {tuple(images.shape)}, expected (n, {_SIDE}, "
            f"{_SIDE}) with n >= 1. {AGAIN}"
        )
    if len(labels) != len(images):
        raise ValueError(
            f"{labels_path} has {len(labels)} labels, expected {len(images)} from "
            f"{images_path.name}. The two must come from the same source."
        )
    if (largest := int(labels.max())) >= _CLASSES:
        raise ValueError(
            f"{labels_path} has the label {largest}, expected labels below {_CLASSES}. "
            f"{AGAIN}"
        )
    return images.unsqueeze(1), labels
