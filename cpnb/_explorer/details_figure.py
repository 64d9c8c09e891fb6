"""The second picture of a rank explorer: kernels, classes and flipped images."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image

from cpnb._explorer.details import STRIP, Details, flip_words
from cpnb._explorer.state import decimal, label

SIZE, DPI = (10.0, 4.3), 100
BEFORE, AFTER = "#bbbbbb", "#0072b2"
_NAMED_CLASSES = 20  # more do not fit under the bars
_TEXT = {"fontsize": 9.5, "parse_math": False}


class DetailsFigure:
    """A kernel before and after, accuracy by class, and images that flip.

    Every artist is made once. As in the first picture pyplot and mathtext are avoided;
    one thread at a time may draw.

    Args:
        classes: Number of classes.

    Attributes:
        figure: The private matplotlib figure, as the last frame left it.
    """

    def __init__(self, classes: int) -> None:
        """Make the panels, in a look that the notebook's own style does not change."""
        with style.context("default"):
            self.figure = Figure(SIZE, dpi=DPI, facecolor="white")
            self._canvas = FigureCanvasAgg(self.figure)
            self._heading = self.figure.text(0.012, 0.962, "", **_TEXT)
            self._make_kernels()
            self._make_classes(classes)
            self._make_strip()

    def png(self, details: Details, strip: Sequence[np.ndarray]) -> bytes:
        """Draw a frame.

        Args:
            details: What to show.
            strip: Pictures of its first flips, in their order.

        Returns:
            A PNG image of 1000 × 430 pixels.
        """
        ranks = ", ".join(f"{label(name)} {r}" for name, r in details.ranks.items())
        ranks = ranks if len(ranks) <= 90 else f"{ranks[:90]}…"
        self._heading.set_text(
            f"Kernel of {label(details.layer)}, {details.extract}; ranks {ranks}"
        )
        self._draw_kernels(details)
        for bars, heights in zip(
            self._bars, (details.before, details.after), strict=True
        ):
            for bar, height in zip(bars, heights, strict=True):
                bar.set_height(0.0 if np.isnan(height) else 100 * height)
        self._draw_strip(details, strip)
        self._canvas.draw()
        image = Image.fromarray(np.asarray(self._canvas.buffer_rgba())[..., :3])
        buffer = io.BytesIO()
        image.save(buffer, "png", compress_level=1)
        return buffer.getvalue()

    def _make_kernels(self) -> None:
        panels = [
            self.figure.add_axes((0.012 + 0.185 * n, 0.455, 0.17, 0.40))
            for n in range(3)
        ]
        self._kernels = [_empty_image(panel, "RdBu_r") for panel in panels]
        self._titles = [panel.set_title("", **_TEXT) for panel in panels]
        scale = self.figure.add_axes((0.567, 0.455, 0.012, 0.40))
        bar = self.figure.colorbar(self._kernels[0], cax=scale)
        bar.locator = MaxNLocator(5, symmetric=True)
        bar.formatter = FuncFormatter(lambda value, _: f"{value:g}")
        bar.update_ticks()
        scale.tick_params(labelsize=8)

    def _make_classes(self, classes: int) -> None:
        axes = self.figure.add_axes((0.685, 0.475, 0.305, 0.38))
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, 105)
        axes.set_xlim(-0.6, classes - 0.4)
        axes.tick_params(labelsize=8)
        axes.set_ylabel("accuracy (%)", fontsize=9)
        axes.set_xlabel("class", fontsize=9, labelpad=1)
        if classes <= _NAMED_CLASSES:
            axes.set_xticks(range(classes))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        places = np.arange(classes)
        self._bars = [
            axes.bar(places, 0, width, color=color)
            for width, color in ((0.85, BEFORE), (0.45, AFTER))
        ]
        axes.set_title("by class: untruncated (wide), now (narrow)", **_TEXT)

    def _make_strip(self) -> None:
        self._flips = self.figure.text(0.012, 0.335, "", **_TEXT)
        panels = [
            self.figure.add_axes((0.012 + 0.0985 * n, 0.03, 0.0885, 0.205))
            for n in range(STRIP)
        ]
        self._images = [_empty_image(panel, "viridis") for panel in panels]
        self._labels = [panel.set_title("", pad=3, **_TEXT) for panel in panels]

    def _draw_kernels(self, details: Details) -> None:
        limit = max(np.nanmax(np.abs(each)) for each in details.kernels) or 1.0
        titles = "original", "truncated", f"difference, error {decimal(details.error)}"
        for image, title, words, kernel in zip(
            self._kernels, self._titles, titles, details.kernels, strict=True
        ):
            _set_image(image, kernel)
            image.set_clim(-limit, limit)
            title.set_text(words)

    def _draw_strip(self, details: Details, strip: Sequence[np.ndarray]) -> None:
        words = flip_words(details.flips)
        if strip:
            words += "; shown: true class, prediction before → now"
        self._flips.set_text(words)
        for number, (image, title) in enumerate(
            zip(self._images, self._labels, strict=True)
        ):
            image.set_visible(number < len(strip))
            title.set_visible(number < len(strip))
            if number < len(strip):
                flip = details.flips[number]
                _set_image(image, strip[number])
                image.set_clim(0, 1)
                title.set_text(f"{flip.label}: {flip.before} → {flip.after}")


def _empty_image(axes: Axes, cmap: str) -> AxesImage:
    axes.set_axis_off()
    return axes.imshow(np.zeros((1, 1)), cmap, interpolation="nearest", aspect="equal")


def _set_image(image: AxesImage, values: np.ndarray) -> None:
    height, width = values.shape[:2]
    image.set_data(values)
    image.set_extent((-0.5, width - 0.5, height - 0.5, -0.5))
