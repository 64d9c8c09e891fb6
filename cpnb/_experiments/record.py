"""The record of an experiment: a small JSON file that grows cell by cell."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpnb._experiments.cells import Cell, Experiment
from cpnb._files import replacing
from cpnb.records import MEASURES, Run

FORMAT, VERSION = "cpnb experiment", 1
Record = dict[str, Any]


def settings(experiment: Experiment) -> dict[str, Any]:
    """What a record says about its experiment, in the types of JSON."""
    return json.loads(json.dumps(asdict(experiment)))


def new_record(experiment: Experiment) -> Record:
    """A record without cells."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "command": f"python -m cpnb.experiments run {experiment.name}",
        "settings": settings(experiment),
        "data": None,
        "cells": [],
    }


def record_path(folder: str | os.PathLike[str], name: str) -> Path:
    """File of an experiment's record."""
    return Path(folder) / f"{name}.json"


def read_record(path: str | os.PathLike[str]) -> Record:
    """Read a record.

    Args:
        path: File that `write_record` wrote.

    Returns:
        The record: ``command``, ``settings``, ``data`` and ``cells``, one dict each.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it holds no record; the message names the file.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is no JSON ({error}).") from error
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT or record.get("version") != VERSION:
        raise ValueError(
            f"{os.fspath(path)} has format {found!r}, expected {FORMAT!r} version "
            f"{VERSION}. Move it away and run the experiment again."
        )
    return record


def write_record(record: Record, path: str | os.PathLike[str]) -> None:
    """Write a record, one line per cell; a crash leaves the old file or the new one."""
    path = Path(path)
    # The order in which processes finish must not show.
    cells = sorted(record["cells"], key=lambda found: str(key(found)))
    lines = ",\n".join(json.dumps(cell, allow_nan=False) for cell in cells)
    head = json.dumps({**record, "cells": []}, indent=1, allow_nan=False)
    text = head.replace('"cells": []', f'"cells": [\n{lines}\n]') + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def key(cell: Cell | dict[str, Any]) -> tuple[str, str, float, int]:
    """What tells a cell from all others; also of what the record holds of it."""
    found = asdict(cell) if isinstance(cell, Cell) else cell
    return found["phase"], found["start"], found["lr"], found["seed"]


def missing(cells: Iterable[Cell], record: Record) -> list[Cell]:
    """The cells that the record does not hold."""
    done = {key(cell) for cell in record["cells"]}
    return [cell for cell in cells if key(cell) not in done]


def tuned_rates(record: Record) -> dict[str, float]:
    """Rate with the best mean validation accuracy after the last epoch, per start.

    A rate under which a run diverged is out, whatever the other seeds reached.

    Raises:
        ValueError: If a start has a rate without cells, or diverged at every rate.
    """
    chosen = {}
    wanted = record["settings"]
    for start in wanted["starts"]:
        scores = {}
        for lr in wanted["rates"]:
            cells = select(record, phase="tune", start=start, lr=lr)
            if len(cells) < len(wanted["tuning_seeds"]):
                raise ValueError(f"start {start!r} is not tuned yet at rate {lr}.")
            if all(cell["status"] == "finished" for cell in cells):
                finals = [cell["validation_accuracy"][-1] for cell in cells]
                scores[lr] = sum(finals) / len(finals)
        if not scores:
            raise ValueError(
                f"start {start!r} diverged at every rate of {wanted['rates']}. Add "
                "smaller ones to the experiment."
            )
        chosen[start] = max(scores, key=scores.__getitem__)
    return chosen


def select(record: Record, **wanted: Any) -> list[dict[str, Any]]:
    """The cells whose entries have the wanted values, by seed."""
    cells = [
        cell
        for cell in record["cells"]
        if all(cell[name] == value for name, value in wanted.items())
    ]
    return sorted(cells, key=lambda cell: cell["seed"])


def runs(record: Record, **wanted: Any) -> list[Run]:
    """The selected cells as runs, for `cpnb.plots.plot_training`."""
    return [
        Run(
            status=cell["status"],
            history=[
                {"epoch": epoch, **dict(zip(MEASURES, values, strict=True))}
                for epoch, values in enumerate(
                    zip(*(cell[name] for name in MEASURES), strict=True), start=1
                )
            ],
            recipe={name: cell[name] for name in ("start", "lr", "seed")},
            provenance=cell["provenance"],
        )
        for cell in select(record, **wanted)
    ]


def is_complete(record: Record) -> bool:
    """Whether every cell, tuning and test, is there."""
    wanted = record["settings"]
    count = len(wanted["rates"]) * len(wanted["tuning_seeds"]) + len(wanted["seeds"])
    return len(record["cells"]) == len(wanted["starts"]) * count
