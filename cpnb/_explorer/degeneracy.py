"""Slide rank and ridge of a textbook ALS fit: when do its components cancel?"""

from __future__ import annotations

import base64
import html
import io
import math
import threading
from typing import Any

import ipywidgets
import numpy as np
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MultipleLocator, NullFormatter
from PIL import Image
from torch import Tensor

from cpnb._checks import check_decomposable
from cpnb._explorer.controls import Control, close_previous
from cpnb._explorer.degeneracy_state import (
    DegeneracyPoint,
    degeneracy_point,
    status_lines,
)
from cpnb._explorer.panel import Panel, set_points
from cpnb.diagnostics import ENERGY_LIMIT
from cpnb.ranks import resolve_rank

VERMILION, BLUE = "#d55e00", "#0072b2"
RIDGES = (0.0, *(10.0 ** (n / 2) for n in range(-12, -1)))


class DegeneracyFigure:
    """Error of the cut fit, and error against energy of all fits seen.

    Neither pyplot nor mathtext: both share state between threads.
    """

    def __init__(self, max_rank: int) -> None:
        """Make the panels, in a look that the notebook's own style does not change."""
        self._scene, self._pixels = None, None
        with style.context("default"):
            self._make_panels(max_rank)

    def _make_panels(self, max_rank: int) -> None:
        self.figure = Figure((10.0, 3.2), dpi=100, facecolor="white")
        self._canvas = FigureCanvasAgg(self.figure)
        left, right = self.figure.subplots(1, 2)
        self.figure.subplots_adjust(
            left=0.06, right=0.985, bottom=0.165, top=0.87, wspace=0.22
        )
        self._cut, self._energy = Panel(left), Panel(right)
        margin = 0.03 * max_rank
        left.set(xlabel="components kept, largest λ first", ylabel="relative error")
        left.set_xlim(1 - margin, max_rank + margin)
        self._curve = self._cut.line(VERMILION, "")
        self._cut.place(self._cut.reference("as far off as a zero kernel"), 1.0)
        right.set(xlabel="relative error, all components", ylabel="energy Σλ²/‖W‖²")
        right.set_ylim(0.3, 30)
        right.set_yscale("log")  # brings mathtext labels, replaced here
        for axis in (right.xaxis, right.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        right.xaxis.set_major_locator(MultipleLocator(0.2))
        right.set_xlim(-0.03, 1.03)
        self._seen = self._energy.line(BLUE, "o")
        self._seen.set(linestyle="none", alpha=0.5)
        self._energy.place(self._energy.reference("above: degenerate"), ENERGY_LIMIT)

    def png(self, point: DegeneracyPoint, seen: list[DegeneracyPoint]) -> bytes:
        """Draw a frame, a PNG image of 1000 × 320 pixels."""
        meter, errors = point.degeneracy, point.cut_errors
        set_points(self._curve, [*enumerate(errors, 1)])
        self._cut.mark(point.rank, errors[-1])
        self._cut.title.set_text(
            f"rank {point.rank}, ridge {point.ridge:.2g}: error {errors[-1]:.3f}"
        )
        known = [p for p in seen if p.degeneracy.finite]
        pairs = [(p.relative_error, p.degeneracy.energy) for p in known]
        set_points(self._seen, pairs)
        self._energy.mark(point.relative_error, meter.energy)
        self._energy.title.set_text(
            f"energy {meter.energy:.2f}, largest λ/‖W‖ {meter.lam_max:.2f}, "
            f"cancellation {meter.worst_cancellation:.2f}"
        )
        # Limits of all fits seen, in steps: while they stay, so do the axes' pixels.
        worst = max([1.0, *(max(p.cut_errors) for p in known)])
        top = math.ceil(2.2 * worst) / 2
        largest = max([10.0, *(energy for _, energy in pairs)])
        high = 10 ** math.ceil(math.log10(1.5 * largest))
        if self._scene != (top, high):
            self._scene = top, high
            self._cut.axes.set_ylim(0, top)
            self._energy.axes.set_ylim(0.3, high)
            self._canvas.draw()  # leaves out the animated artists
            self._pixels = self._canvas.copy_from_bbox(self.figure.bbox)
        self._canvas.restore_region(self._pixels)
        for panel in (self._cut, self._energy):
            panel.draw()
        image = Image.fromarray(np.asarray(self._canvas.buffer_rgba())[..., :3])
        buffer = io.BytesIO()
        image.save(buffer, "png", compress_level=1)
        return buffer.getvalue()


class DegeneracyExplorer(ipywidgets.VBox):
    """Sliders over rank and ridge of an ALS fit, a picture, and the numbers in words.

    Fits are textbook ALS, 50 sweeps from the same random start. Each is made when its
    position is first visited, inside the callback, and remembered: meant for kernels of
    some thousand entries, whose fits take less than a tenth of a second.

    Args:
        kernel: Any order ≥ 3; it is copied.
        max_rank: Right end of the rank slider, as `cpnb.resolve_rank` takes it.

    Attributes:
        rank, ridge: The sliders.
        image: The picture.
        status: The numbers in words.

    Raises:
        TypeError: If ``kernel`` is not a floating-point tensor or ``max_rank`` no rank.
        ValueError: If ``kernel`` has NaN or infinite entries, or its order is below 3.
    """

    def __init__(self, kernel: Tensor, max_rank: int | float | str = "same") -> None:
        """Build the sliders at the largest rank, without ridge."""
        check_decomposable(kernel)
        if kernel.ndim < 3:
            raise ValueError(
                f"kernel has shape {tuple(kernel.shape)}, expected order 3 or more. A "
                "matrix always has a best fit, its singular value decomposition."
            )
        last = resolve_rank(max_rank, kernel.shape)
        self._kernel = kernel.detach().clone()
        # Callbacks come from the main thread and from a kernel subshell.
        self._guard, self._applying = threading.RLock(), False
        self._points: dict[tuple[int, float], DegeneracyPoint] = {}
        self._painter = DegeneracyFigure(last)
        rank, ridge = _rank_control(last), _ridge_control()
        self.rank, self.ridge = rank.slider, ridge.slider
        self.boxes = {"rank": rank.box, "ridge": ridge.box}
        # No tooltip: the front end of ipywidgets 8.1 fails to draw an image with one.
        self.image = ipywidgets.Image(
            format="png", layout={"width": "1000px", "max_width": "100%"}
        )
        self.status = ipywidgets.HTML()
        rows = [ipywidgets.HBox([c.slider, c.box]) for c in (rank, ridge)]
        super().__init__([*rows, self.image, self.status])
        for control in (rank, ridge):
            for changed, other in (
                (control.slider, control.box),
                (control.box, control.slider),
            ):
                self._follow(changed, other)
        self._show()
        close_previous(self)

    @property
    def point(self) -> DegeneracyPoint:
        """The fit at the present position."""
        with self._guard:
            at = self.rank.value, self.ridge.value
            if at not in self._points:
                self._points[at] = degeneracy_point(self._kernel, *at)
            return self._points[at]

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
            point = self.point
            picture = self._painter.png(point, list(self._points.values()))
            role, lines = "status", status_lines(point)
        except Exception as error:  # nobody sees what a callback raises
            role = "alert"
            lines = [
                f"Failed at rank {self.rank.value}, ridge {self.ridge.value:.2g}.",
                f"{type(error).__name__}: {error}",
            ]
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
        bundle["text/plain"] = "\n".join(["DegeneracyExplorer", *lines])
        return bundle


_SLIDER = {
    "readout": False,
    "style": {"description_width": "80px"},
    "layout": {"width": "640px"},
}
_BOX = {"style": {"description_width": "110px"}, "layout": {"width": "220px"}}


# The sliders have no accessible names of their own; the boxes beside them do.
def _rank_control(last: int) -> Control:
    shared = {"value": last, "min": 1, "max": last, "disabled": last == 1}
    return Control(
        ipywidgets.IntSlider(**shared, description="rank", **_SLIDER),
        ipywidgets.BoundedIntText(**shared, description="rank (number)", **_BOX),
    )


def _ridge_control() -> Control:
    shared = {"options": [(f"{ridge:.2g}", ridge) for ridge in RIDGES]}
    return Control(
        ipywidgets.SelectionSlider(**shared, description="ridge", **_SLIDER),
        ipywidgets.Dropdown(**shared, description="ridge (value)", **_BOX),
    )
