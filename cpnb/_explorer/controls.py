"""The controls of an explorer, and closing those of an earlier run of the cell."""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass
from typing import Any

import ipywidgets

from cpnb._explorer.choices import KEYS, REFITS, Choice
from cpnb._explorer.state import label
from cpnb._sweep.points import SweptLayer


@dataclass(frozen=True)
class Control:
    """A slider and the number box that says the same number."""

    slider: ipywidgets.IntSlider
    box: ipywidgets.BoundedIntText


@dataclass(frozen=True)
class Switches:
    """What is chosen and pressed, in one row."""

    key: ipywidgets.ToggleButtons
    refit: ipywidgets.ToggleButtons
    undo: ipywidgets.Button
    reset: ipywidgets.Button
    code: ipywidgets.ToggleButton
    details: ipywidgets.ToggleButton

    def row(self) -> ipywidgets.HBox:
        """All of them side by side, in more lines where the page is narrow."""
        layout = {"flex_flow": "row wrap"}
        return ipywidgets.HBox(list(vars(self).values()), layout=layout)


def switches(choice: Choice, *, measures: bool, details: bool) -> Switches:
    """Make the row of choices and buttons.

    Args:
        choice: The key and refit at the start.
        measures: Whether another choice could be measured; else they are disabled.
        details: Whether there is something to look into; else its button is disabled.
    """
    why = "" if measures else "; needs the network and data, RankExplorer(model, data)"
    narrow = {"description_width": "initial", "button_width": "auto"}
    wide = {"width": "auto"}
    return Switches(
        # Not dropdowns: JupyterLab takes arrows and some letters to move between cells.
        key=ipywidgets.ToggleButtons(
            options=KEYS,
            value=choice.key,
            description="key",
            tooltip=f"Importance that orders the components{why}",
            disabled=not measures,
            style=narrow,
            layout={"width": "max-content"},
        ),
        refit=ipywidgets.ToggleButtons(
            options=REFITS,
            value=choice.refit,
            description="refit λ",
            tooltip=f"Whether λ is solved anew after each cut{why}",
            disabled=not measures,
            style=narrow,
            layout={"width": "max-content"},
        ),
        undo=ipywidgets.Button(
            description="Undo", tooltip="Back to the position before", layout=wide
        ),
        reset=ipywidgets.Button(
            description="Reset", tooltip="Back to the first position", layout=wide
        ),
        code=ipywidgets.ToggleButton(
            description="Copy as code",
            tooltip="Show the call that makes this network",
            layout=wide,
        ),
        details=ipywidgets.ToggleButton(
            description="Details",
            tooltip="Show a kernel, the classes and images that flip"
            + ("" if details else "; needs the network and data"),
            value=details,
            disabled=not details,
            layout=wide,
        ),
    )


def rank_control(layer: SweptLayer) -> Control:
    """A slider over the ranks of one layer, at its full rank."""
    name = label(layer.name)
    tip = f"Rank of {name}, 1 to {layer.rank}; break-even {layer.break_even_rank}"
    return _control(name, f"{name} rank", tip, 1, layer.rank)


def percent_control() -> Control:
    """A slider over the components kept in all layers, in percent."""
    tip = "Components kept in all layers, 1 to 100 percent"
    return _control("all layers", "percent kept", tip, 1, 100)


def budget_control(first: int, last: int) -> Control:
    """A slider over the parameters to spend, in percent of the dense network's."""
    tip = f"Parameters to allocate, {first} to {last} percent of the dense network's"
    return _control("budget", "% of dense", tip, first, last)


def _control(name: str, box_name: str, tip: str, first: int, last: int) -> Control:
    shared = {"value": last, "min": first, "max": last, "tooltip": tip}
    slider = ipywidgets.IntSlider(
        **shared,
        description=name,
        readout=False,
        disabled=first == last,
        style={"description_width": "130px"},
        layout={"width": "680px"},
    )
    # The slider has no accessible name of its own; the box has this label.
    box = ipywidgets.BoundedIntText(
        **shared,
        description=box_name,
        disabled=first == last,
        style={"description_width": "110px"},
        layout={"width": "200px"},
    )
    return Control(slider, box)


_made_by: dict[str, tuple[str, list[weakref.ref]]] = {}


def close_previous(explorer: Any) -> None:
    """Close the explorers that an earlier run of the executing cell made.

    Without this a cell run again leaves the thread of the last explorer measuring. A
    cell is known by its id, which JupyterLab sends, or else by its text. Outside a
    notebook nothing is closed.

    Args:
        explorer: The new explorer, remembered for the next run.
    """
    cell, run = _executing_cell()
    if cell is None:
        return
    made_in, explorers = _made_by.get(cell, (run, []))
    if made_in != run:
        for reference in explorers:
            if (previous := reference()) is not None:
                previous.close()
        explorers = []
    _made_by[cell] = run, [*explorers, weakref.ref(explorer)]


def _executing_cell() -> tuple[str | None, str | None]:
    """Which cell the kernel executes, and the id of this execution."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    request = getattr(shell, "get_parent", dict)()
    cell = request.get("metadata", {}).get("cellId")
    cell = cell or request.get("content", {}).get("code")
    return cell, request.get("header", {}).get("msg_id")
