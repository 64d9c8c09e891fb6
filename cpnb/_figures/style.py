"""How figures look: the style sheet, the table of methods, labels at line ends."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import as_file, files
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

BLUE, VERMILION, GREEN = "#0072b2", "#d55e00", "#009e73"
PURPLE, ORANGE, SKY = "#cc79a7", "#e69f00", "#56b4e9"
GREY, INK = "#555555", "#333333"


class MethodStyle(NamedTuple):
    """How a method looks in every figure."""

    label: str
    color: str
    marker: str


METHOD_STYLES = {
    # How a network is parametrised or normalised: one colour for each kin.
    "dense": MethodStyle("dense", GREY, "D"),
    "none": MethodStyle("none", GREY, "D"),
    "batch": MethodStyle("batch norm", GREEN, "^"),
    "group": MethodStyle("group norm", GREEN, "v"),
    "layer": MethodStyle("layer norm", GREEN, "P"),
    "weight": MethodStyle("weight norm", VERMILION, "s"),
    "weight_data_init": MethodStyle("weight norm, data init", VERMILION, "d"),
    "conditioned": MethodStyle("conditioned", ORANGE, "X"),
    "scaling": MethodStyle("scaling (SBWN)", ORANGE, "v"),
    "standardized": MethodStyle("standardized", SKY, "^"),
    "centered": MethodStyle("centered weight norm", SKY, "v"),
    "spectral": MethodStyle("spectral norm", PURPLE, "X"),
    "orthogonal": MethodStyle("orthogonal", PURPLE, "P"),
    "oni": MethodStyle("ONI", PURPLE, "p"),
    "canonical": MethodStyle("canonical (CP)", BLUE, "o"),
    # Where a canonical network starts.
    "canonical-unified": MethodStyle("canonical, unified", BLUE, "o"),
    "canonical-gaussian": MethodStyle("canonical, Gaussian", BLUE, "^"),
    "canonical-uniform": MethodStyle("canonical, uniform", BLUE, "v"),
    "canonical-power": MethodStyle("canonical, power", BLUE, "s"),
    # How a layer is factorised.
    "low-rank": MethodStyle("low-rank", VERMILION, "v"),
    "SI": MethodStyle("spectral init", ORANGE, "<"),
    "FD": MethodStyle("Frobenius decay", PURPLE, ">"),
    "SI+FD": MethodStyle("spectral init + Frobenius decay", GREEN, "P"),
    "CP": MethodStyle("CP", BLUE, "o"),
    "CP+FD": MethodStyle("CP + Frobenius decay", SKY, "*"),
    # How components are dropped.
    "lam": MethodStyle("top |λ|", VERMILION, "v"),
    "lam+refit": MethodStyle("top |λ| + refit", ORANGE, "^"),
    "greedy": MethodStyle("greedy", SKY, "<"),
    "greedy+refit": MethodStyle("greedy + refit", BLUE, ">"),
    "fresh": MethodStyle("fresh fit", GREEN, "P"),
    # What orders them, beside "lam" and "greedy".
    "gradient": MethodStyle("gradient", GREEN, "^"),
    "hessian": MethodStyle("Hessian", PURPLE, "X"),
    "activation": MethodStyle("activation", ORANGE, "P"),
    "random": MethodStyle("random", GREY, "D"),
}
"""The one table of colours and markers, by method."""

# For names outside the table, in the order of their appearance.
_FREE = ((BLUE, "o"), (VERMILION, "s"), (GREEN, "^"), (PURPLE, "X"), (ORANGE, "v"),
         (SKY, "p"))  # fmt: skip


def use_style() -> None:
    """Use the style of cpnb for all figures that are drawn from now on."""
    with as_file(files("cpnb") / "cpnb.mplstyle") as path:
        plt.style.use(path)


def axes_or_new(ax: Axes | None) -> Axes:
    """The axes given, or those of a new figure."""
    return plt.subplots()[1] if ax is None else ax


def styled(curves: Mapping[str, Any]) -> Iterator[tuple[MethodStyle, Any]]:
    """Each curve with the style of its name; strangers get colours not yet taken."""
    known = [METHOD_STYLES[name] for name in curves if name in METHOD_STYLES]
    taken = {style.color for style in known}
    free = [pair for pair in _FREE if pair[0] not in taken] or list(_FREE)
    strangers = [name for name in curves if name not in METHOD_STYLES]
    for name, curve in curves.items():
        if name in METHOD_STYLES:
            yield METHOD_STYLES[name], curve
        else:
            color, marker = free[strangers.index(name) % len(free)]
            yield MethodStyle(name, color, marker), curve


def label_lines(ax: Axes, ends: Sequence[tuple[float, float, MethodStyle]]) -> None:
    """Write the labels of up to three lines beside their ends, else a legend.

    Args:
        ax: Axes with the lines; their limits are final.
        ends: Last point and style of each line.
    """
    if len(ends) > 3:
        ax.legend()
        return
    # Labels keep one line of text apart, around where their lines end.
    height = 72 * ax.figure.get_size_inches()[1] * ax.get_position().height
    gap = 1.25 * plt.rcParams["font.size"]
    to_points = ax.transData + ax.transAxes.inverted()
    natural = [height * to_points.transform((x, y))[1] for x, y, _ in ends]
    order = sorted(range(len(ends)), key=natural.__getitem__)
    spread = [natural[i] for i in order]
    for upper in range(1, len(spread)):
        spread[upper] = max(spread[upper], spread[upper - 1] + gap)
    shift = sum(spread) / len(spread) - sum(natural) / len(natural)
    shift = max(shift, spread[-1] - height)
    for position, i in zip(spread, order, strict=True):
        _, y, style = ends[i]
        ax.annotate(
            style.label,
            (1, y),
            (5, position - shift - natural[i]),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color=style.color,
            va="center",
            annotation_clip=False,
        )


def marked(points: int, number: int, curves: int) -> tuple[int, int]:
    """First marker and distance: curves on top of each other stay countable."""
    step = max(1, math.ceil(points / 12))
    return number * step // curves, step


def percent(share: float, _: int | None = None) -> str:
    """A share as tick label."""
    return f"{100 * share:g}%"


def check_any(name: str, curves: Mapping[str, Any]) -> None:
    """Refuse a figure without a curve."""
    if not curves:
        raise ValueError(f"{name} is empty, expected at least one curve to draw.")
