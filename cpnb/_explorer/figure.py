"""The picture of a rank explorer: three panels, drawn without pyplot."""

from __future__ import annotations

import io
import threading

from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from cpnb._explorer.panel import DENSE, Panel, set_points, with_gaps
from cpnb._explorer.state import (
    ExplorerState,
    accuracy_words,
    decimal,
    label,
)
from cpnb._sweep.points import GLOBAL

BLUE, VERMILION, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#999999"
SIZE, DPI = (10.0, 3.2), 100


class ExplorerFigure:
    """Accuracy and kernel error along one axis, and accuracy against size.

    A marker shows the position in each; the third panel has every known network.

    Every artist is made once and updated in place. What stays the same from frame to
    frame is kept as pixels: the axes, ticks and reference lines of an axis, and on top
    of them the curves. Only positions, markers and titles are drawn for every frame.
    pyplot and mathtext are avoided: both share state between threads, and callbacks run
    on several.

    Attributes:
        figure: The private matplotlib figure, as the last frame left it.
    """

    def __init__(self) -> None:
        """Make the panels, in a look that the notebook's own style does not change."""
        self._lock = threading.Lock()
        self._scene: tuple[object, ...] | None = None
        self._curves: tuple[object, ...] | None = None
        self._scene_pixels = self._pixels = None
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
            ("accuracy (%)", "relative kernel error", "accuracy (%)"),
            strict=True,
        ):
            panel.set_ylabel(name)
        self._accuracy_line = self._accuracy.line(BLUE, "o")
        self._error_line = self._error.line(VERMILION, "s")
        self._known = self._size.line(GREY, ".")
        self._known.set(linestyle="", markersize=3)
        self._front = self._size.line(GREEN, "o")
        # Between two known networks the smaller one is what the reader has.
        self._front.set_drawstyle("steps-post")
        self._whole = self._accuracy.reference("untruncated")
        self._zero = self._error.reference("as far off as a zero kernel")
        dotted = {"color": DENSE, "lw": 0.9, "ls": ":"}
        self._break_even = panels[0].axvline(0, **dotted)
        panels[2].axvline(1, color=DENSE, lw=1, ls="--")
        panels[2].set_xlabel("network parameters ÷ dense")
        panels[2].xaxis.set_major_locator(MaxNLocator(6))
        self._legend = [
            self._size.word(0.12, GREEN, "Pareto front"),
            self._size.word(0.03, DENSE, "all known networks"),
        ]
        for word in self._legend:  # on top of the points, which may lie anywhere
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
            word.set(animated=True, bbox=box)
        title = self._accuracy.title
        size = title.get_fontsize() * DPI / 72
        self._font = ImageFont.truetype(findfont(title.get_fontproperties()), size)

    def png(self, state: ExplorerState) -> bytes:
        """Draw a frame.

        Args:
            state: What to show.

        Returns:
            A PNG image of 1000 × 320 pixels in up to 256 colours.
        """
        with self._lock:
            self._draw_scene(state)
            self._draw_curves(state)
            self._draw_position(state)
            size, pixels = self._canvas.get_width_height(), self._canvas.buffer_rgba()
            image = Image.frombuffer("RGBX", size, pixels, "raw", "RGBX", 0, 1)
            image = image.convert("RGB")
            self._write_titles(image)
        # Few colours pack in a third of the time, into less than half the bytes.
        image = image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        # It rounds down, which white shows.
        image.putpalette(
            [255 if level > 250 else level for level in image.getpalette()]
        )
        buffer = io.BytesIO()
        image.save(buffer, "png", compress_level=1)
        return buffer.getvalue()

    def _draw_scene(self, state: ExplorerState) -> None:
        """Redraw what does not move, if it has changed since the last frame."""
        worst = max((error for _, error in state.error), default=0.0)
        scene = (
            state.axis,
            state.last,
            state.whole_accuracy,
            state.largest,
            max(1.15, 1.1 * worst),
        )
        if scene == self._scene:
            return
        self._scene, self._curves = scene, None
        margin = 0.03 * state.last
        for panel, top in ((self._accuracy, 105.0), (self._error, scene[-1])):
            panel.axes.set_xlim(min(1, state.last - 1) - margin, state.last + margin)
            panel.axes.set_ylim(0, top)
            panel.axes.set_xlabel(
                "components kept in all layers (%)"
                if state.axis == GLOBAL
                else f"rank of {_short(state.axis)}"
            )
        self._size.axes.set_xlim(0, 1.05 * max(1.0, state.largest))
        self._size.axes.set_ylim(0, 105.0)
        whole = state.whole_accuracy
        self._accuracy.place(self._whole, None if whole is None else 100 * whole)
        self._error.place(self._zero, 1.0)
        self._break_even.set_visible(state.break_even is not None)
        if state.break_even is not None:
            self._break_even.set_xdata([state.break_even] * 2)
            words = f"{self._accuracy.axes.get_xlabel()} (break-even, dotted: "
            self._accuracy.axes.set_xlabel(f"{words}{state.break_even})")
        self._canvas.draw()  # leaves out the animated artists
        self._scene_pixels = self._canvas.copy_from_bbox(self.figure.bbox)

    def _draw_curves(self, state: ExplorerState) -> None:
        """Redraw the curves, if what is known has changed since the last frame."""
        curves = (state.accuracy, state.error, state.known)
        if curves == self._curves:
            return
        self._curves = curves
        percents = [(at, 100 * value) for at, value in state.accuracy]
        set_points(self._accuracy_line, with_gaps(percents))
        set_points(self._error_line, with_gaps(state.error))
        set_points(self._known, [(at, 100 * value) for at, value in state.known])
        set_points(self._front, [(at, 100 * value) for at, value in state.front])
        self._canvas.restore_region(self._scene_pixels)
        for panel in (self._accuracy, self._error, self._size):
            panel.draw_curves()
        for word in self._legend:
            self._size.axes.draw_artist(word)
        self._pixels = self._canvas.copy_from_bbox(self.figure.bbox)

    def _draw_position(self, state: ExplorerState) -> None:
        """Draw position and markers on top of the curves, and set the titles."""
        present = state.point.accuracy
        x = state.position
        if state.budget is not None:
            what = f"budget {state.budget} %"
        elif state.axis == GLOBAL:
            what = f"{x} % kept"
        else:
            what = f"{_short(state.axis)} rank {x}"
        self._accuracy.mark(x, None if present is None else 100 * present)
        self._accuracy.title.set_text(f"{what}: {accuracy_words(state)}")
        self._error.mark(x, state.present_error)
        self._error.title.set_text(f"kernel error {decimal(state.present_error)}")
        self._size.mark(state.point.size, None if present is None else 100 * present)
        self._size.title.set_text(f"network {state.point.size:.2f} × dense")
        self._canvas.restore_region(self._pixels)
        for panel in (self._accuracy, self._error, self._size):
            panel.draw_position()

    def _write_titles(self, image: Image.Image) -> None:
        """Write the titles where matplotlib would, at a fifteenth of its time."""
        pen = ImageDraw.Draw(image)
        for panel in (self._accuracy, self._error, self._size):
            place = panel.title.get_transform().transform(panel.title.get_position())
            at = (round(place[0]), image.height - round(place[1]))
            words = panel.title.get_text()
            pen.text(at, words, fill="black", font=self._font, anchor="ls")


def _short(name: str, longest: int = 24) -> str:
    """A layer name that fits a title; the end tells layers apart."""
    name = label(name)
    return name if len(name) <= longest else f"…{name[1 - longest :]}"
