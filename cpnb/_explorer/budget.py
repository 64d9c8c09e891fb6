"""Spend a budget of parameters on the layers of a network."""

from __future__ import annotations

from collections.abc import Sequence

from cpnb._explorer.state import label
from cpnb._sweep.points import RankPoint
from cpnb._sweep.table import RankSweep
from cpnb.allocation import RankChoice, allocate_ranks

BUDGET = "*budget"
"""Stands in the place of a layer name for the parameters of the whole network."""


def budget_range(sweep: RankSweep) -> tuple[int, int]:
    """Smallest and largest budget of use, in percent of the dense parameters.

    Args:
        sweep: A table of the network.

    Returns:
        What all layers at rank 1 need, and what the untruncated network holds.
    """
    smallest = sweep.point(dict.fromkeys(sweep.ranks, 1))
    return _percent(smallest), _percent(sweep.point())


def budget_at(sweep: RankSweep, ranks: dict[str, int]) -> int:
    """The smallest budget, in percent of dense, that pays for ``ranks``."""
    return _percent(sweep.point(ranks))


def budget_problem(sweep: RankSweep) -> str | None:
    """Why no budget can be allocated, None if each layer is known down to rank 1.

    Args:
        sweep: What is known.

    Returns:
        One sentence that names the layers whose own curve is not known.
    """
    lacking = [
        label(name) for name in sweep.ranks if sweep.point({name: 1}).accuracy is None
    ]
    if not lacking:
        return None
    return (
        f"No budget to slide: the accuracy with {', '.join(lacking)} cut alone is not "
        f"known for key {sweep.key!r} and this refit. Pass a sweep made with them."
    )


def allocated_front(sweep: RankSweep) -> tuple[RankChoice, ...]:
    """What the allocator buys at any budget of parameters, the cheapest first.

    Args:
        sweep: A table with every layer's own curve.
    """
    return allocate_ranks(sweep, budget=sweep.point().parameters).front


def allocated_ranks(
    front: Sequence[RankChoice], dense_parameters: int, percent: int
) -> dict[str, int]:
    """Ranks that the allocator buys for a share of the dense parameters.

    Args:
        front: From :func:`allocated_front`.
        dense_parameters: Parameters of the dense network.
        percent: Budget in percent of them, within :func:`budget_range`.

    Returns:
        Components of every layer.
    """
    budget = percent * dense_parameters // 100
    return [each for each in front if each.cost <= budget][-1].ranks


def _percent(point: RankPoint) -> int:
    return -(-100 * point.parameters // point.dense_parameters)  # rounded up, exactly
