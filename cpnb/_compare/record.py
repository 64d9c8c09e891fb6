"""The record of one recipe: a small JSON file that grows cell by cell."""

from __future__ import annotations

import json
import operator
import os
from dataclasses import dataclass, field, fields
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from cpnb._files import replacing
from cpnb.records import MEASURES, Run

FORMAT, VERSION = "cpnb comparison", 1
TUNED = ("lr", "weight_decay")


class Cell(NamedTuple):
    """One training: ``"tune"`` sees the validation split, ``"test"`` also the test."""

    phase: str
    lr: float
    weight_decay: float
    seed: int


@dataclass
class Record:
    """What is planned and what is known of one recipe.

    Attributes:
        recipe: Description of the recipe.
        plan: ``tune``, the values to choose from of ``lr`` and ``weight_decay``;
            ``tune_seeds``, on which they are chosen; ``seeds``, fresh, of the networks
            that are tested.
        data: ``source``, how the data set is made; ``holds``, what it turned out to
            be; ``images``, the number in each split. The last two are None before the
            first cell.
        cells: One dict per finished training.
    """

    recipe: dict[str, Any]
    plan: dict[str, Any]
    data: dict[str, Any]
    cells: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of the recipe."""
        return self.recipe["name"]

    @property
    def choices(self) -> list[tuple[float, float]]:
        """Every pair of learning rate and weight decay to choose from."""
        return list(product(*(self.plan["tune"][name] for name in TUNED)))

    @property
    def best(self) -> tuple[float, float] | None:
        """The pair with the best mean validation accuracy after the last epoch.

        A pair under which a run diverged is out, whatever the other seeds reached.
        None as long as a tuning cell is missing, or if every pair is out.
        """
        if len(self.choices) == 1:  # nothing to choose
            return self.choices[0]
        if self.missing("tune"):
            return None
        scores = {}
        for pair in self.choices:
            cells = [
                cell
                for cell in self.at("tune", pair)
                if cell["seed"] in self.plan["tune_seeds"]
            ]
            if all(cell["status"] == "finished" for cell in cells):
                finals = [cell["validation_accuracy"][-1] for cell in cells]
                scores[pair] = sum(finals) / len(finals)
        return max(scores, key=scores.__getitem__) if scores else None

    @property
    def tested(self) -> list[dict[str, Any]]:
        """The cells of the planned fresh seeds at the chosen pair, by seed."""
        cells = [] if self.best is None else self.at("test", self.best)
        return [cell for cell in cells if cell["seed"] in self.plan["seeds"]]

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to run."""
        return not self.missing("tune") and not self.missing("test")

    def at(self, phase: str, pair: tuple[float, float]) -> list[dict[str, Any]]:
        """The finished cells of a phase at a pair of rate and decay, by seed."""
        found = [cell for cell in self.cells if key(cell)[:3] == (phase, *pair)]
        return sorted(found, key=lambda cell: cell["seed"])

    def missing(self, phase: str) -> list[Cell]:
        """Cells of a phase that are not there; of ``"test"`` once the best is known."""
        if phase == "tune":
            pairs, seeds = self.choices, self.plan["tune_seeds"]
            if len(pairs) == 1:
                return []
        else:
            best = self.best
            pairs, seeds = [] if best is None else [best], self.plan["seeds"]
        done = {key(cell) for cell in self.cells}
        wanted = [Cell(phase, *pair, seed) for pair in pairs for seed in seeds]
        return [cell for cell in wanted if cell not in done]

    def runs(self) -> list[Run]:
        """The tested cells as runs to draw."""
        return [_run(self.name, cell) for cell in self.tested]

    def add(self, cells: list[dict[str, Any]]) -> None:
        """Take in finished cells; those that are there already stay as they are."""
        done = {key(cell) for cell in self.cells}
        self.cells += [cell for cell in cells if key(cell) not in done]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record, one line per cell; a crash leaves the old file or this."""
        path = Path(path)
        # The order in which processes finish must not show.
        lines = [
            json.dumps(cell, allow_nan=False) for cell in sorted(self.cells, key=key)
        ]
        head = {"format": FORMAT, "version": VERSION, **vars(self), "cells": []}
        text = json.dumps(head, indent=1, allow_nan=False)
        body = '"cells": [\n' + ",\n".join(lines) + "\n]"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(
                text.replace('"cells": []', body) + "\n", encoding="utf-8"
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Record:
        """Read a record.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it holds no record; the message names the file.
        """
        try:
            read = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)} is no JSON ({error}).") from error
        found = read.pop("format", None) if isinstance(read, dict) else None
        if found != FORMAT or read.pop("version", None) != VERSION:
            raise ValueError(
                f"{os.fspath(path)} has format {found!r}, expected {FORMAT!r} version "
                f"{VERSION}. Move it away and compare again."
            )
        if read.keys() != (expected := {each.name for each in fields(cls)}):
            raise ValueError(
                f"{os.fspath(path)} has the fields {sorted(read)}, expected "
                f"{sorted(expected)}. Move it away and compare again."
            )
        try:
            record = cls(**read)
            _check(record)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{os.fspath(path)} is damaged ({type(error).__name__}: {error}). Move "
                "it away and compare again."
            ) from error
        return record


def _check(record: Record) -> None:
    """Raise some error unless a record holds what its methods and tables read."""
    if not isinstance(record.recipe["name"], str) or "source" not in record.data:
        raise TypeError("its recipe has no name, or its data no source")
    seeds = [*record.plan["seeds"], *record.plan["tune_seeds"]]
    numbers = [value for name in TUNED for value in record.plan["tune"][name]]
    for cell in record.cells:
        run = _run(record.name, cell)
        seeds.append(cell["seed"])
        numbers += [cell[name] for name in (*TUNED, "together", "start_seconds")]
        numbers += [value for epoch in run.history for value in epoch.values()]
        if run.status == "finished":
            numbers.append(run.history[-1]["validation_accuracy"])
            if cell["phase"] == "test":
                numbers.append(cell["test_accuracy"])
    for value in seeds:
        operator.index(value)
    if not all(isinstance(value, int | float) for value in numbers):
        raise TypeError("a number is missing or of another type")


def key(cell: dict[str, Any]) -> Cell:
    """What tells a cell from all others of its recipe."""
    return Cell(*(cell[name] for name in Cell._fields))


def _run(name: str, cell: dict[str, Any]) -> Run:
    courses = zip(*(cell[measure] for measure in MEASURES), strict=True)
    return Run(
        status=cell["status"],
        history=[
            {"epoch": epoch, **dict(zip(MEASURES, values, strict=True))}
            for epoch, values in enumerate(courses, start=1)
        ],
        recipe={"recipe": name, **key(cell)._asdict()},
        provenance=cell["provenance"],
    )
