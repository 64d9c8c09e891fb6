"""What is to be run: seeds, values to choose from, and what a folder has of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from inspect import signature
from itertools import groupby
from pathlib import Path

from cpnb._checks import check_count
from cpnb._compare.cells import DataSource, describe_source
from cpnb._compare.record import TUNED, Cell, Record
from cpnb.recipes import Recipe
from cpnb.training import fit

_DEFAULTS = {name: signature(fit).parameters[name].default for name in TUNED}


def planned(
    recipes: Sequence[Recipe],
    data: DataSource,
    seeds: Iterable[int],
    tune: Mapping[str, Sequence[float]],
    tune_seeds: Iterable[int],
) -> list[Record]:
    """Records without cells, one per recipe; the arguments are those of `compare`."""
    names = [recipe.name for recipe in recipes]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f"recipes have the names {names}, expected at least one and each once."
        )
    if unknown := tune.keys() - set(TUNED):
        raise ValueError(
            f"tune names {sorted(unknown)}, expected {' or '.join(map(repr, TUNED))}."
        )
    source, plan = describe_source(data), _seeds(seeds, tune_seeds)
    return [
        Record(
            recipe.describe(), {"tune": _grid(recipe, tune), **plan}, {"source": source}
        )
        for recipe in recipes
    ]


def record_path(folder: Path, name: str) -> Path:
    """File of a recipe's record."""
    return folder / f"{name}.json"


def resumed(record: Record, folder: Path | None) -> Record:
    """The record in the folder, brought to the present plan; a new one if none."""
    if folder is None or not (path := record_path(folder, record.name)).exists():
        return record
    found = Record.load(path)
    for name, old, new in (
        ("recipe", found.recipe, record.recipe),
        ("data", found.data["source"], record.data["source"]),
    ):
        if old != new:
            raise ValueError(
                f"{path} was made with another {name}: {old}, expected {new}. Move it "
                "away to run these cells again, or choose another folder."
            )
    found.plan = record.plan
    return found


def bundles(cells: list[Cell], size: int | None) -> list[tuple[Cell, ...]]:
    """Cells that train together: of one weight decay, at most ``size``."""
    found = []
    cells = sorted(cells, key=lambda cell: cell.weight_decay)
    for _, group in groupby(cells, key=lambda cell: cell.weight_decay):
        alike = tuple(group)
        step = size or len(alike)
        found += [alike[i : i + step] for i in range(0, len(alike), step)]
    return found


def _seeds(seeds: Iterable[int], tune_seeds: Iterable[int]) -> dict[str, list[int]]:
    given = {"seeds": seeds, "tune_seeds": tune_seeds}
    for name, values in given.items():
        _check_iterable(values, name, "range(5)")
    checked = {
        name: [check_count(seed, name, least=0) for seed in values]
        for name, values in given.items()
    }
    for name, given in checked.items():
        if not given or len(set(given)) < len(given):
            raise ValueError(f"{name} is {given}, expected at least one and each once.")
    if both := set(checked["seeds"]) & set(checked["tune_seeds"]):
        raise ValueError(
            f"tune_seeds shares {sorted(both)} with seeds, expected fresh seeds: a "
            "network on which the rate was chosen says too much for it."
        )
    return checked


def _grid(
    recipe: Recipe, tune: Mapping[str, Sequence[float]]
) -> dict[str, list[float]]:
    """Values to choose from, of both; one value where there is no choice."""
    for name, values in tune.items():
        _check_iterable(values, f"tune[{name!r}]", "[0.01, 0.1]")
    grid = {
        name: [float(value) for value in tune[name]]
        if name in tune
        else [float(recipe.settings.get(name, _DEFAULTS[name]))]
        for name in TUNED
    }
    for name, values in grid.items():
        least = "above 0" if name == "lr" else "at least 0"
        known = all(0 < v < math.inf or (v == 0 and name != "lr") for v in values)
        if not values or not known or len(set(values)) < len(values):
            raise ValueError(
                f"tune[{name!r}] is {values}, expected one or more numbers {least}, "
                "each once."
            )
    return grid


def _check_iterable(values: object, name: str, example: str) -> None:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is {values!r}, expected a list, such as {example}.")
