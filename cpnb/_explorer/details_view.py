"""The second part of a rank explorer: pictures of what a cut does, and their words."""

from __future__ import annotations

import copy
import html
from typing import Any

import ipywidgets
from torch import nn

from cpnb._explorer.details import Details, Observer, details_lines
from cpnb._explorer.details_figure import DetailsFigure
from cpnb._explorer.live import Job


class DetailsView(ipywidgets.VBox):
    """Shows :class:`Details`; drawn on the thread that measures.

    Args:
        network: The untruncated network, None without one.
        data: What it is measured on, None without it.

    Attributes:
        image: The picture.
        words: The same in words.
        shown: What was shown last, None before.
    """

    def __init__(self, network: nn.Module | None, data: Any) -> None:
        """Keep what is needed; nothing is evaluated or drawn yet."""
        able = network is not None and data is not None
        # A copy, because it is evaluated on another thread than others copy it on.
        self._observer = Observer(copy.deepcopy(network), data) if able else None
        self._figure: DetailsFigure | None = None
        self.shown: Job | None = None
        # No tooltip: the front end of ipywidgets 8.1 fails to draw an image with one.
        self.image = ipywidgets.Image(
            format="png", layout={"width": "1000px", "max_width": "100%"}
        )
        self.words = ipywidgets.HTML(_html(["Details are being drawn."]))
        self.image.layout.display = "none"
        super().__init__([self.image, self.words])

    @property
    def able(self) -> bool:
        """Whether there is a network and data to look into."""
        return self._observer is not None

    def draw(self, job: Job, truncated: nn.Module) -> tuple[Details, bytes]:
        """Compare the truncated network with the whole one and draw it; slow.

        Args:
            job: What to look into.
            truncated: The network cut as the job says.

        Returns:
            What is to show, and its picture.
        """
        details = self._observer.details(truncated, job.layer)
        if self._figure is None:
            self._figure = DetailsFigure(len(details.before))
        return details, self._figure.png(details, self._observer.strip(details))

    def show(self, job: Job, outcome: tuple[Details, bytes] | Exception) -> None:
        """Put what :meth:`draw` made on the page, or say why it failed."""
        self.shown = job
        if isinstance(outcome, Exception):
            words = [f"Details failed: {type(outcome).__name__}: {outcome}"]
            self.words.value = _html(words)
            self.image.layout.display = "none"
            return
        details, self.image.value = outcome
        self.image.layout.display = None
        self.words.value = _html(details_lines(details))

    def close(self) -> None:
        """Remove the widgets from the page."""
        for child in self.children:
            child.close()
        super().close()


def _html(lines: list[str]) -> str:
    text = "<br>".join(map(html.escape, lines))
    role = 'role="group" aria-label="details"'
    return f'<div {role} style="line-height: 1.5">{text}</div>'
