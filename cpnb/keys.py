"""Which key to cut by: all of them on the same networks and images, in one table."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from cpnb._checks import check_module
from cpnb._sweep.plan import check_list
from cpnb._sweep.points import GLOBAL
from cpnb._tables import html_table, text_table
from cpnb.importance import check_refit
from cpnb.surgery import cp_layers
from cpnb.sweep import RankSweep, rank_sweep

COMPARED = ("lam", "greedy", "gradient", "hessian", "activation", "random")

_WORDS = {False: "none", True: "on the kernel", "data": "on the outputs"}

Row = dict[str, Any]


@dataclass(frozen=True, repr=False)
class KeyComparison:
    """Accuracy after truncation by each key and refit.

    Attributes:
        sweeps: A sweep of each network by ``(key, refit)``.
        status: ``"finished"``, or ``"interrupted"`` after Ctrl-C.
    """

    sweeps: dict[tuple[str, bool | str], tuple[RankSweep, ...]]
    status: str = "finished"

    def to_rows(self) -> list[Row]:
        """One dict for each key, refit and cut, over all networks.

        Returns:
            Dicts with the keys ``key, refit, layer, rank, keep, accuracy,
            accuracy_std, loss, relative_error, networks``: means over the networks;
            the standard deviation is None for a single one, the loss None where one is
            not finite.
        """
        return [
            _summary(cut)
            for sweeps in self.sweeps.values()
            for cut in zip(*(sweep.to_rows() for sweep in sweeps), strict=True)
        ]

    def __repr__(self) -> str:
        """A table in plain text, one line for each key and refit."""
        return text_table(self._cells(), left=(0, 1))

    def _repr_html_(self) -> str:
        return html_table(self._cells())

    def _cells(self) -> list[list[str]]:
        lines: dict[tuple[str, str], dict[str, str]] = {}
        for row in self.to_rows():
            line = lines.setdefault((row["key"], _WORDS[row["refit"]]), {})
            line[_cut(row)] = _mean(row)
        head = next(iter(lines.values()), {})
        body = [[*names, *cells.values()] for names, cells in lines.items()]
        return [["key", "refit of λ", *head], *body]


def compare_keys(
    models: nn.Module | Sequence[nn.Module],
    data: Any,
    ranks: Mapping[str, Iterable[float]] | None = None,
    *,
    keys: Iterable[str] = COMPARED,
    refits: Iterable[bool | str] = (False, True, "data"),
    progress: bool = True,
) -> KeyComparison:
    """Cut the same networks by every key, with and without a refit, and measure.

    Args:
        models: Networks of the same architecture and ranks, or one.
        data: As in `rank_sweep`: measured on the validation split of a data set, the
            keys on images looking at its training split; a pair serves for both.
        ranks: Where to cut, a mapping as in `rank_sweep`; by default a quarter, half
            and three quarters of the components of all layers.
        keys: Keys of `component_order`.
        refits: Refits of `truncate`.
        progress: Whether to show a bar.

    Returns:
        The table; print it, show it in a notebook, or take its ``to_rows()``. Ctrl-C
        returns what is done, with status ``"interrupted"``.

    Raises:
        TypeError: As `rank_sweep`.
        ValueError: As `rank_sweep`, and if there is no network or their ranks differ.
    """
    from tqdm import tqdm

    given = {"models": models, "keys": keys, "refits": refits}
    for name, value in given.items():
        one = isinstance(value, str) or not isinstance(value, Iterable)
        if one and not isinstance(value, nn.Module):
            raise TypeError(f"{name} is {value!r}, expected a list of them.")
    models = [models] if isinstance(models, nn.Module) else list(models)
    _check_alike(models)
    if not isinstance(ranks, Mapping | None):
        raise TypeError(
            f"ranks is a {type(ranks).__name__}, expected a mapping from layers to "
            "ranks, or from '*' to fractions of the components of all."
        )
    ranks = {GLOBAL: (0.25, 0.5, 0.75)} if ranks is None else ranks
    for axis, places in ranks.items():
        check_list(places, f"ranks[{axis!r}]", f"ranks={{{axis!r}: [1, 2]}}")
    ranks = {axis: tuple(places) for axis, places in ranks.items()}
    keys, refits = list(keys), [check_refit(refit) for refit in refits]
    for name, values in (("keys", keys), ("refits", refits)):
        if not values:
            raise ValueError(f"{name} is empty, expected at least one.")
    ways = [(key, refit) for key in keys for refit in refits]
    sweeps: dict[tuple[str, bool | str], tuple[RankSweep, ...]] = {}
    with tqdm(ways, "keys", disable=not progress) as steps:
        try:
            for key, refit in steps:
                made = []
                for model in models:
                    options = {"key": key, "refit": refit, "progress": False}
                    made.append(rank_sweep(model, data, ranks=ranks, **options))
                    if made[-1].status != "finished":
                        raise KeyboardInterrupt
                sweeps[key, refit] = tuple(made)
        except KeyboardInterrupt:
            return KeyComparison(sweeps, "interrupted")
    return KeyComparison(sweeps)


def _check_alike(models: Sequence[nn.Module]) -> None:
    """Refuse networks over which a mean at one rank has no meaning."""
    if not models:
        raise ValueError("models is empty, expected at least one network.")
    for n, model in enumerate(models):
        check_module(model, f"models[{n}]")
    first, *others = [
        {name: layer.rank for name, layer in cp_layers(model).items()}
        for model in models
    ]
    for n, found in enumerate(others, start=1):
        if found != first:
            raise ValueError(
                f"models[{n}] has the CP ranks {found}, expected {first} as in "
                "models[0]. Compare networks of other ranks by themselves."
            )


def _summary(rows: Sequence[Row]) -> Row:
    """One cut of every network as one row."""
    accuracies = [row["accuracy"] for row in rows]
    losses = [row["loss"] for row in rows]
    first = {name: rows[0][name] for name in ("key", "refit", "layer", "rank", "keep")}
    return first | {
        "accuracy": statistics.mean(accuracies),
        "accuracy_std": statistics.stdev(accuracies) if len(rows) > 1 else None,
        "loss": None if None in losses else statistics.mean(losses),
        "relative_error": statistics.mean(row["relative_error"] for row in rows),
        "networks": len(rows),
    }


def _cut(row: Row) -> str:
    if row["layer"] == GLOBAL:
        return f"{100 * row['keep']:.6g}% kept"
    return f"{row['layer'] or 'layer'} {row['rank']}"


def _mean(row: Row) -> str:
    text = f"{100 * row['accuracy']:.1f}"
    spread = row["accuracy_std"]
    return f"{text} %" if spread is None else f"{text} ± {100 * spread:.1f} %"
