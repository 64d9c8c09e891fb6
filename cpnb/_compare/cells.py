"""Train the networks of some cells of one recipe and measure them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from torch import nn

from cpnb._compare.describe import describe
from cpnb._compare.record import Cell
from cpnb.data import Dataset
from cpnb.evaluation import accuracy, evaluate
from cpnb.recipes import Recipe
from cpnb.records import MEASURES, Run, provenance
from cpnb.training import fit

DIGITS = 5  # after the point, in a record
# Images per evaluated batch. On a CPU a small one runs twice as fast: what a layer of a
# LeNet makes of a thousand images no longer fits any cache.
_BATCH = {"cpu": 100}

DataSource = Dataset | Callable[[], Dataset]


@dataclass(frozen=True)
class Task:
    """Cells that one call trains, here or in another process.

    Attributes:
        recipe: What to train.
        cells: Which of its cells: together if there are several.
        data: The data set, or a function that loads it.
        device: Where to train.
        deadline: Time after which nothing is started, as `time.time` counts it.
        note: Facts to keep with the provenance.
    """

    recipe: Recipe
    cells: tuple[Cell, ...]
    data: DataSource
    device: str
    deadline: float
    note: Mapping[str, str]


_loaded: dict[str, Dataset] = {}


def _load(source: DataSource) -> Dataset:
    """The data set; what a function loads stays in memory for the next task."""
    if isinstance(source, Dataset):
        return source
    what = json.dumps(describe(source, "data"))
    if what not in _loaded:
        _loaded.clear()
        _loaded[what] = source()
    return _loaded[what]


def train(task: Task) -> dict[str, Any] | None:
    """Train the cells of a task.

    Returns:
        ``data``, what the data set turned out to be, and ``cells``, what the record
        keeps of each. ``test_accuracy`` is None in phase ``"tune"`` and for a network
        that diverged: the test split is not read then. None after the deadline.

    Raises:
        KeyboardInterrupt: If Ctrl-C ended the training.
    """
    if time.time() >= task.deadline:
        return None
    data = _load(task.data).to(task.device)
    recipe, cells = task.recipe, task.cells
    begin = time.perf_counter()
    models = [recipe.build(len(data.classes), cell.seed, task.device) for cell in cells]
    start_seconds = (time.perf_counter() - begin) / len(cells)
    batch_size = _BATCH.get(task.device, 1000)
    before = [
        evaluate(model, data.validation, batch_size=batch_size)["loss"]
        for model in models
    ]
    runs = [
        fit(
            model,
            data,
            **{**recipe.settings, "lr": cell.lr, "weight_decay": cell.weight_decay},
            seed=cell.seed,
            hooks=[make() for make in recipe.hooks],
            progress=False,
        )
        for model, cell in zip(models, cells, strict=True)
    ]
    if any(run.status == "interrupted" for run in runs):
        raise KeyboardInterrupt
    where = provenance(task.device) | dict(task.note)
    splits = (data.train, data.validation, data.test)
    about = {"holds": repr(data), "images": [len(labels) for _, labels in splits]}
    entries = [
        {
            **cell._asdict(),
            "status": run.status,
            "together": len(cells),
            "start_seconds": round(start_seconds, DIGITS),
            "start_validation_loss": round(loss, DIGITS) if isfinite(loss) else None,
            **_curves(run),
            **_tested(task, model, data, cell, run),
            "provenance": where,
        }
        for cell, model, loss, run in zip(cells, models, before, runs, strict=True)
    ]
    return {"data": about, "cells": entries}


def _curves(run: Run) -> dict[str, list[float]]:
    return {
        name: [round(record[name], DIGITS) for record in run.history]
        for name in MEASURES
    }


def _tested(
    task: Task, model: nn.Module, data: Dataset, cell: Cell, run: Run
) -> dict[str, Any]:
    """Test accuracy, read once, and what else the recipe measures."""
    if cell.phase != "test" or run.status != "finished":
        return {"test_accuracy": None}
    batch_size = _BATCH.get(task.device, 1000)
    share = accuracy(model, data.test, batch_size=batch_size)
    found = {"test_accuracy": round(share, DIGITS)}
    if task.recipe.measure is not None:
        found["measured"] = task.recipe.measure(model, data, cell.seed)
    return found
