"""Figures of small images side by side: kernel slices, and images of a data set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from cpnb._figures.style import INK


def plot_components(
    slices: torch.Tensor, labels: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Kernel slices as images on one scale, red positive and blue negative.

    Args:
        slices: Shape ``(columns, height, width)`` for one row, or ``(rows, columns,
            height, width)``.
        labels: A text above each slice, row by row.
        ax: Axes to draw on.

    Returns:
        The axes; its figure gets one colour bar for all slices.

    Raises:
        ValueError: If the shape is wrong or the number of labels differs.
    """
    values = torch.as_tensor(slices).detach().cpu().double()
    if values.ndim not in (3, 4) or not values.numel():
        raise ValueError(
            f"slices have shape {tuple(values.shape)}, expected (columns, height, "
            "width) or (rows, columns, height, width)."
        )
    columns = values.shape[-3]
    limit = values.abs().max().item() or 1.0
    tiles = values.reshape(-1, *values.shape[-2:]).numpy()
    ax, image = _draw_tiles(ax, tiles, columns, labels, "RdBu_r", (-limit, limit))
    ax.figure.colorbar(image, ax=ax, shrink=0.8, pad=0.02, label="kernel entry")
    return ax


def plot_images(
    images: torch.Tensor,
    labels: Sequence[Any] | None = None,
    columns: int = 10,
    ax: Axes | None = None,
) -> Axes:
    """Images of one channel in rows.

    Args:
        images: Shape ``(n, 1, height, width)`` or ``(n, height, width)``.
        labels: A text or number above each image.
        columns: Images per row.
        ax: Axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: If a shape or number is wrong.
    """
    values = torch.as_tensor(images).detach().cpu().double()
    if values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 3 or not values.numel():
        raise ValueError(
            f"images have shape {tuple(images.shape)}, expected (n, 1, height, width) "
            "or (n, height, width)."
        )
    if columns < 1:
        raise ValueError(f"columns is {columns}, expected at least 1.")
    limits = values.min().item(), values.max().item()
    return _draw_tiles(ax, values.numpy(), columns, labels, "viridis", limits)[0]


def _draw_tiles(
    ax: Axes | None,
    tiles: np.ndarray,
    columns: int,
    labels: Sequence[Any] | None,
    cmap: str,
    limits: tuple[float, float],
) -> tuple[Axes, AxesImage]:
    """Draw tiles, shape (n, height, width), on one axes, a pixel being a unit."""
    count, height, width = tiles.shape
    if labels is not None and len(labels) != count:
        raise ValueError(f"labels has {len(labels)} entries, expected {count}.")
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    gap = 0.12 * max(height, width)
    head = gap if labels is None else 3 * gap
    full_width = columns * (width + gap) - gap
    full_height = rows * (height + head) - head * (labels is None)
    if ax is None:
        shape = full_height / full_width
        figure_width = plt.rcParams["figure.figsize"][0]
        size = figure_width, min(max(0.85 * figure_width * shape, 0.8) + 0.4, 9.0)
        ax = plt.subplots(figsize=size)[1]
    for number, tile in enumerate(tiles):
        left = number % columns * (width + gap)
        top = number // columns * (height + head)
        box = left, left + width, top + height, top
        image = ax.imshow(tile, cmap, vmin=limits[0], vmax=limits[1], extent=box)
        if labels is not None:
            place = left + width / 2, top - 0.3 * gap
            text = str(labels[number])
            ax.text(*place, text, color=INK, ha="center", va="bottom", fontsize="small")
    margin = 0.2 * gap
    ax.set_xlim(-margin, full_width + margin)
    bottom = rows * (height + head) - head
    ax.set_ylim(bottom + margin, -margin if labels is None else -head)
    ax.set_axis_off()
    return ax, image
