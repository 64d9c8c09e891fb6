"""A drawing function with sliders: `explore`."""

from __future__ import annotations

import base64
import html
import io
import threading
import weakref
from collections.abc import Callable
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

try:
    import ipywidgets
    import traitlets
    from IPython.core.getipython import get_ipython
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'Sliders need {error.name}. Install it with pip install "cpnb[notebooks]".'
    ) from error

__all__ = ["explore"]


def explore(draw: Callable[..., str | None], **controls: Any) -> Explorer:
    """Put controls over a picture that a function draws anew when one of them moves.

    Args:
        draw: Called as ``draw(figure, **values)`` with an empty figure of 10 × 3.2
            inches; returns what it says in words. Front ends call it on another thread:
            it must use neither ``plt`` nor formulas, which logarithmic axes have, too.
        **controls: By name. Numbers, a list or a ``range``, become a slider that stops
            at each of them, anything else a menu, both at the first; True or False
            becomes a box to tick; a widget is taken as it is.

    >>> def draw(figure, rank, method):
    ...     figure.subplots().plot(range(rank))
    ...     return f"{method}, rank {rank}"
    >>> explorer = explore(draw, rank=range(1, 85), method=["power", "als"])
    >>> explorer.controls["rank"].value = 42
    >>> explorer.words
    'power, rank 42'
    """
    return Explorer(draw, controls)


class Explorer(ipywidgets.VBox):
    """Controls, by name, picture and words; running the cell again closes it."""

    def __init__(self, draw: Callable[..., str | None], controls: dict[str, Any]):
        self._draw = draw
        self._lock = threading.RLock()
        self._drawn: dict[str, Any] | None = None
        self.words = ""  # what the drawing function said last, or what went wrong
        self.controls = {name: _control(name, each) for name, each in controls.items()}
        # No tooltip: the front end of ipywidgets 8.1 fails to draw an image with one.
        self.image = ipywidgets.Image(format="png", layout={"max_width": "100%"})
        self.status = ipywidgets.HTML()
        rows = map(_named, self.controls.values())
        super().__init__([*rows, self.image, self.status])
        for control in self.controls.values():
            control.observe(lambda _: self._show(), "value")
        self._show()
        close_previous(self)

    def _show(self) -> None:
        """Draw the present values: read inside the lock, so that the newest win."""
        with self._lock:
            values = {name: control.value for name, control in self.controls.items()}
            if values == self._drawn:
                return
            self._drawn = values
            role = "status"
            try:
                figure = Figure((10.0, 3.2), dpi=100, layout="constrained")
                self.words = self._draw(figure, **values) or ""
                buffer = io.BytesIO()
                FigureCanvasAgg(figure).print_png(buffer)
                self.image.value = buffer.getvalue()
            except Exception as error:  # nobody sees what a callback raises
                role = "alert"
                self.words = f"{type(error).__name__}: {error}"
            self.status.value = f'<p role="{role}">{html.escape(self.words)}</p>'

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """Add picture and words for pages without a kernel."""
        bundle: Any = super()._repr_mimebundle_(**kwargs)
        bundle["image/png"] = base64.b64encode(self.image.value).decode()
        return {**bundle, "text/plain": self.words}


def _control(name: str, values: Any) -> Any:
    if isinstance(values, ipywidgets.DOMWidget):
        values.description = values.description or name
        return values
    if isinstance(values, bool):
        return ipywidgets.Checkbox(values, description=name, indent=False)
    values = getattr(values, "tolist", lambda: values)()  # of NumPy and torch
    if not all(isinstance(value, int | float) for value in values):
        return ipywidgets.Dropdown(options=values, description=name)
    look = {"description": name, "readout": False, "layout": {"width": "560px"}}
    options = [(str(x) if isinstance(x, int) else f"{x:.4g}", x) for x in values]
    return ipywidgets.SelectionSlider(options=options, **look)


def _named(control: Any) -> Any:
    """Put a menu beside a slider, which has no accessible name of its own."""
    if not isinstance(control, ipywidgets.SelectionSlider):
        return control
    look = {"description": f"{control.description} =", "layout": {"width": "200px"}}
    menu = ipywidgets.Dropdown(options=control.options, value=control.value, **look)
    traitlets.link((control, "value"), (menu, "value"))
    return ipywidgets.HBox([control, menu])


_MADE: list[tuple[weakref.ref[Any], str, str]] = []  # widget, cell and run of the cell


def close_previous(widget: Any) -> None:
    """Close what earlier runs of this cell, known by JupyterLab's id, have made."""
    request: Any = getattr(get_ipython(), "get_parent", dict)()
    cell = request.get("metadata", {}).get("cellId")
    if cell is None:
        return
    run = request["header"]["msg_id"]
    for made, its_cell, its_run in _MADE:
        if its_cell == cell and its_run != run and (old := made()) is not None:
            old.close()
    _MADE.append((weakref.ref(widget), cell, run))
