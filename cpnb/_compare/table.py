"""What the records of a comparison amount to: one row per recipe."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from cpnb._compare.record import TUNED, Record

HEAD = ["recipe", "lr", "weight decay", "test accuracy", "validation accuracy", "n"]
HEAD += ["diverged", "best epoch", "seconds", "images/s"]


def row(record: Record) -> dict[str, Any]:
    """Numbers of one recipe, as `cpnb.Comparison.rows` documents them."""
    cells = record.tested
    good = [cell for cell in cells if cell["status"] == "finished"]
    scores = [cell["validation_accuracy"] for cell in good]
    seconds = [sum(cell["seconds"]) for cell in good]
    # Networks that train together share the seconds, so that this is summed over them.
    speeds = [
        record.data["images"][0] * len(cell["seconds"]) / spent
        for cell, spent in zip(good, seconds, strict=True)
    ]
    return {
        "recipe": record.name,
        **dict(zip(TUNED, record.best or (None, None), strict=True)),
        "failed": record.best is None and not record.missing("tune"),
        "n": len(good),
        "diverged": len(cells) - len(good),
        "test": spread([cell["test_accuracy"] for cell in good]),
        "validation": spread([course[-1] for course in scores]),
        "best_epoch": _mean([course.index(max(course)) + 1 for course in scores]),
        "seconds": _mean(seconds),
        "images_per_second": _mean(speeds),
    }


def words(row: dict[str, Any]) -> list[str]:
    """A row as it is printed, in the order of `HEAD`."""

    def number(name: str, form: str) -> str:
        return "" if row[name] is None else format(row[name], form)

    return [
        row["recipe"],
        "none works" if row["failed"] else number("lr", "g"),
        number("weight_decay", "g"),
        percent(row["test"]),
        percent(row["validation"]),
        str(row["n"]),
        str(row["diverged"]),
        number("best_epoch", ".1f"),
        number("seconds", ".1f"),
        number("images_per_second", ",.0f"),
    ]


def spread(values: Sequence[float]) -> tuple[float, float | None] | None:
    """Mean and sample standard deviation, None for a single value; None for none."""
    if not values:
        return None
    return mean(values), stdev(values) if len(values) > 1 else None


def percent(found: tuple[float, float | None] | None) -> str:
    """Mean ± standard deviation in percent."""
    if found is None:
        return ""
    centre, width = found
    return f"{centre:.2%}" + ("" if width is None else f" ± {100 * width:.2f}")


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None
