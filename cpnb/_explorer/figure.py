"""The picture of a rank explorer: three panels, drawn without pyplot."""

from __future__ import annotations

import io
import threading

import numpy as np
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from cpnb._explorer.panel import DENSE, Panel, set_points, with_gaps
from cpnb._explorer.state import (
    ExplorerState,
    accuracy_words,
    decimal,
    label,
)
from cpnb._sweep.points import GLOBAL

BLUE, VERMILION, GREEN, SKY = "#0072b2", "#d55e00", "#009e73", "#56b4e9"
SIZE, DPI = (10.0, 3.2), 100


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
        """Make the panels, in a look that the notebook's own style does not change."""
        self._lock = threading.Lock()
        self._scene: tuple[object, ...] | None = None
        self._pixels = None
        with style.context("default"):
            self._make_panels()

    def _make_panels(self) -> None:
        self.figure = Figure(SIZE, dpi=DPI, facecolor="white")
        self._canvas = FigureCanvasAgg(self.figure)
        panels = self.figure.subplots(1, 3, width_ratios=[1.5, 1, 1])
        self.figure.subplots_adjust(
            left=0.06, right=0.985, bottom=0.165, top=0.87, wspace=0.27
        )
        self._accuracy, self._error, self._size = map(Panel, panels)
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
        set_points(self._accuracy_line, with_gaps(percents))
        set_points(self._error_line, with_gaps(state.error))
        set_points(self._network_line, state.network_size)
        set_points(self._layer_line, state.layer_size)
        what = (
            f"{x} % kept" if state.axis == GLOBAL else f"{_short(state.axis)} rank {x}"
        )
        self._accuracy.mark(x, None if present is None else 100 * present)
        self._accuracy.title.set_text(f"{what}: {accuracy_words(state)}")
        self._error.mark(x, state.present_error)
        self._error.title.set_text(f"kernel error {decimal(state.present_error)}")
        self._size.mark(x, state.size)
        self._size.title.set_text(f"network {state.size:.2f} × dense")


def _short(name: str, longest: int = 24) -> str:
    """A layer name that fits a title; the end tells layers apart."""
    name = label(name)
    return name if len(name) <= longest else f"…{name[1 - longest :]}"
