"""The sliders of a rank explorer, and closing those of an earlier run of the cell."""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass
from typing import Any

import ipywidgets

from cpnb._explorer.state import label
from cpnb._sweep.points import SweptLayer


@dataclass(frozen=True)
class Control:
    """A slider and the number box that says the same number."""

    slider: ipywidgets.IntSlider
    box: ipywidgets.BoundedIntText


def rank_control(layer: SweptLayer) -> Control:
    """A slider over the ranks of one layer, at its full rank."""
    name = label(layer.name)
    tip = f"Rank of {name}, 1 to {layer.rank}; break-even {layer.break_even_rank}"
    return _control(name, f"{name} rank", tip, layer.rank)


def percent_control() -> Control:
    """A slider over the components kept in all layers, in percent."""
    tip = "Components kept in all layers, 1 to 100 percent"
    return _control("all layers", "percent kept", tip, 100)


def _control(name: str, box_name: str, tip: str, last: int) -> Control:
    shared = {"value": last, "min": 1, "max": last, "tooltip": tip}
    slider = ipywidgets.IntSlider(
        **shared,
        description=name,
        readout=False,
        disabled=last == 1,
        style={"description_width": "130px"},
        layout={"width": "680px"},
    )
    # The slider has no accessible name of its own; the box has this label.
    box = ipywidgets.BoundedIntText(
        **shared,
        description=box_name,
        disabled=last == 1,
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
