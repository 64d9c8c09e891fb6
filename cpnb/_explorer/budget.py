"""Spend a budget of parameters on the layers of a network."""

from __future__ import annotations

import math

import cpnb
from cpnb._explorer.state import label
from cpnb._sweep.table import RankSweep

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
    return _percent(smallest.size), _percent(sweep.point().size)


def budget_at(sweep: RankSweep, ranks: dict[str, int]) -> int:
    """The smallest budget, in percent of dense, that pays for ``ranks``."""
    return _percent(sweep.point(ranks).size)


def budget_problem(sweep: RankSweep) -> str | None:
    """Why no budget can be allocated, None if each layer is known down to rank 1.

    Args:
        sweep: What is known.

    Returns:
        One sentence that names the layers whose own curve is not known.
    """
    if not hasattr(cpnb, "allocate_ranks"):
        return "No budget to slide: this version does not allocate ranks."
    lacking = [
        label(name) for name in sweep.ranks if sweep.point({name: 1}).accuracy is None
    ]
    if not lacking:
        return None
    return (
        f"No budget to slide: the accuracy with {', '.join(lacking)} cut alone is not "
        f"known for key {sweep.key!r} and this refit. Pass a sweep made with them."
    )


def allocated_ranks(sweep: RankSweep, percent: int) -> dict[str, int]:
    """Ranks that the allocator buys for a share of the dense parameters.

    Args:
        sweep: A table with every layer's own curve.
        percent: Budget in percent of the parameters of the dense network.

    Returns:
        Components of every layer.

    Raises:
        ValueError: If the budget does not pay for any allocation.
    """
    budget = percent * sweep.dense_parameters // 100
    return cpnb.allocate_ranks(sweep, budget=budget, unit="parameters").ranks


def _percent(size: float) -> int:
    # A margin for shares like 0.07 · 100 that floating point rounds up.
    return math.ceil(100 * size - 1e-9)
