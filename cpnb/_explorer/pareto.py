"""The networks that no other known network beats in both size and accuracy."""

from __future__ import annotations

from collections.abc import Iterable

from cpnb._sweep.table import RankSweep

Pairs = list[tuple[float, float]]


def known_points(sweep: RankSweep) -> Pairs:
    """Every measured network of a table.

    Args:
        sweep: The table.

    Returns:
        Pairs of the parameters over those of the dense network, and the accuracy.
    """
    names = tuple(sweep.ranks)
    points = (
        sweep.point(dict(zip(names, ranks, strict=True)))
        for ranks, *_ in sweep.points()
    )
    return [(point.size, point.accuracy) for point in points]


def pareto_front(points: Iterable[tuple[float, float]]) -> Pairs:
    """Points than which no smaller or equally large one is as accurate.

    Args:
        points: Pairs of size and accuracy.

    Returns:
        The front by ascending size; accuracies ascend strictly.

    >>> pareto_front([(3, 0.9), (1, 0.5), (2, 0.4), (2, 0.7), (4, 0.9)])
    [(1, 0.5), (2, 0.7), (3, 0.9)]
    """
    front: Pairs = []
    for size, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((size, accuracy))
    return front
