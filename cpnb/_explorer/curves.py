"""Choose experiment, methods, measure and axis over records of training curves."""

from __future__ import annotations

import base64
import html
import io
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import ipywidgets
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cpnb._compare.table import percent
from cpnb._explorer.controls import close_previous
from cpnb._figures.courses import AXES, axis_label, course, measure_label
from cpnb._figures.style import styled
from cpnb.comparison import Comparison

MEASURES = ("validation_accuracy", "train_accuracy", "validation_loss", "train_loss")


class CurveFigure:
    """Mean courses with bands, and their names beside them.

    Neither pyplot nor mathtext: both share state between threads.
    """

    def __init__(self) -> None:
        """Make the axes, in a look that the notebook's own style does not change."""
        with style.context("default"):
            self.figure = Figure((10.0, 4.2), dpi=100, facecolor="white")
            self._canvas = FigureCanvasAgg(self.figure)
            self._axes = self.figure.subplots()
        self.figure.subplots_adjust(left=0.07, right=0.72, bottom=0.13, top=0.92)

    def png(
        self, comparison: Comparison, names: Sequence[str], measure: str, axis: str
    ) -> bytes:
        """Draw the methods ``names``, a PNG image of 1000 × 420 pixels."""
        ax, runs = self._axes, comparison.runs()
        ax.clear()
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.92", lw=0.8)
        # Looks are given to all methods, so that a choice does not change them.
        for name, (look, group) in zip(runs, styled(runs), strict=True):
            if name not in names:
                continue
            curve = course(name, group, measure, axis)
            if curve.spread is not None:
                band = curve.mean - curve.spread, curve.mean + curve.spread
                ax.fill_between(curve.x, *band, color=look.color, alpha=0.15, lw=0)
            label = f"{look.label}, n = {curve.count}"
            ax.plot(
                curve.x,
                curve.mean,
                color=look.color,
                marker=look.marker,
                markersize=5,
                lw=1.4,
                label=label,
            )
        ax.set_xlabel(axis_label(axis))
        ax.set_ylabel(f"{measure_label(measure)}, mean ± 1 std")
        if axis == "epoch":
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        share = 100 if measure.endswith("accuracy") else 1
        unit = "%" if share == 100 else ""
        for line, factor, sign in ((ax.xaxis, 1, ""), (ax.yaxis, share, unit)):
            line.set_major_formatter(
                FuncFormatter(lambda value, _, f=factor, s=sign: f"{f * value:g}{s}")
            )
        if names:
            ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False)
        self._canvas.draw()
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png")
        return buffer.getvalue()


class CurveExplorer(ipywidgets.VBox):
    """Menus over the records of comparisons, their curves, and the numbers in words.

    Args:
        results: Comparisons by name, as ``cpnb.experiments.read_results`` gives them;
            those without a tested network are left out.

    Attributes:
        experiment, measure, axis: Menus.
        methods: A box to tick for each method, by name; all are at first.
        image: The picture.
        status: The final numbers of the chosen methods in words.

    Raises:
        ValueError: If there is nothing to show.
    """

    def __init__(self, results: Mapping[str, Comparison]) -> None:
        """Build the menus and show all methods of the first comparison."""
        self._results = {name: one for name, one in results.items() if one.runs()}
        if not self._results:
            raise ValueError(
                "results holds no tested network, expected at least one. Make some "
                "with python -m cpnb.experiments run NAME."
            )
        # Callbacks come from the main thread and from a kernel subshell.
        self._guard = threading.RLock()
        self._painter = CurveFigure()
        self.experiment = _menu("experiment", list(self._results), 420)
        self.measure = _menu("measure", MEASURES, 280)
        self.axis = _menu("against", AXES, 220)
        self.methods: dict[str, ipywidgets.Checkbox] = {}
        self._boxes = ipywidgets.Box(layout={"flex_flow": "row wrap"})
        # No tooltip: the front end of ipywidgets 8.1 fails to draw an image with one.
        self.image = ipywidgets.Image(
            format="png", layout={"width": "1000px", "max_width": "100%"}
        )
        self.status = ipywidgets.HTML()
        menus = ipywidgets.HBox([self.experiment, self.measure, self.axis])
        super().__init__([menus, self._boxes, self.image, self.status])
        self._offer_methods()
        self.experiment.observe(lambda _: self._changed(offer=True), "value")
        for menu in (self.measure, self.axis):
            menu.observe(lambda _: self._changed(), "value")
        self._show()
        close_previous(self)

    @property
    def comparison(self) -> Comparison:
        """The comparison that is shown."""
        return self._results[self.experiment.value]

    @property
    def chosen(self) -> tuple[str, ...]:
        """The methods that are shown."""
        return tuple(name for name, box in self.methods.items() if box.value)

    def close(self) -> None:
        """Remove the widgets from the page."""
        waiting = list(self.children)
        while waiting:
            widget = waiting.pop()
            waiting += getattr(widget, "children", ())
            widget.close()
        super().close()

    def _offer_methods(self) -> None:
        gone, self.methods = (
            self.methods,
            {
                name: ipywidgets.Checkbox(
                    value=True,
                    description=name,
                    indent=False,
                    layout={"width": "190px"},
                )
                for name in self.comparison.runs()
            },
        )
        for box in self.methods.values():
            box.observe(lambda _: self._changed(), "value")
        self._boxes.children = tuple(self.methods.values())
        for box in gone.values():
            box.close()

    def _changed(self, *, offer: bool = False) -> None:
        with self._guard:  # reading, drawing and assigning are one step
            if offer:
                self._offer_methods()
            self._show()

    def _show(self) -> None:
        """Draw and say what is chosen, or say what went wrong."""
        chosen = self.chosen
        try:
            picture = self._painter.png(
                self.comparison, chosen, self.measure.value, self.axis.value
            )
            role, lines = "status", result_lines(self.comparison, chosen)
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
            lines = result_lines(self.comparison, self.chosen)
            name = self.experiment.value
        bundle["text/plain"] = "\n".join([f"CurveExplorer: {name}", *lines])
        return bundle


def result_lines(comparison: Comparison, names: Sequence[str]) -> list[str]:
    """The final numbers of the methods ``names`` in words, the best first."""
    rows = [row for row in comparison.rows() if row["recipe"] in names]
    if not rows:
        return ["No method is chosen."]
    rows.sort(key=lambda row: -row["test"][0])
    return [
        f"{row['recipe']}: test accuracy {percent(row['test'])} (n = {row['n']}), "
        f"rate {row['lr']:g}, {row['seconds']:.1f} s of training"
        + (f", {row['diverged']} diverged" if row["diverged"] else "")
        + "."
        for row in rows
    ]


def _menu(name: str, options: Sequence[str], width: int) -> ipywidgets.Dropdown:
    return ipywidgets.Dropdown(
        options=options, description=name, layout={"width": f"{width}px"}
    )
