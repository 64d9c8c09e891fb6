"""Figures about ranks: accuracy, kernel error and component weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from cpnb._figures.style import (
    BLUE,
    GREY,
    INK,
    axes_or_new,
    check_any,
    label_lines,
    marked,
    percent,
    styled,
)


def plot_rank_curve(
    rows: Iterable[Mapping[str, Any]], layer: str, ax: Axes | None = None
) -> Axes:
    """Accuracy against the rank of one layer, with the break-even rank.

    Every measured rank has a marker; ranks that were not measured have none.

    Args:
        rows: ``RankSweep.to_rows()``, or dicts with ``layer``, ``rank``, ``accuracy``,
            ``parameters`` and ``dense_parameters``.
        layer: The layer to show; ``"*"`` for all layers together.
        ax: Axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: If no row of ``layer`` holds an accuracy.
    """
    rows = list(rows)
    own = [row for row in rows if row["layer"] == layer]
    points = sorted(
        (row["rank"], row["accuracy"]) for row in own if row["accuracy"] is not None
    )
    if not points:
        known = ", ".join(dict.fromkeys(repr(row["layer"]) for row in rows)) or "none"
        raise ValueError(
            f"rows hold no accuracy for layer {layer!r}; the layers there are: {known}."
        )
    ax = axes_or_new(ax)
    ranks, accuracies = zip(*points, strict=True)
    size = 2.6 if len(ranks) > 25 else 4.5
    ax.plot(ranks, accuracies, color=BLUE, marker="o", markersize=size, linewidth=1.2)
    break_even = _break_even(own)
    ax.set_xlim(0, 1.05 * max(ranks[-1], break_even or 0))
    ax.set_ylim(0, 1.15)
    if break_even is not None:
        ax.axvline(break_even, color=GREY, linestyle="--", linewidth=1.1)
        ax.annotate(
            f"break-even: {break_even:.4g}",
            (break_even, 0.04),
            (-4, 0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            color=GREY,
            rotation=90,
            ha="right",
        )
    ax.annotate(
        f"{accuracies[-1]:.1%} at rank {ranks[-1]}",
        (ranks[-1], accuracies[-1]),
        (-5, 6),
        textcoords="offset points",
        color=BLUE,
        ha="right",
    )
    where = "all layers together" if layer == "*" else layer or "the layer"
    ax.set_xlabel(f"rank of {where}")
    ax.set_ylabel("accuracy")
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
    ax.yaxis.set_major_formatter(percent)
    return ax


def plot_truncation_panel(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    ax: Axes | None = None,
) -> Axes:
    """Kernel error against the number of components kept, one line per method.

    The dashed line is the error of a kernel of zeros: a curve above it makes things
    worse than leaving the layer's kernel out.

    Args:
        curves: Components kept and relative errors ``‖W-Ŵ‖/‖W‖`` by method, in the
            order of the components.
        ax: Axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: If there is nothing to draw, or a curve's lengths differ.
    """
    check_any("curves", curves)
    for name, (kept, errors) in curves.items():
        if len(kept) != len(errors) or not len(kept):
            raise ValueError(
                f"curves[{name!r}] has {len(kept)} ranks and {len(errors)} errors, "
                "expected as many of each, at least one."
            )
    ax = axes_or_new(ax)
    for number, (style, (kept, errors)) in enumerate(styled(curves)):
        ax.plot(
            kept,
            errors,
            color=style.color,
            marker=style.marker,
            markevery=marked(len(kept), number, len(curves)),
            label=style.label,
        )
    ax.axhline(1, color=INK, linestyle="--", linewidth=1.1)
    ax.annotate(
        "kernel of zeros",
        (1, 1),
        (0, 4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        color=INK,
        ha="right",
    )
    ax.set_xlim(left=0)
    ax.set_ylim(0, max(1.15, ax.get_ylim()[1]))
    ax.set_xlabel("components kept")
    ax.set_ylabel("relative kernel error ‖W−Ŵ‖ / ‖W‖")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return ax


def plot_lambda_spectrum(layers: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Sizes of the component weights of each layer, largest first.

    Args:
        layers: CP layers, or tensors λ of shape ``(rank,)``, by name.
        ax: Axes to draw on.

    Returns:
        The axes; sizes are relative to the layer's largest.

    Raises:
        ValueError: If there is nothing to draw.
    """
    check_any("layers", layers)
    ax, ends = axes_or_new(ax), []
    for number, (style, layer) in enumerate(styled(layers)):
        lam = torch.as_tensor(getattr(layer, "lam", layer)).detach().abs().double()
        sizes = (lam / lam.max()).nan_to_num().sort(descending=True).values.cpu()
        style = style._replace(label=f"{style.label}, rank {len(sizes)}")
        ax.plot(
            torch.arange(1, len(sizes) + 1) / len(sizes),
            sizes,
            color=style.color,
            marker=style.marker,
            markevery=marked(len(sizes), number, len(layers)),
            label=style.label,
        )
        ends.append((1.0, sizes[-1].item(), style))
    ax.set_xlim(0, 1.02)
    ax.set_ylim(0, 1.05)
    ax.set_xlabel("share of the components, largest first")
    ax.xaxis.set_major_formatter(percent)
    ax.set_ylabel("|λ| relative to the largest")
    label_lines(ax, ends)
    return ax


def _break_even(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Rank with as many parameters as the dense layer, counts being linear in rank."""
    if (known := rows[0].get("break_even_rank")) is not None:
        return known
    first, last = (choose(rows, key=lambda row: row["rank"]) for choose in (min, max))
    if first["rank"] == last["rank"]:
        return None
    slope = last["parameters"] - first["parameters"]
    slope /= last["rank"] - first["rank"]
    missing = first["dense_parameters"] - first["parameters"]
    return math.ceil(first["rank"] + missing / slope)
