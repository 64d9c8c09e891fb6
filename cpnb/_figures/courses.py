"""Courses of trainings: a measure against epochs or seconds, mean and spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from cpnb.records import MEASURES, Run

AXES = ("epoch", "seconds")


class Course(NamedTuple):
    """A measure over the runs of one method.

    Attributes:
        x: Epochs from 1, or mean seconds of training up to the end of each. Shape
            ``(epochs,)``.
        mean: Mean over the runs. Shape ``(epochs,)``.
        spread: Sample standard deviation, None for a single run. Shape ``(epochs,)``.
        count: Number of runs.
    """

    x: np.ndarray
    mean: np.ndarray
    spread: np.ndarray | None
    count: int


def course(name: str, runs: Sequence[Run], measure: str, axis: str) -> Course:
    """The course of one method over the epochs that all of its runs completed.

    Args:
        name: The method, for an error.
        runs: Runs that differ in the seed.
        measure: One of ``MEASURES``.
        axis: ``"epoch"`` or ``"seconds"``.

    Raises:
        ValueError: If an argument is unknown or no run has the measure.
    """
    for what, value, known in (("measure", measure, MEASURES), ("axis", axis, AXES)):
        if value not in known:
            raise ValueError(
                f"{what} is {value!r}, expected one of {', '.join(known)}."
            )
    values = _values(name, runs, measure)
    x = np.arange(1, values.shape[1] + 1)
    if axis == "seconds":
        x = _values(name, runs, "seconds").cumsum(1).mean(0)
    spread = values.std(0, ddof=1) if len(values) > 1 else None
    return Course(x, values.mean(0), spread, len(values))


def _values(name: str, runs: Sequence[Run], measure: str) -> np.ndarray:
    """Values, shape (runs, epochs)."""
    lines = [[record[measure] for record in run.history] for run in runs]
    epochs = min((len(line) for line in lines), default=0)
    values = [line[:epochs] for line in lines]
    if not epochs or any(value is None for line in values for value in line):
        raise ValueError(
            f"runs[{name!r}] hold no {measure}, expected at least one run, each with "
            "at least one epoch that has it."
        )
    return np.array(values)


def axis_label(axis: str) -> str:
    """What the horizontal axis says."""
    return "epoch" if axis == "epoch" else "seconds of training"


def measure_label(measure: str) -> str:
    """What the vertical axis says."""
    if measure == "seconds":
        return "seconds per epoch"
    unit = " in nats" if measure.endswith("loss") else ""
    return measure.replace("_", " ") + unit
