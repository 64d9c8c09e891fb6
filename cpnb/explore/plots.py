"""Figures: one function per question, one colour and marker per method.

Each function draws on ``ax``, or on a new figure, and returns the axes. Titles are set
by whoever has seen the numbers. No formulas, so that widgets can draw with them, too.
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from cpnb.explore.sweep import RankSweep

__all__ = [
    "METHOD_STYLES", "plot_components", "plot_images", "plot_rank_curve",
    "plot_training", "plot_truncation_panel", "use_style",
]  # fmt: skip

# Okabe and Ito's colours, which the colour-blind tell apart, and two greys.
BLUE, VERMILION, GREEN = "#0072b2", "#d55e00", "#009e73"
PURPLE, ORANGE, SKY = "#cc79a7", "#e69f00", "#56b4e9"
GREY, INK = "#555555", "#333333"


class MethodStyle(NamedTuple):
    """How a method looks in every figure."""

    label: str
    color: str
    marker: str


_TABLE = tomllib.loads(Path(__file__).with_name("styles.toml").read_text("utf-8"))
METHOD_STYLES = {name: MethodStyle(*row) for name, row in _TABLE.items()}
"""The one table of colours and markers, by method; the rank explorer reads it too."""

# For names outside the table, in the order of their appearance.
_FREE = list(zip((BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY), "os^Xvp", strict=True))


def use_style() -> None:
    """Use the style of cpnb for all figures that are drawn from now on."""
    plt.style.use(Path(__file__).with_name("cpnb.mplstyle"))


def plot_training(
    runs: Mapping[str, Any] | pd.DataFrame,
    measure: str = "validation_accuracy",
    ax: Axes | None = None,
    *,
    axis: str = "epoch",
) -> Axes:
    """Draw how the training of each method goes: mean and ± 1 standard deviation.

    Bands of accuracies end at 0 and 1; canonical networks have thick lines.

    Args:
        runs: A `Run`, or several that differ in the seed, by method; or a table of
            curves with the columns ``recipe``, ``seed``, ``epoch`` and the measures.
            Courses of different length are shown over the epochs they share.
        measure: A measure of `Run.history`, such as ``"train_loss"``.
        ax: Axes to draw on.
        axis: ``"epoch"``, or ``"seconds"`` of training, evaluation not counted.
    """
    courses = _courses(runs)
    values = {name: _values(name, each, measure) for name, each in courses.items()}
    ax = ax or plt.subplots()[1]
    for number, (name, style) in enumerate(_styles(values).items()):
        count, epochs = values[name].shape
        style = style._replace(label=f"{style.label}, n = {count}")
        x = np.arange(1, epochs + 1)
        if axis == "seconds":
            x = _values(name, courses[name], "seconds").cumsum(1).mean(0)
        mean = values[name].mean(0)
        if count > 1:
            spread = values[name].std(0, ddof=1)
            band = [mean - spread, mean + spread]
            band = np.clip(band, 0, 1) if measure.endswith("accuracy") else band
            look: dict[str, Any] = {"color": style.color, "alpha": 0.18, "linewidth": 0}
            ax.fill_between(x, *band, **look)
        _draw_line(ax, x, mean, style, number / len(values))
    label = "seconds per epoch" if measure == "seconds" else measure.replace("_", " ")
    label += " in nats" if measure.endswith("loss") else ""
    several = any(len(each) > 1 for each in values.values())
    ax.set_ylabel(label + (", mean ± 1 std" if several else ""))
    ax.set_xlabel("epoch" if axis == "epoch" else "seconds of training")
    if axis == "epoch":
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if measure.endswith("accuracy"):
        ax.yaxis.set_major_formatter(_percent)
    ax.legend()
    return ax


def plot_rank_curve(sweep: RankSweep, layer: str, ax: Axes | None = None) -> Axes:
    """Draw accuracy against the rank of one layer, with the break-even rank.

    Args:
        sweep: The measured ranks, of which each has a marker.
        layer: The axis to show: a layer, or ``"*"`` for all layers together.
        ax: Axes to draw on.
    """
    own = sweep.curve(layer)
    if own.empty:
        axes = ", ".join(map(repr, sweep.table["axis"].unique()))
        raise ValueError(f"layer is {layer!r}, expected an axis of the sweep: {axes}.")
    ax = ax or plt.subplots()[1]
    ranks = own["rank"].to_numpy()
    accuracies = own["accuracy"].to_numpy()
    break_even = own["break_even_rank"].iloc[0]
    size = 2.6 if len(ranks) > 25 else 4.5
    ax.plot(ranks, accuracies, color=BLUE, marker="o", markersize=size, linewidth=1.2)
    ax.axvline(break_even, color=GREY, linestyle="--", linewidth=1.1)
    low = {"xycoords": ("data", "axes fraction"), "color": GREY, "rotation": 90}
    _note(ax, f"break-even: {break_even}", (break_even, 0.04), (-4, 0), **low)
    words = f"{accuracies[-1]:.1%} at rank {ranks[-1]}"
    _note(ax, words, (ranks[-1], accuracies[-1]), (-5, 6), color=BLUE)
    where = "all layers together" if layer == "*" else layer or "the layer"
    ax.set(xlabel=f"rank of {where}", ylabel="accuracy", ylim=(0, 1.15))
    ax.set(xlim=(0, 1.05 * max(ranks[-1], break_even)), yticks=np.linspace(0, 1, 5))
    ax.yaxis.set_major_formatter(_percent)
    return ax


def plot_truncation_panel(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    ax: Axes | None = None,
) -> Axes:
    """Draw kernel errors against the components kept, one line per method.

    A curve above the dashed line is worse than a kernel of zeros.

    Args:
        curves: Components kept and relative errors ``‖W-Ŵ‖/‖W‖`` by method.
        ax: Axes to draw on.
    """
    ax = ax or plt.subplots()[1]
    for number, (name, style) in enumerate(_styles(curves).items()):
        _draw_line(ax, *curves[name], style, number / len(curves))
    ax.axhline(1, color=INK, linestyle="--", linewidth=1.1)
    place = {"xycoords": ("axes fraction", "data"), "color": INK}
    _note(ax, "kernel of zeros", (1, 1), (0, 4), **place)
    ax.set_xlim(left=0)
    ax.set_ylim(0, max(1.15, ax.get_ylim()[1]))
    ax.set(xlabel="components kept", ylabel="relative kernel error ‖W−Ŵ‖ / ‖W‖")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return ax


def plot_components(
    slices: torch.Tensor, labels: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """Draw kernel slices as images on one scale, red positive and blue negative.

    Args:
        slices: Shape ``(columns, height, width)`` for one row, or ``(rows, columns,
            height, width)``.
        labels: A text above each slice, row by row.
        ax: Axes to draw on; its figure gets one colour bar for all slices.
    """
    values = slices.detach().cpu().double()
    limit = values.abs().max().item() or 1.0
    tiles = values.reshape(-1, *values.shape[-2:]).numpy()
    look = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    ax = _draw_tiles(ax, tiles, values.shape[-3], labels, **look)
    ax.figure.colorbar(ax.images[-1], ax=ax, shrink=0.8, pad=0.02, label="kernel entry")
    return ax


def plot_images(
    images: torch.Tensor,
    labels: Sequence[Any] | None = None,
    columns: int = 10,
    ax: Axes | None = None,
) -> Axes:
    """Draw images of one channel in rows.

    Args:
        images: Shape ``(n, 1, height, width)`` or ``(n, height, width)``.
        labels: A text or number above each image.
        columns: Images per row.
        ax: Axes to draw on.
    """
    values = images.detach().cpu().double()
    if values.ndim == 4 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 3:
        raise ValueError(
            f"images have shape {tuple(images.shape)}, expected (n, 1, height, width) "
            "or (n, height, width). Colour images can be averaged: images.mean(1)."
        )
    look = {"vmin": values.min().item(), "vmax": values.max().item()}
    return _draw_tiles(ax, values.numpy(), columns, labels, cmap="viridis", **look)


def _draw_tiles(
    ax: Axes | None, tiles: np.ndarray, columns: int, labels: Any, **look: Any
) -> Axes:
    """Draw tiles, shape (n, height, width), on one axes, a pixel being a unit."""
    count, height, width = tiles.shape
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    gap = 0.12 * max(height, width)
    head = 3 * gap if labels is not None else gap
    full_width = columns * (width + gap) - gap
    bottom = rows * (height + head) - head
    if ax is None:
        figure_width = plt.rcParams["figure.figsize"][0]
        natural = 0.85 * figure_width * (bottom + head * (labels is not None))
        figure_height = min(max(natural / full_width, 0.8) + 0.4, 9.0)
        ax = plt.subplots(figsize=(figure_width, figure_height))[1]
    words: Any = {"ha": "center", "va": "bottom", "fontsize": "small", "color": INK}
    for number, tile in enumerate(tiles):
        left = number % columns * (width + gap)
        top = number // columns * (height + head)
        ax.imshow(tile, extent=(left, left + width, top + height, top), **look)
        if labels is not None:
            place = left + width / 2, top - 0.3 * gap
            ax.text(*place, str(labels[number]), **words)
    margin = 0.2 * gap
    ax.set_xlim(-margin, full_width + margin)
    ax.set_ylim(bottom + margin, -margin if labels is None else -head)
    ax.set_axis_off()
    return ax


def _courses(runs: Mapping[str, Any] | pd.DataFrame) -> dict[str, list[pd.DataFrame]]:
    """The epochs of each run, one table per run, by method."""
    if isinstance(runs, pd.DataFrame):
        return {
            str(name): [course for _, course in own.groupby("seed", sort=False)]
            for name, own in runs.groupby("recipe", sort=False)
        }
    groups = {n: [g] if hasattr(g, "history") else g for n, g in runs.items()}
    return {n: [pd.DataFrame(run.history) for run in g] for n, g in groups.items()}


def _values(name: str, courses: list[pd.DataFrame], column: str) -> np.ndarray:
    """A measure of each run over the epochs they share. Shape ``(runs, epochs)``."""
    epochs = min(map(len, courses))
    columns = [course.reindex(columns=[column])[column] for course in courses]
    values = np.array([numbers[:epochs] for numbers in columns], dtype=float)
    if not epochs or np.isnan(values).any():
        raise ValueError(
            f"runs[{name!r}] lack {column!r}, expected a number for each epoch, at "
            f"least one, of each run; there is {', '.join(courses[0])}."
        )
    return values


def _styles(names: Collection[str]) -> dict[str, MethodStyle]:
    """The style of each name; strangers get colours that are not taken."""
    taken = {METHOD_STYLES[name].color for name in names if name in METHOD_STYLES}
    free = itertools.cycle([pair for pair in _FREE if pair[0] not in taken] or _FREE)
    return {n: METHOD_STYLES.get(n) or MethodStyle(n, *next(free)) for n in names}


def _draw_line(ax: Axes, x: Any, y: Any, style: MethodStyle, phase: float) -> None:
    """Draw a line with a few markers; ``phase`` keeps them apart from other lines'."""
    step = max(1, math.ceil(len(y) / 12))
    (line,) = ax.plot(x, y, color=style.color, marker=style.marker, label=style.label)
    if style.label.startswith("canonical"):
        line.set_linewidth(1.6 * line.get_linewidth())
    line.set_markevery((int(phase * step), step))


def _note(ax: Axes, text: str, at: Any, shift: Any, **look: Any) -> None:
    """Write a text some points away from a place."""
    ax.annotate(text, at, shift, textcoords="offset points", **{"ha": "right", **look})


def _percent(share: float, _: float) -> str:
    return f"{100 * share:g}%"
