"""The picture of a rank explorer: three panels, drawn without pyplot."""

from __future__ import annotations

import io
import math
import threading
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from cpnb.explorer_state import (
    ExplorerState,
    accuracy_words,
    decimal,
    label,
)
from cpnb.sweep_points import GLOBAL

BLUE, VERMILION, GREEN, SKY, ORANGE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#56b4e9",
    "#e69f00",
)
DENSE = "#555555"
SIZE, DPI = (10.0, 3.2), 100

Pairs = list[tuple[float, float]]


class ExplorerFigure:
    """Accuracy, kernel error and size along one axis, with a marker at the position.

    Every artist is made once and updated in place. What stays the same from frame to
    frame (axes, ticks, reference lines) is drawn once per axis and kept as pixels, and
    only lines, markers and titles are drawn on top. pyplot and mathtext are avoided:
    both share state between threads, and callbacks run on several.

    Attributes:
        figure: The private matplotlib figure, as the last frame left it.
    """

    def __init__(self) -> None:
        """Make the panels."""
        self._lock = threading.Lock()
        self._scene: tuple[object, ...] | None = None
        self._pixels = None
        self.figure = Figure(SIZE, dpi=DPI, facecolor="white")
        self._canvas = FigureCanvasAgg(self.figure)
        panels = self.figure.subplots(1, 3, width_ratios=[1.5, 1, 1])
        self.figure.subplots_adjust(
            left=0.06, right=0.985, bottom=0.165, top=0.87, wspace=0.27
        )
        self._accuracy, self._error, self._size = map(_Panel, panels)
        for panel, name in zip(
            panels,
            ("accuracy (%)", "relative kernel error", "parameters ÷ dense"),
            strict=True,
        ):
            panel.set_ylabel(name)
        self._accuracy_line = self._accuracy.line(BLUE, "o")
        self._error_line = self._error.line(VERMILION, "s")
        self._layer_line = self._size.line(SKY, "")
        self._network_line = self._size.line(GREEN, "")
        self._whole = self._accuracy.reference("untruncated")
        self._zero = self._error.reference("as far off as a zero kernel")
        self._parity = self._size.reference("dense")
        self._break_even = panels[2].axvline(0, color=DENSE, lw=0.8, ls=":")
        self._size.word(0.11, GREEN, "network")
        self._layer_word = self._size.word(0.03, SKY, "layer alone")

    def png(self, state: ExplorerState) -> bytes:
        """Draw a frame.

        Args:
            state: What to show.

        Returns:
            A PNG image of 1000 × 320 pixels.
        """
        with self._lock:
            self._draw_scene(state)
            self._update(state)
            self._canvas.restore_region(self._pixels)
            for panel in (self._accuracy, self._error, self._size):
                panel.draw()
            image = Image.fromarray(np.asarray(self._canvas.buffer_rgba())[..., :3])
        buffer = io.BytesIO()
        image.save(buffer, "png", compress_level=1)
        return buffer.getvalue()

    def _draw_scene(self, state: ExplorerState) -> None:
        """Redraw what does not move, if it has changed since the last frame."""
        worst = max((error for _, error in state.error), default=0.0)
        largest = max(size for _, size in state.network_size + state.layer_size)
        scene = (
            state.axis,
            state.last,
            state.whole_accuracy,
            max(1.15, 1.1 * worst),
            max(1.15, 1.1 * largest),
        )
        if scene == self._scene:
            return
        *_, error_top, size_top = self._scene = scene
        everywhere = state.axis == GLOBAL
        for panel, top in (
            (self._accuracy, 105.0),
            (self._error, error_top),
            (self._size, size_top),
        ):
            margin = 0.03 * state.last
            panel.axes.set_xlim(min(1, state.last - 1) - margin, state.last + margin)
            panel.axes.set_ylim(0, top)
            panel.axes.set_xlabel(
                "components kept in all layers (%)"
                if everywhere
                else f"rank of {_short(state.axis)}"
            )
        whole = state.whole_accuracy
        self._accuracy.place(self._whole, None if whole is None else 100 * whole)
        self._error.place(self._zero, 1.0)
        self._size.place(self._parity, 1.0)
        self._break_even.set_visible(not everywhere)
        self._break_even.set_xdata([state.break_even or 0] * 2)
        self._layer_word.set_visible(not everywhere)
        if not everywhere:
            name = self._size.axes.get_xlabel()
            self._size.axes.set_xlabel(f"{name} (break-even {state.break_even})")
        self._canvas.draw()  # leaves out the animated artists
        self._pixels = self._canvas.copy_from_bbox(self.figure.bbox)

    def _update(self, state: ExplorerState) -> None:
        """Move the lines, markers and titles."""
        present = state.point.accuracy
        x = state.position
        percents = [(at, 100 * value) for at, value in state.accuracy]
        _set(self._accuracy_line, _with_gaps(percents))
        _set(self._error_line, _with_gaps(state.error))
        _set(self._network_line, state.network_size)
        _set(self._layer_line, state.layer_size)
        what = (
            f"{x} % kept" if state.axis == GLOBAL else f"{_short(state.axis)} rank {x}"
        )
        self._accuracy.mark(x, None if present is None else 100 * present)
        self._accuracy.title.set_text(f"{what}: {accuracy_words(state)}")
        self._error.mark(x, state.present_error)
        self._error.title.set_text(f"kernel error {decimal(state.present_error)}")
        self._size.mark(x, state.size)
        self._size.title.set_text(f"network {state.size:.2f} × dense")


class _Panel:
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
            "black", "o", markerfacecolor=ORANGE, markersize=9, zorder=5, clip_on=False
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
        _set(self.marker, [] if y is None else [(x, y)])

    def draw(self) -> None:
        """Draw what moves on top of the kept pixels."""
        for artist in (self.position, *self.lines, self.marker, self.title):
            self.axes.draw_artist(artist)


def _set(line: Line2D, pairs: Pairs) -> None:
    line.set_data([x for x, _ in pairs], [y for _, y in pairs])


def _with_gaps(pairs: Pairs) -> Pairs:
    """Break a curve where positions in between are unknown."""
    broken = pairs[:1]
    for before, after in pairwise(pairs):
        if after[0] - before[0] > 1.001:
            broken.append((after[0], math.nan))
        broken.append(after)
    return broken


def _short(name: str, longest: int = 24) -> str:
    """A layer name that fits a title; the end tells layers apart."""
    name = label(name)
    return name if len(name) <= longest else f"…{name[1 - longest :]}"
