"""Kernels and images as matrices for the eye."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor

SIDE = 40
"""About the most entries of a kernel along one side of its picture."""


def kernel_picture(kernel: Tensor) -> tuple[np.ndarray, str]:
    """A kernel, or its first entries, laid out as a matrix.

    A kernel with two spatial modes becomes a grid of its first slices, with a gap
    between them; of others the first rows and columns of the unfolding are shown.

    Args:
        kernel: Shape ``(out, in, ...)`` with any number of spatial modes.

    Returns:
        The matrix, NaN in the gaps, and what it shows in words.
    """
    kernel = kernel.detach().double().cpu()
    if kernel.ndim < 4 or kernel.shape[-2:] == (1, 1):
        matrix = kernel.flatten(1)
        rows, columns = matrix.shape
        matrix = matrix[:SIDE, :SIDE].numpy()
        shown = f"{matrix.shape[0]} × {matrix.shape[1]}"
        if matrix.size == rows * columns:
            return matrix, f"all {shown} entries"
        return matrix, f"first {shown} of {rows} × {columns} entries"
    slices = kernel.flatten(0, -3).numpy()
    height, width = slices.shape[1:]
    most = max(1, SIDE // (height + 1)) * max(1, SIDE // (width + 1))
    shown = slices[:most]
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    grid = np.full((rows, height + 1, columns, width + 1), np.nan)
    for number, each in enumerate(shown):
        grid[number // columns, :height, number % columns, :width] = each
    grid = grid.reshape(rows * (height + 1), columns * (width + 1))[:-1, :-1]
    which = f"first {len(shown)} of" if len(shown) < len(slices) else "all"
    return grid, f"{which} {len(slices)} slices of {height} × {width}"


def image_picture(image: Tensor) -> np.ndarray | None:
    """An image for the eye, its values stretched from black to white.

    Args:
        image: Shape ``(1 or 3, height, width)``, pixels or standardised.

    Returns:
        From 0 to 1, shape ``(height, width)`` or ``(height, width, 3)``; None for
        anything that is no image.
    """
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        return None
    image = image.detach().cpu().double()
    low, high = image.min(), image.max()
    stretched = (image - low) / (high - low if high > low else 1)
    return stretched.movedim(0, -1).squeeze(-1).numpy()
