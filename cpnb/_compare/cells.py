"""Train the networks of some cells of one recipe and measure them."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

from torch import nn

from cpnb._compare.describe import describe
from cpnb._compare.record import Cell, Record
from cpnb.data import Dataset
from cpnb.evaluation import accuracy, evaluate
from cpnb.recipes import Recipe
from cpnb.records import MEASURES, Run
from cpnb.training import fit

UNFINISHED = "unfinished"  # folder of the states of unfinished trainings
DIGITS = 5  # after the point, in a record

DataSource = Dataset | Callable[[], Dataset]


@dataclass(frozen=True)
class Task:
    """Cells that one call trains, here or in another process.

    Attributes:
        recipe: What to train.
        cells: Which of its cells: together if there are several.
        data: The data set, or a function that loads it.
        device: Where to train.
        deadline: Time after which nothing goes on, as `time.time` counts it.
        note: Facts to keep with the provenance.
        checkpoint: Where to keep the state of the training until it is recorded;
            nowhere if None.
    """

    recipe: Recipe
    cells: tuple[Cell, ...]
    data: DataSource
    device: str
    deadline: float
    note: Mapping[str, str]
    checkpoint: Path | None = None


def checkpoint_path(folder: Path, record: Record, cells: tuple[Cell, ...]) -> Path:
    """File of an unfinished training, of a name that no other one has."""
    what = [record.recipe, record.data["source"], cells]
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()
    return folder / UNFINISHED / f"{record.name}-{digest[:16]}.pt"


def describe_source(source: DataSource) -> Any:
    """How a data set is made, in the types of JSON; what it is if it is there already.

    Raises:
        TypeError: If it is neither a data set nor a function, or one that has no
            lasting description.
    """
    if not isinstance(source, Dataset):
        if not callable(source):
            raise TypeError(
                f"data is a {type(source).__name__}, expected a data set or a function "
                "that loads one, such as partial(cpnb.load_data, 'digits')."
            )
        return describe(source, "data")
    digest = hashlib.sha256()
    for split in (source.train, source.validation, source.test):
        digest.update(repr((split.mean, split.std)).encode())
        for tensor in split:
            digest.update(tensor.cpu().contiguous().numpy().data)
    return f"{source!r}, sha256 {digest.hexdigest()[:16]}"


_loaded: dict[str, Dataset] = {}
# Tracing a network and seeding the global generators concern the whole process.
_alone = threading.Lock()


def _load(source: DataSource) -> Dataset:
    """The data set; what a function loads stays in memory for the next task."""
    if isinstance(source, Dataset):
        return source
    what = json.dumps(describe_source(source))
    if what not in _loaded:
        _loaded.clear()
        _loaded[what] = source()
    return _loaded[what]


def train(task: Task) -> dict[str, Any] | None:
    """Train the cells of a task, one task at a time in a process.

    Returns:
        ``data``, what the data set turned out to be, and ``cells``, what the record
        keeps of each. ``test_accuracy`` is None in phase ``"tune"`` and for a network
        that diverged: the test split is not read then. None after the deadline.

    Raises:
        KeyboardInterrupt: If Ctrl-C ended the training.
    """
    with _alone:
        return None if time.time() >= task.deadline else _train(task)


def _train(task: Task) -> dict[str, Any] | None:
    data = _load(task.data).to(task.device)
    begin = time.perf_counter()
    models = [task.recipe.build(data, cell.seed) for cell in task.cells]
    start_seconds = (time.perf_counter() - begin) / len(task.cells)
    before = [evaluate(model, data.validation)["loss"] for model in models]
    runs = _fit(task, models, data)
    if any(run.status == "interrupted" for run in runs):
        if time.time() >= task.deadline:
            return None
        raise KeyboardInterrupt
    entries = [
        {
            **cell._asdict(),
            "status": run.status,
            "together": len(runs) if _is_vectorised(run) else 1,
            "start_seconds": round(start_seconds, DIGITS),
            "start_validation_loss": round(loss, DIGITS) if isfinite(loss) else None,
            **_curves(run),
            **_tested(task, model, data, cell, run),
            "provenance": run.provenance | dict(task.note),
        }
        for cell, model, loss, run in zip(task.cells, models, before, runs, strict=True)
    ]
    splits = (data.train, data.validation, data.test)
    about = {"holds": repr(data), "images": [len(labels) for _, labels in splits]}
    return {"data": about, "cells": entries}


def _fit(task: Task, models: list[nn.Module], data: Dataset) -> list[Run]:
    """Train the models, from where an earlier call stopped."""
    if task.checkpoint is not None:
        task.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    chosen = {
        "lr": [cell.lr for cell in task.cells],
        "weight_decay": task.cells[0].weight_decay,
    }
    return fit(
        models,
        data,
        **{**task.recipe.settings, **chosen},
        seeds=[cell.seed for cell in task.cells],
        hooks=[make() for make in task.recipe.hooks],
        checkpoint=task.checkpoint,
        callback=partial(_stop_in_time, task),
        progress=False,
    )


def _stop_in_time(task: Task, epoch: int, *_: Any) -> None:
    """End a training as Ctrl-C does, once its time is over, unless it ends anyway."""
    if time.time() >= task.deadline and epoch != task.recipe.settings.get("epochs"):
        raise KeyboardInterrupt


def forget(task: Task) -> None:
    """Remove the state of a training that has ended and is recorded."""
    if (path := task.checkpoint) is None:
        return
    # Networks that train one after the other have a file each.
    for file in (path, *path.parent.glob(f"{path.stem}-*")):
        file.unlink(missing_ok=True)


def _is_vectorised(run: Run) -> bool:
    return run.recipe.get("members") == "vectorised"


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
    found = {"test_accuracy": round(accuracy(model, data.test), DIGITS)}
    if task.recipe.measure is not None:
        measured = task.recipe.measure(model, data, cell.seed)
        try:
            json.dumps(measured, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"measure of recipe {task.recipe.name!r} returned {measured!r}, "
                f"expected a dict of finite numbers and lists ({error})."
            ) from error
        found["measured"] = measured
    return found
