"""Slide the ranks of a network and see what each costs: the rank explorer."""

from __future__ import annotations

import base64
import html
from typing import Any

import ipywidgets
from matplotlib.figure import Figure
from torch import nn

from cpnb._explorer.board import Board
from cpnb._explorer.budget import BUDGET
from cpnb._explorer.code import truncation_code
from cpnb._explorer.controls import close_previous, switches
from cpnb._explorer.details_view import DetailsView
from cpnb._explorer.figure import ExplorerFigure
from cpnb._explorer.live import Job, LiveTable
from cpnb._explorer.state import ExplorerState, explorer_state, status_lines
from cpnb._sweep.points import GLOBAL
from cpnb._sweep.table import RankSweep


class RankExplorer(ipywidgets.VBox):
    """Sliders over the ranks of a network, a picture, and the same numbers in words.

    One slider per CP layer, one for all of them, and one for a budget of parameters
    that :func:`allocate_ranks` spends. Points of a finished sweep are shown at once.
    With a network and data, other points are measured, also for another key or refit:
    the newest position first, on a background thread. When the position rests, its
    details are drawn (a kernel before and after, the accuracy of each class, images
    whose prediction flips) and its neighbours measured.

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
        sliders: The sliders by layer name; ``"*"`` is the one for all layers,
            ``"*budget"`` the budget in percent of the dense parameters.
        boxes: The number boxes beside them, by the same names.
        switches: The choices ``key`` and ``refit``, the buttons ``undo`` and
            ``reset``, and the toggles ``code`` and ``details``.
        image: The picture.
        status: The numbers in words.
        code: The call that makes the network shown, when its toggle is pressed.
        details: Picture and words about the kernel of the layer moved last, the
            classes and single images.

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
        refit: bool | str | None = None,
        background: bool = True,
    ) -> None:
        """Build the controls at full rank and show the first picture."""
        live = self._live = LiveTable(
            model, data, sweep, key=key, refit=refit, background=background
        )
        self._painter = ExplorerFigure()
        self.details = DetailsView(live.network, data)
        self.switches = switches(
            live.choice, measures=live.measures, details=self.details.able
        )
        # Inside the callback the details would be waited for at every step.
        self.switches.details.value = self.details.able and background
        self._board = Board(live, self.switches)
        controls = self._board.controls
        self.sliders = {axis: control.slider for axis, control in controls.items()}
        self.boxes = {axis: control.box for axis, control in controls.items()}
        # No tooltip: the front end of ipywidgets 8.1 fails to draw an image with one.
        self.image = ipywidgets.Image(
            format="png", layout={"width": "1000px", "max_width": "100%"}
        )
        self.status, self.code = ipywidgets.HTML(), ipywidgets.HTML()
        parts = [self.image, self.status, self.code, self.details]
        super().__init__([self.switches.row(), *self._board.rows(), *parts])
        self._board.moved = self._moved
        live.changed, live.neighbours = self._measured, self._board.neighbours
        live.look, live.studied = self._look, self._studied
        live.study = self.details.draw
        for toggle in (self.switches.code, self.switches.details):
            toggle.observe(lambda _: self._toggled(), "value")
        self._toggled()
        close_previous(self)

    @property
    def ranks(self) -> dict[str, int]:
        """Components of every CP layer at the present position."""
        return self._board.ranks

    @property
    def accuracy(self) -> float | None:
        """Accuracy at the present position, None while unknown."""
        with self._live.guard:
            return self._live.sweep.point(self.ranks).accuracy

    @property
    def sweep(self) -> RankSweep:
        """A copy of the table for the present key and refit, with all it knows."""
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

    def _moved(self) -> None:
        """Measure and show the position that the controls agree on."""
        self._live.visit(self.ranks)
        self._show()

    def _measured(self) -> None:
        """Show what has been found out; it may be what a budget needs."""
        if self._board.budget_problem is not None:
            self._board.check_budget()
        self._show()

    def _toggled(self) -> None:
        """Show or hide the code and the details."""
        with self._live.guard:
            for toggle, part in (
                (self.switches.code, self.code),
                (self.switches.details, self.details),
            ):
                part.layout.display = None if toggle.value else "none"
            self._show()
            if self.switches.details.value:
                self._live.visit(self.ranks)

    def _look(self) -> Job | None:
        """What the details lack, None if they are hidden or about this position."""
        job = self._live.job(self.ranks, self._board.layer)
        wanted = self.switches.details.value and job != self.details.shown
        return job if wanted else None

    def _studied(self, job: Job, outcome: Any) -> None:
        """Show details, unless the position has moved on meanwhile."""
        if job == self._look():
            self.details.show(job, outcome)

    def _state(self) -> ExplorerState:
        ranks, axis = self.ranks, self._board.axis
        budget = self._board.value(BUDGET) if axis == BUDGET else None
        return explorer_state(
            self._live.sweep,
            ranks,
            GLOBAL if axis == BUDGET else axis,
            self._board.value(GLOBAL),
            self._live.source(ranks),
            budget=budget,
            known=self._live.known,
        )

    def _words(self, state: ExplorerState) -> list[str]:
        """The status of a frame, with the reason why there is no budget."""
        why = self._board.budget_problem
        return status_lines(state, self._live.sweep) + ([why] if why else [])

    def _show(self) -> None:
        """Draw and say the present position, or say what went wrong."""
        with self._live.guard:
            failure = self._board.problem or self._live.failure(self.ranks)
            try:
                state = self._state()
                self.image.value = self._painter.png(state)
                if self.switches.code.value:
                    self.code.value = self._code(state)
                lines = self._words(state)
            except Exception as error:  # nobody sees what a callback raises
                failure = error
            if failure is None:
                self.status.value = _html("status", lines)
            else:
                what = ", ".join(f"{name} {rank}" for name, rank in self.ranks.items())
                words = f"{type(failure).__name__}: {failure}"
                self.status.value = _html("alert", [f"Failed at rank {what}.", words])

    def _code(self, state: ExplorerState) -> str:
        """The call that makes the network of a frame, to be copied."""
        choice, point = self._live.choice, state.point
        # With a network, a table of another draw was refused.
        drawn = choice.key == "random" and self._live.network is None
        code = truncation_code(point.ranks, choice, point.accuracy, drawn=drawn)
        return (
            '<textarea readonly aria-label="code of this network" rows="4" '
            'onfocus="this.select()" style="width: 100%; '
            'box-sizing: border-box; font-family: monospace">'
            f"{html.escape(code)}</textarea>"
        )

    def _repr_mimebundle_(self, **kwargs: Any) -> dict[str, Any]:
        """Add the picture and the words for pages without a kernel."""
        bundle = super()._repr_mimebundle_(**kwargs)
        with self._live.guard:
            bundle["image/png"] = base64.b64encode(self.image.value).decode()
            words = self._words(self._state())
        bundle["text/plain"] = "\n".join(["RankExplorer", *words])
        return bundle


def _html(role: str, lines: list[str]) -> str:
    text = "<br>".join(map(html.escape, lines))
    return f'<div role="{role}" style="line-height: 1.5">{text}</div>'
