"""One panel of the explorer's picture, made once and updated in place."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator

DENSE, MARKER = "#555555", "#e69f00"

Pairs = list[tuple[float, float]]


class Panel:
    """Axes with a title, a marker and a line at its position, all updated in place."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92", lw=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=9)
        # Matplotlib's own number formatting may turn to mathtext.
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.label.set(fontsize=10, parse_math=False)
        axes.xaxis.set_major_locator(
            MaxNLocator(integer=True, min_n_ticks=2, steps=[1, 2, 5, 10])
        )
        self.title = axes.set_title(
            " ", fontsize=10.5, loc="left", parse_math=False, animated=True
        )
        self.position = axes.axvline(0, color="0.75", lw=1, animated=True)
        self.marker = self._line(
            "black", "o", markerfacecolor=MARKER, markersize=9, zorder=5, clip_on=False
        )
        self.lines: list[Line2D] = []
        self.words: dict[Line2D, Text] = {}

    def _line(self, color: str, marker: str, **style: Any) -> Line2D:
        return self.axes.plot(
            [], [], color=color, marker=marker, animated=True, **style
        )[0]

    def line(self, color: str, marker: str) -> Line2D:
        """An empty curve."""
        self.lines.append(self._line(color, marker, markersize=3.5, lw=1.4))
        return self.lines[-1]

    def reference(self, word: str) -> Line2D:
        """A dashed horizontal line with its name, hidden until placed."""
        line = self.axes.axhline(0, color=DENSE, lw=1, ls="--", visible=False)
        self.words[line] = self.axes.text(
            0.995,
            0,
            word,
            transform=self.axes.get_yaxis_transform(),
            ha="right",
            va="bottom",
            fontsize=8.5,
            color=DENSE,
            parse_math=False,
            visible=False,
        )
        return line

    def place(self, line: Line2D, y: float | None) -> None:
        """Move a reference line; None hides it."""
        for artist in (line, self.words[line]):
            artist.set_visible(y is not None)
        if y is not None:
            line.set_ydata([y, y])
            self.words[line].set_y(y)

    def word(self, y: float, color: str, word: str) -> Text:
        """A label in the lower right corner, in the colour of its curve."""
        return self.axes.text(
            0.98,
            y,
            word,
            transform=self.axes.transAxes,
            ha="right",
            fontsize=9,
            color=color,
            parse_math=False,
        )

    def mark(self, x: float, y: float | None) -> None:
        """Move the position, and the marker where the value is known."""
        self.position.set_xdata([x, x])
        set_points(self.marker, [] if y is None else [(x, y)])

    def draw(self) -> None:
        """Draw all that moves on top of the kept pixels."""
        for artist in (self.position, *self.lines, self.marker, self.title):
            self.axes.draw_artist(artist)

    def draw_curves(self) -> None:
        """Draw what changes with what is known, on top of the kept pixels."""
        for line in self.lines:
            self.axes.draw_artist(line)

    def draw_position(self) -> None:
        """Draw what changes with the position; the title is up to the picture."""
        for artist in (self.position, self.marker):
            self.axes.draw_artist(artist)


def set_points(line: Line2D, pairs: Pairs) -> None:
    """Replace what a line shows."""
    line.set_data([x for x, _ in pairs], [y for _, y in pairs])


def with_gaps(pairs: Pairs) -> Pairs:
    """Break a curve where positions in between are unknown."""
    broken = pairs[:1]
    for before, after in pairwise(pairs):
        if after[0] - before[0] > 1.001:
            broken.append((after[0], math.nan))
        broken.append(after)
    return broken
