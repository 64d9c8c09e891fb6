"""The loss around a model: lines for slices along one direction, contours for two."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter

from cpnb._diagnostics.landscape import LossSlice
from cpnb._figures.style import axes_or_new, check_any, label_lines, marked, styled


def plot_landscape(
    slices: LossSlice | Mapping[str, LossSlice], ax: Axes | None = None
) -> Axes:
    """The loss along one direction, or over the plane of two.

    Args:
        slices: One slice; or several along one direction each, by method.
        ax: Axes to draw on.

    Returns:
        The axes. Points that were not evaluated stay empty; a plane has logarithmic
        levels and gets a colour bar.

    Raises:
        ValueError: If there is nothing to draw, or a mapping holds a plane.
    """
    if isinstance(slices, LossSlice) and slices.losses.ndim == 2:
        return _plane(slices, axes_or_new(ax))
    lines = {"loss": slices} if isinstance(slices, LossSlice) else slices
    check_any("slices", lines)
    ax, ends = axes_or_new(ax), []
    for number, (style, found) in enumerate(styled(lines)):
        if found.losses.ndim != 1:
            raise ValueError(
                f"slices[{style.label!r}] is a plane, expected a line. Draw each plane "
                "on axes of its own."
            )
        losses = found.losses.numpy()
        ax.plot(
            found.offsets,
            losses,
            color=style.color,
            marker=style.marker,
            markevery=marked(len(losses), number, len(lines)),
            label=style.label,
        )
        known = np.isfinite(losses).nonzero()[0]
        if len(known):
            ends.append((found.offsets[known[-1]], losses[known[-1]], style))
    ax.set_xlabel("offset, in filter norms")
    ax.set_ylabel("cross entropy in nats")
    if not isinstance(slices, LossSlice):
        ax.autoscale_view()  # the labels go by the final limits
        label_lines(ax, ends)
    return ax


def _plane(found: LossSlice, ax: Axes) -> Axes:
    losses = np.ma.masked_invalid(found.losses.numpy())
    low, high = max(losses.min(), 1e-6), max(losses.max(), 2e-6)
    levels = np.geomspace(low, high * (1 + 1e-9), 15)
    norm = LogNorm(low, high)
    # The first direction runs along the rows: upwards.
    grid = found.offsets, found.offsets, losses.clip(low)
    filled = ax.contourf(*grid, levels=levels, norm=norm, cmap="viridis")
    ax.contour(*grid, levels=levels, norm=norm, colors="white", linewidths=0.4)
    ax.plot(0, 0, color="white", marker="+", markersize=9)
    ax.set_aspect("equal")
    ax.locator_params(nbins=5)
    ax.set_xlabel("second direction, in filter norms")
    ax.set_ylabel("first direction, in filter norms")
    bar = ax.figure.colorbar(
        filled,
        ax=ax,
        label="cross entropy in nats",
        ticks=levels[::2],
        format=FuncFormatter(lambda value, _: f"{value:.2g}"),
    )
    bar.minorticks_off()
    return ax
