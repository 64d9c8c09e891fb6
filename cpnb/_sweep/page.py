"""A rank sweep as a page that needs no kernel: its table, and what draws it."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from cpnb._sweep.points import GLOBAL

if TYPE_CHECKING:
    from cpnb._sweep.table import RankSweep


def sweep_page(sweep: RankSweep) -> str:
    """A whole page with the sliders of a sweep.

    Args:
        sweep: The table; it must hold the network at full rank.

    Returns:
        HTML that loads nothing from anywhere.

    Raises:
        ValueError: If there is nothing to show.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{_escaped(_title(sweep))}</title>\n</head>\n<body>\n"
        f"<main>\n{sweep_fragment(sweep)}</main>\n</body>\n</html>\n"
    )


def sweep_fragment(sweep: RankSweep) -> str:
    """The sliders as a part of a page, such as a notebook; see `sweep_page`."""
    folder = files("cpnb._sweep")
    style, script = (
        folder.joinpath(f"page.{kind}").read_text("utf-8") for kind in ("css", "js")
    )
    # As "<" could end the element that the table is in, it is written as an escape.
    table = json.dumps(_table(sweep), allow_nan=False, separators=(",", ":"))
    table = table.replace("<", "\\u003c")
    return (
        f'<div class="cpnb-sweep">\n<style>\n{style}</style>\n'
        f"<h3>{_escaped(_title(sweep))}</h3>\n"
        '<div class="controls"></div>\n<div class="pictures"></div>\n'
        f'<div role="status">{_escaped(repr(sweep))}</div>\n'
        f'<script type="application/json">{table}</script>\n</div>\n'
        f"<script>\n{script}</script>\n"
    )


def _title(sweep: RankSweep) -> str:
    ranks = ", ".join(f"{name or 'layer'} {r}" for name, r in sweep.ranks.items())
    refit = {False: "λ as it is", True: "λ refit", "data": "λ refit on data"}
    return f"Ranks of {ranks}: key {sweep.key}, {refit[sweep.refit]}"


def _table(sweep: RankSweep) -> dict[str, Any]:
    """What the script reads; numbers that are shown are written as they are shown."""
    whole = sweep.point().accuracy
    axes = [axis for axis in sweep.axes if sweep.curve(axis)]
    if whole is None or not axes:
        raise ValueError(
            "sweep holds no full rank or no axis, expected a finished sweep. Make it "
            "with rank_sweep(model, data)."
        )
    images = sweep.provenance.get("images", 0)
    return {
        "images": f"{images:,} images" if images else "an unknown number of images",
        "whole": _percent(whole),
        "dense": sweep.dense_parameters,
        "dense_flops": sweep.dense_flops,
        "axes": [_axis(sweep, axis) for axis in axes],
    }


def _axis(sweep: RankSweep, axis: str) -> dict[str, Any]:
    at, points = zip(*sweep.curve(axis), strict=True)
    everywhere = axis == GLOBAL
    if everywhere:
        at = tuple(float(f"{100 * keep:.6g}") for keep in at)
        errors = [point.total_error for point in points]
        names = {
            "label": "all layers",
            "place": "{} % of the components",
            "x_label": "components kept in all layers (%)",
        }
    else:
        errors = [point.relative_error[axis] for point in points]
        last, name = sweep.layer(axis).rank, axis or "layer"
        names = {
            "label": name,
            "place": f"rank {{}} of {last}",
            "x_label": f"rank of {name}",
        }
    return names | {
        "last": 100 if everywhere else last,
        "break_even": None if everywhere else sweep.layer(axis).break_even_rank,
        "at": at,
        "accuracy": [_percent(point.accuracy) for point in points],
        "loss": [None if p.loss is None else f"{p.loss:.4g}" for p in points],
        "error": [f"{error:.3f}" for error in errors],
        "parameters": [point.parameters for point in points],
        "flops": [point.flops for point in points],
    }


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _escaped(text: str) -> str:
    return html.escape(text, quote=False)
