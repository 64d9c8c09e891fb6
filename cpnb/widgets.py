"""Slide the ranks of a network and see what each costs: the rank explorer."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator
from typing import Any

import ipywidgets
from matplotlib.figure import Figure
from torch import nn

from cpnb._explorer.controls import (
    Control,
    close_previous,
    percent_control,
    rank_control,
)
from cpnb._explorer.figure import ExplorerFigure
from cpnb._explorer.live import LiveTable
from cpnb._explorer.state import ExplorerState, explorer_state, status_lines
from cpnb._sweep.points import GLOBAL
from cpnb._sweep.table import RankSweep


class RankExplorer(ipywidgets.VBox):
    """Sliders over the ranks of a network, a picture, and the same numbers in words.

    One slider per CP layer and one for all of them. Points of a finished sweep are
    shown at once. With a network and data, other points are measured: the newest
    position first, on a background thread, and its neighbours while nothing is asked.

    Running a notebook cell again closes the explorers that its last run made. The
    network is copied at the start; neither it nor ``sweep`` is changed.

    Args:
        model: The network, or a :class:`RankSweep` to explore without a network.
        data: A data set, of which the validation split is used, or a pair
            ``(images, labels)``. None shows only what is in ``sweep``.
        sweep: A table of this very network, see :func:`rank_sweep`.
        key: Importance that orders the components; None takes that of ``sweep``, or
            ``"lam"``.
        refit: Whether to re-solve λ after each cut; None takes that of ``sweep``, or
            False.
        background: False measures inside the callback: for front ends that do not
            show updates from threads, and for tests.

    Attributes:
        sliders: The sliders by layer name; ``"*"`` is the one for all layers.
        boxes: The number boxes beside them, by the same names.
        image: The picture.
        status: The numbers in words.

    Raises:
        TypeError: If the arguments do not go together.
        ValueError: If ``sweep`` is about another network, other images, another key or
            refit; or if the network cannot be evaluated.
    """

    def __init__(
        self,
        model: nn.Module | RankSweep,
        data: Any = None,
        *,
        sweep: RankSweep | None = None,
        key: str | None = None,
        refit: bool | None = None,
        background: bool = True,
    ) -> None:
        """Build the sliders at full rank and show the first picture."""
        self._live = LiveTable(
            model, data, sweep, key=key, refit=refit, background=background
        )
        self._live.changed, self._live.neighbours = self._show, self._neighbours
        self._painter = ExplorerFigure()
        self._axis, self._applying = GLOBAL, False
        table = self._live.sweep
        controls = {layer.name: rank_control(layer) for layer in table.layers}
        controls[GLOBAL] = percent_control()
        self.sliders = {axis: control.slider for axis, control in controls.items()}
        self.boxes = {axis: control.box for axis, control in controls.items()}
        # No tooltip: the front end of ipywidgets 8.1 fails to draw an image with one.
        self.image = ipywidgets.Image(
            format="png", layout={"width": "1000px", "max_width": "100%"}
        )
        self.status = ipywidgets.HTML()
        rows = [ipywidgets.HBox([c.slider, c.box]) for c in controls.values()]
        super().__init__([*rows, self.image, self.status])
        for axis, control in controls.items():
            self._listen(axis, control)
        self._show()
        close_previous(self)

    @property
    def ranks(self) -> dict[str, int]:
        """Components of every CP layer at the present position."""
        return {name: self.sliders[name].value for name in self._live.sweep.ranks}

    @property
    def accuracy(self) -> float | None:
        """Accuracy at the present position, None while unknown."""
        with self._live.guard:
            return self._live.sweep.point(self.ranks).accuracy

    @property
    def sweep(self) -> RankSweep:
        """A copy of the table with everything measured so far."""
        with self._live.guard:
            return self._live.sweep.copy()

    @property
    def figure(self) -> Figure:
        """The picture as a matplotlib figure; do not draw on it."""
        return self._painter.figure

    def truncated(self) -> nn.Module:
        """The network cut to the present ranks, as :func:`truncate` makes it.

        Raises:
            ValueError: If the explorer was made from a table alone.
        """
        return self._live.truncated(self.ranks)

    def wait(self, timeout: float | None = None) -> float | None:
        """Block until the present position is measured or has failed.

        Args:
            timeout: Seconds; None waits without limit.

        Returns:
            The accuracy, None if it is not known by then.
        """
        self._live.wait(timeout)
        return self.accuracy

    def close(self) -> None:
        """Stop measuring and remove the widgets from the page."""
        if hasattr(self, "_live"):  # a failed construction also comes here
            self._live.close()
        for row in self.children:
            for child in getattr(row, "children", ()):
                child.close()
            row.close()
        super().close()

    def _listen(self, axis: str, control: Control) -> None:
        def follow(changed: Any, other: Any) -> None:
            changed.observe(lambda _: self._moved(axis, changed, other), "value")

        follow(control.slider, control.box)
        follow(control.box, control.slider)

    def _moved(self, axis: str, changed: Any, other: Any) -> None:
        """Bring all controls in line with the one that changed, show, and measure."""
        # Callbacks come from the main thread, a kernel subshell and the worker. Reading
        # the sliders, drawing and assigning is one step, or an old picture lands last.
        with self._live.guard:
            if self._applying:
                return
            self._applying, self._axis = True, axis
            try:
                # Its value now, which another thread may have set since the event.
                other.value = changed.value
                for name, value in self._consequences(axis).items():
                    self.sliders[name].value = self.boxes[name].value = value
            finally:
                self._applying = False
            self._live.visit(self.ranks)
            self._show()

    def _consequences(self, axis: str) -> dict[str, int]:
        """What the other sliders show after one has moved."""
        table = self._live.sweep
        if axis == GLOBAL:
            return table.ranks_at(self.sliders[GLOBAL].value / 100)
        kept = sum(self.ranks.values()) / sum(table.ranks.values())
        return {GLOBAL: max(1, round(100 * kept))}

    def _neighbours(self) -> Iterator[dict[str, int]]:
        """Ranks along the axis moved last, the nearest first."""
        slider = self.sliders[self._axis]
        steps = range(1, slider.max + 1)
        for step in sorted(steps, key=lambda step: abs(step - slider.value)):
            if self._axis == GLOBAL:
                yield self._live.sweep.ranks_at(step / 100)
            else:
                yield {**self.ranks, self._axis: step}

    def _state(self) -> ExplorerState:
        ranks = self.ranks
        return explorer_state(
            self._live.sweep,
            ranks,
            self._axis,
            self.sliders[GLOBAL].value,
            self._live.source(ranks),
        )

    def _show(self) -> None:
        """Draw and say the present position, or say what went wrong."""
        with self._live.guard:
            failure = self._live.failure(self.ranks)
            try:
                state = self._state()
                self.image.value = self._painter.png(state)
                lines = status_lines(state, self._live.sweep)
            except Exception as error:  # nobody sees what a callback raises
                failure = error
            if failure is None:
                self.status.value = _html("status", lines)
            else:
                what = ", ".join(f"{name} {rank}" for name, rank in self.ranks.items())
                words = f"{type(failure).__name__}: {failure}"
                self.status.value = _html("alert", [f"Failed at rank {what}.", words])

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """Add the picture and the words for pages without a kernel."""
        bundle = super()._repr_mimebundle_(**kwargs)
        with self._live.guard:
            bundle["image/png"] = base64.b64encode(self.image.value).decode()
            words = status_lines(self._state(), self._live.sweep)
        bundle["text/plain"] = "\n".join(["RankExplorer", *words])
        return bundle


def _html(role: str, lines: list[str]) -> str:
    text = "<br>".join(map(html.escape, lines))
    return f'<div role="{role}" style="line-height: 1.5">{text}</div>'
