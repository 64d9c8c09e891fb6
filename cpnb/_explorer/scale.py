"""Slide the spread of the row scales: a table of measurements, seen one by one."""

from __future__ import annotations

import base64
import html
import io
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from PIL import Image

from cpnb._explorer.controls import close_previous
from cpnb._explorer.panel import Panel, set_points
from cpnb._explorer.scale_state import ScalePoint, read_points, status_lines

VERMILION, BLUE = "#d55e00", "#0072b2"
_PANELS = (
    # Title, number as it stands, after the repair, name of the repair.
    ("condition number", "condition", "equilibrated", "rows equilibrated"),
    ("top Hessian eigenvalue", "curvature", "balanced_curvature", "rows balanced"),
    ("accuracy at its best rate", "accuracy", "balanced_accuracy", "rows balanced"),
)


class ScaleFigure:
    """Three panels over the spread: condition, curvature, accuracy.

    Neither pyplot nor mathtext: both share state between threads.
    """

    def __init__(self, points: Sequence[ScalePoint]) -> None:
        """Draw what does not move, in a look that the notebook does not change."""
        with style.context("default"):
            self.figure = Figure((10.0, 3.2), dpi=100, facecolor="white")
            self._canvas = FigureCanvasAgg(self.figure)
            axes = self.figure.subplots(1, 3)
            self.figure.subplots_adjust(
                left=0.07, right=0.99, bottom=0.165, top=0.87, wspace=0.25
            )
            self._panels = [
                self._panel(ax, points, *names)
                for ax, names in zip(axes, _PANELS, strict=True)
            ]
        self._canvas.draw()  # leaves out the animated artists
        self._pixels = self._canvas.copy_from_bbox(self.figure.bbox)

    @staticmethod
    def _panel(
        ax: Axes, points: Sequence[ScalePoint], what: str, plain: str, repaired: str,
        repair: str,
    ) -> Panel:  # fmt: skip
        panel = Panel(ax)
        panel.title.set_text(what)
        ax.set_xlabel("spread of the row scales")
        ax.xaxis.set_major_locator(MaxNLocator(5))
        spreads = [point.spread for point in points]
        margin = 0.04 * (spreads[-1] - spreads[0])
        ax.set_xlim(spreads[0] - margin, spreads[-1] + margin)
        for name, color in ((plain, VERMILION), (repaired, BLUE)):
            values = [getattr(point, name) for point in points]
            set_points(panel.line(color, "o"), list(zip(spreads, values, strict=True)))
            ax.plot(spreads, values, alpha=0)  # an animated line sets no limits
        if plain == "accuracy":
            ax.set_ylim(0, 1.03)
        else:
            ax.set_yscale("log")  # brings mathtext labels, replaced here
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.yaxis.set_minor_formatter(NullFormatter())
        # Where there is room: the first two rise to the right, accuracy falls.
        height = 0.2 if plain == "accuracy" else 0.83
        for y, color, word in (
            (height + 0.09, VERMILION, "as scaled"),
            (height, BLUE, repair),
        ):
            panel.word(y, color, word).set(x=0.05, ha="left")
        return panel

    def png(self, point: ScalePoint) -> bytes:
        """Draw a frame, a PNG image of 1000 × 320 pixels."""
        self._canvas.restore_region(self._pixels)
        for panel, (_, plain, _, _) in zip(self._panels, _PANELS, strict=True):
            panel.mark(point.spread, getattr(point, plain))
            panel.draw()
        image = Image.fromarray(np.asarray(self._canvas.buffer_rgba())[..., :3])
        buffer = io.BytesIO()
        image.save(buffer, "png", compress_level=1)
        return buffer.getvalue()


class ScaleExplorer(ipywidgets.VBox):
    """A slider over the spread of the row scales, a picture, the numbers in words.

    It shows the rows of a finished table; nothing is computed when the slider moves.

    Args:
        rows: One dict per spread, with the keys ``spread``, ``condition``,
            ``equilibrated``, ``curvature``, ``balanced_curvature``, ``accuracy``,
            ``rate`` and ``balanced_accuracy``.

    Attributes:
        spread: The slider.
        box: A list that says the same spread; it has the label for screen readers.
        image: The picture.
        status: The numbers in words.

    Raises:
        ValueError: If there are fewer than two rows, or one is malformed.
    """

    def __init__(self, rows: Sequence[Mapping[str, float]]) -> None:
        """Build the slider at the smallest spread."""
        self._points = read_points(rows)
        self._painter = ScaleFigure(self._points)
        # Callbacks come from the main thread and from a kernel subshell.
        self._guard, self._applying = threading.RLock(), False
        labels = [(f"{p.spread:.2g}", n) for n, p in enumerate(self._points)]
        self.spread = ipywidgets.SelectionSlider(
            options=labels,
            description="spread",
            readout=False,
            style={"description_width": "80px"},
            layout={"width": "640px"},
        )
        # The slider has no accessible name of its own; the list has this label.
        self.box = ipywidgets.Dropdown(
            options=labels,
            description="spread (value)",
            style={"description_width": "110px"},
            layout={"width": "220px"},
        )
        # No tooltip: the front end of ipywidgets 8.1 fails to draw an image with one.
        self.image = ipywidgets.Image(
            format="png", layout={"width": "1000px", "max_width": "100%"}
        )
        self.status = ipywidgets.HTML()
        row = ipywidgets.HBox([self.spread, self.box])
        super().__init__([row, self.image, self.status])
        self._follow(self.spread, self.box)
        self._follow(self.box, self.spread)
        self._show()
        close_previous(self)

    @property
    def point(self) -> ScalePoint:
        """The row at the present position."""
        return self._points[self.spread.value]

    def close(self) -> None:
        """Remove the widgets from the page."""
        for row in self.children:
            for child in getattr(row, "children", ()):
                child.close()
            row.close()
        super().close()

    def _follow(self, changed: Any, other: Any) -> None:
        def moved(_: Any) -> None:
            with self._guard:  # reading, drawing and assigning are one step
                if self._applying:
                    return
                self._applying = True
                try:
                    other.value = changed.value
                finally:
                    self._applying = False
                self._show()

        changed.observe(moved, "value")

    def _show(self) -> None:
        """Draw and say the present position, or say what went wrong."""
        try:
            picture = self._painter.png(self.point)
            role, lines = "status", status_lines(self.point)
        except Exception as error:  # nobody sees what a callback raises
            role, lines = "alert", [f"Failed: {type(error).__name__}: {error}"]
        else:
            self.image.value = picture
        text = "<br>".join(map(html.escape, lines))
        self.status.value = f'<div role="{role}" style="line-height: 1.5">{text}</div>'

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """Add the picture and the words for pages without a kernel."""
        bundle = super()._repr_mimebundle_(**kwargs)
        with self._guard:
            bundle["image/png"] = base64.b64encode(self.image.value).decode()
            lines = status_lines(self.point)
        bundle["text/plain"] = "\n".join(["ScaleExplorer", *lines])
        return bundle
