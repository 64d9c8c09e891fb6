"""One spread of the row scales: its numbers, checked, and in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class ScalePoint:
    """What an ill-scaled network is like, as it stands and after the repairs.

    Attributes:
        spread: Standard deviation of log₁₀ of the row scales.
        condition: Largest condition number of a layer.
        equilibrated: The same after row equilibration.
        curvature: Top Hessian eigenvalue.
        balanced_curvature: The same after the rows were balanced.
        accuracy: Validation accuracy after training at the best of several rates.
        rate: That rate.
        balanced_accuracy: Accuracy when the rows are balanced, at its best rate.
    """

    spread: float
    condition: float
    equilibrated: float
    curvature: float
    balanced_curvature: float
    accuracy: float
    rate: float
    balanced_accuracy: float


def read_points(rows: Sequence[Mapping[str, float]]) -> list[ScalePoint]:
    """Check the rows of a table and put them into the order of their spread.

    Args:
        rows: One per spread, with the keys of `ScalePoint`.

    Returns:
        The points.

    Raises:
        ValueError: If there are fewer than two, a key is missing or unknown, a spread
            is there twice, or a number is out of its range.
    """
    expected = [field.name for field in fields(ScalePoint)]
    points = []
    for number, row in enumerate(rows):
        if set(row) != set(expected):
            raise ValueError(
                f"rows[{number}] has the keys {sorted(row)}, expected {expected}."
            )
        points.append(ScalePoint(**{name: float(row[name]) for name in expected}))
        for name in expected:
            value, positive = row[name], name in _POSITIVE
            if math.isnan(value) or value < 0 or (positive and value == 0):
                least = "> 0" if positive else ">= 0"
                raise ValueError(
                    f"rows[{number}][{name!r}] is {value}, expected a number {least}."
                )
    if len({point.spread for point in points}) != len(points) or len(points) < 2:
        raise ValueError(
            f"rows have the spreads {[point.spread for point in points]}, expected two "
            "or more, each once."
        )
    return sorted(points, key=lambda point: point.spread)


# What the picture shows on a logarithmic axis.
_POSITIVE = ("condition", "equilibrated", "curvature", "balanced_curvature", "rate")


def status_lines(point: ScalePoint) -> list[str]:
    """The numbers in words, not escaped for HTML."""
    return [
        f"Row scales spread over a factor of {10**point.spread:.3g} (one standard "
        f"deviation of log₁₀: {point.spread:.2g}).",
        f"Largest condition number {point.condition:.3g}, with equilibrated rows "
        f"{point.equilibrated:.3g}.",
        f"Top Hessian eigenvalue {point.curvature:.3g}, balanced "
        f"{point.balanced_curvature:.3g}.",
        f"Best learning rate {point.rate:g}: accuracy {100 * point.accuracy:.1f} %, "
        f"balanced {100 * point.balanced_accuracy:.1f} %.",
    ]
