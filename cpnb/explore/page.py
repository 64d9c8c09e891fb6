"""A rank sweep as the rank explorer shows it: as JSON, and as a page."""

from __future__ import annotations

import bisect
import html
import itertools
import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpnb.explore.allocation import rank_front
from cpnb.explore.plots import GREEN, METHOD_STYLES, ORANGE

if TYPE_CHECKING:
    from cpnb.explore.sweep import RankSweep
    from cpnb.truncation import Key

GLOBAL = "*"
SCRIPT, STYLE, _TOML = (
    Path(__file__).with_name(f"rank_explorer.{kind}").read_text("utf-8")
    for kind in ("js", "css", "toml")
)

# Right answers and the relative error of all kernels together, by ranks.
Points = dict[tuple[int, ...], tuple[int, float]]

_REFITS = {False: "as it is", True: "refit on the kernel", "data": "refit on outputs"}
_WORDS = tomllib.loads(_TOML)


def sweep_points(sweep: RankSweep) -> Points:
    """Read what was measured of each network in the table."""
    norms = {name: layer.kernel_norm for name, layer in sweep.layers.items()}
    total = math.hypot(*norms.values()) or 1.0
    # A row of one layer has the error of its kernel, one of "*" that of all kernels.
    shares = {name: norm / total for name, norm in norms.items()} | {GLOBAL: 1.0}
    errors = sweep.table["relative_error"] * [shares[x] for x in sweep.table["axis"]]
    columns = [f"rank_{name}" for name in sweep.layers]
    ranks = sweep.table[columns].itertuples(index=False, name=None)
    points = zip(ranks, sweep.table["right"], errors, strict=True)
    return {at: (int(right), float(f"{x:.5g}")) for at, right, x in points}


def explorer_table(
    sweep: RankSweep, points: Points, keys: Mapping[str, Key], *, live: bool
) -> dict[str, Any]:
    """Collect what the front end reads, in the types of JSON.

    Args:
        sweep: The table; a ValueError if it has nothing to show.
        points: What is known for its way of cutting.
        keys: What can order components, `cpnb.truncation.KEYS`.
        live: Whether Python answers for other points.
    """
    whole = tuple(sweep.ranks.values())
    if len(points) < 2 or whole not in points:
        raise ValueError(
            f"sweep holds {len(points)} networks, expected the whole one and some that "
            "are cut. Make it with rank_sweep(model, data)."
        )
    layers = []
    for name, layer in sweep.layers.items():
        ranks = range(1, layer.rank + 1) if live else sweep.curve(name)["rank"]
        numbers = {
            "ranks": sorted({*map(int, ranks), layer.rank}),
            "fixed": layer.fixed_parameters,
            "component": layer.component_parameters,
            "break_even": layer.break_even_rank,
        }
        layers.append({"name": name, **numbers})
    keeps = {*sweep.curve(GLOBAL)["keep"], *(n / 100 for n in range(1, 101) if live)}
    steps = {keep: sweep.ranks_at(keep).values() for keep in sorted(keeps | {1.0})}
    choices = [[name, key.label] for name, key in keys.items()]
    refit = True if sweep.refit == "weight" else sweep.refit  # two words for the same
    stays = f"{sweep.key}, {keys[sweep.key].label}; λ {_REFITS[refit]}"
    styles = {}
    for key, other in itertools.product(keys, _REFITS):
        name = f"{key}+refit" if other and f"{key}+refit" in METHOD_STYLES else key
        style = METHOD_STYLES.get(name, METHOD_STYLES["canonical"])
        styles[f"{key},{str(other).lower()}"] = style.color
    return {
        "title": sweep.network + (f" on {sweep.data}" if sweep.data else ""),
        "subtitle": f"{sweep.images:,} images, "
        + ("validation accuracy" if sweep.data else "accuracy"),
        "images": sweep.images,
        "key": sweep.key,
        "refit": refit,
        "live": live,
        "other": sweep.other_parameters,
        "dense": sweep.dense_parameters,
        "layers": layers,
        "steps": [[float(f"{100 * x:.6g}"), *ranks] for x, ranks in steps.items()],
        "points": [[*at, right, error] for at, (right, error) in points.items()],
        "budgets": _budgets(sweep),
        "choices": {"key": choices, "refit": [list(pair) for pair in _REFITS.items()]},
        "needs_data": [name for name, key in keys.items() if key.needs_data],
        "colours": {"point": ORANGE, "front": GREEN, **styles},
        "notes": {
            **_WORDS["notes"],
            "layers": _WORDS["live" if live else "still"],
            "cut": f"What stays in the table: {stays}.",
        },
    }


def sweep_page(
    sweep: RankSweep, keys: Mapping[str, Key], points: Points | None = None
) -> str:
    """Make a page of a sweep, or of more points, that loads nothing from anywhere."""
    table = explorer_table(sweep, points or sweep_points(sweep), keys, live=False)
    content = json.dumps(table, allow_nan=False, separators=(",", ":"))
    # "<" could end the element that the table is in; the export is for anywidget.
    content = content.replace("<", "\\u003c")
    script = SCRIPT.replace("export default { render };", "")
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>{html.escape(table["title"])}</title>
<style>{STYLE}</style></head>
<body><main></main><script type="application/json">{content}</script>
<script type="module">
{script}
const table = JSON.parse(document.querySelector("script").textContent);
const model = {{ get: () => table, on() {{}}, off() {{}} }};
render({{ model, el: document.querySelector("main") }});
</script></body></html>
"""


def _budgets(sweep: RankSweep) -> list[list[int]]:
    """Each whole percent of the dense parameters, and the ranks that it buys."""
    if not any(len(sweep.curve(name)) for name in sweep.layers):
        return []
    front = rank_front(sweep)
    costs = [choice.cost for choice in front]
    percents = [math.ceil(100 * cost / sweep.dense_parameters) for cost in costs]
    budgets = []
    for percent in range(percents[0], percents[-1] + 1):
        budget = percent * sweep.dense_parameters // 100
        choice = front[bisect.bisect_right(costs, budget) - 1]
        budgets.append([percent, *choice.ranks.values()])
    return budgets
