"""Compare recipes: a rate tuned for each, then fresh seeds, the test set read once."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpnb._checks import check_count, check_strength
from cpnb._compare.cells import UNFINISHED, DataSource, Task, checkpoint_path, forget
from cpnb._compare.plan import bundles, planned, record_path, resumed
from cpnb._compare.record import Cell, Record
from cpnb._compare.running import run_tasks
from cpnb._compare.table import HEAD, row, words
from cpnb._tables import html_table, text_table
from cpnb.recipes import Recipe
from cpnb.records import Run


@dataclass
class Comparison:
    """Records of several recipes on the same data; shown as a table.

    Attributes:
        records: By the recipe's name, in the order of the recipes.
    """

    records: dict[str, Record]

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], names: Iterable[str] | None = None
    ) -> Comparison:
        """Read the records in a folder.

        Args:
            folder: What `compare` was given as ``results``.
            names: Recipes to read, in this order, left out when there is no file; all,
                in alphabetical order, if None.

        Raises:
            FileNotFoundError: If there is no record.
            ValueError: If a file holds no record; the message names it.
        """
        folder = Path(folder)
        if names is None:
            paths = sorted(folder.glob("*.json"))
        else:
            paths = [
                path for name in names if (path := record_path(folder, name)).exists()
            ]
        if not paths:
            raise FileNotFoundError(
                f"{os.fspath(folder)} holds no record, expected RECIPE.json files. "
                "Make them with cpnb.compare(…, results=folder)."
            )
        records = map(Record.load, paths)
        return cls({record.name: record for record in records})

    @property
    def is_complete(self) -> bool:
        """Whether every recipe has all its cells."""
        return all(record.is_complete for record in self.records.values())

    def runs(self) -> dict[str, list[Run]]:
        """The tested runs of each recipe that has any, for `plots.plot_training`.

        Runs that diverged are left out; `rows` counts them.
        """
        found = {
            name: [run for run in record.runs() if run.status == "finished"]
            for name, record in self.records.items()
        }
        return {name: runs for name, runs in found.items() if runs}

    def rows(self) -> list[dict[str, Any]]:
        """One dict per recipe.

        Returns:
            ``recipe``; ``lr`` and ``weight_decay`` as chosen; ``failed``, whether every
            choice diverged; ``n``, the tested networks, and ``diverged``, those of them
            that did; ``test`` and ``validation``, each mean and sample standard
            deviation (None for one network) of the accuracy after the last epoch; means
            of ``best_epoch``, the one of the highest validation accuracy, of
            ``seconds`` of training per network, and of ``images_per_second``, summed
            over networks that trained together. None where nothing is known yet.
        """
        return [row(record) for record in self.records.values()]

    def __repr__(self) -> str:
        """The table as text."""
        return text_table(self._table())

    def _repr_html_(self) -> str:
        return html_table(self._table())

    def _table(self) -> list[list[str]]:
        return [HEAD, *map(words, self.rows())]


def compare(
    recipes: Sequence[Recipe],
    data: DataSource,
    *,
    seeds: Iterable[int],
    tune: Mapping[str, Sequence[float]] | None = None,
    tune_seeds: Iterable[int] = (100,),
    executor: Executor | None = None,
    results: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    together: int | None = None,
    limit: float = math.inf,
    note: Mapping[str, str] | None = None,
    progress: bool = True,
) -> Comparison:
    """Tune the rate of each recipe, train it from fresh seeds, and test each network.

    First, on the ``tune_seeds``, every recipe is trained at every value of ``tune``;
    the value with the best mean validation accuracy after the last epoch wins, and a
    value under which a run diverged never does. Then it is trained at its own best
    values from each of the fresh ``seeds``. Only these networks meet the test split,
    once each, after their training.

    With ``results`` every finished training (a *cell*) is written at once, and the
    state of an unfinished one after each epoch. The same call goes on where it was
    stopped, and a finished cell is never run twice; more seeds or values may be asked
    for later.

    Args:
        recipes: What to compare.
        data: A data set, or a function without arguments that loads one, such as
            ``partial(load_data, "mnist")``: each process then loads its own.
        seeds: Seeds of the networks that are tested.
        tune: Values of ``"lr"``, ``"weight_decay"`` or both to choose from; the
            recipe's own, or those of `cpnb.fit`, for what is left out.
        tune_seeds: Seeds on which the values are chosen; none of ``seeds``.
        executor: Trains the cells, for example in several processes or on a cluster:
            any `concurrent.futures.Executor`. A process trains one cell at a time, so
            that threads gain nothing. In turn, in this process, if None.
        results: Folder of the records, one JSON file per recipe; nothing is written
            if None.
        device: Device to train on.
        together: How many networks of a recipe one call of `cpnb.fit` trains at most;
            one on a CPU and any number elsewhere if None. Tested networks of a recipe
            with a ``measure`` train alone, so that each is recorded once measured.
        limit: Seconds after which no cell is started and none goes on after its epoch.
        note: Facts to keep with the provenance of each cell, such as a remark on the
            data.
        progress: Show a progress bar over the cells.

    Returns:
        The records; incomplete ones after ``limit``.

    Raises:
        KeyboardInterrupt: After Ctrl-C; what was finished is written.
        TypeError: If an argument has the wrong type or has no lasting description.
        ValueError: If names repeat, seeds are in both sets, ``tune`` names something
            else, or a record was made from another recipe or other data.
    """
    if together is not None:
        together = check_count(together, "together")
    if limit != math.inf:
        limit = check_strength(limit, "limit")
    if executor is not None and not hasattr(executor, "submit"):
        raise TypeError(
            f"executor is a {type(executor).__name__}, expected a "
            "concurrent.futures.Executor, such as ProcessPoolExecutor()."
        )
    recipes, folder = list(recipes), None if results is None else Path(results)
    fresh = planned(recipes, data, seeds, tune or {}, tune_seeds)
    records = {record.name: resumed(record, folder) for record in fresh}

    def keep(task: Task, found: dict[str, Any]) -> None:
        record = records[task.recipe.name]
        record.data |= found["data"]
        record.add(found["cells"])
        if folder is not None:
            record.save(record_path(folder, record.name))
            forget(task)

    def task(recipe: Recipe, cells: tuple[Cell, ...]) -> Task:
        record = records[recipe.name]
        path = None if folder is None else checkpoint_path(folder, record, cells)
        return Task(recipe, cells, data, device, deadline, dict(note or {}), path)

    device, deadline = str(device), time.time() + limit
    if together is None and device.startswith("cpu"):
        together = 1
    try:
        for phase in ("tune", "test"):
            tasks = [
                task(recipe, cells)
                for recipe in recipes
                for cells in bundles(
                    records[recipe.name].missing(phase),
                    1 if phase == "test" and recipe.measure else together,
                )
            ]
            run_tasks(tasks, executor, keep, phase if progress else None)
    finally:
        if folder is not None:
            with suppress(OSError):  # not there, or something is unfinished
                (folder / UNFINISHED).rmdir()
    return Comparison(records)
