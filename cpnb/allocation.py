"""Where to cut: ranks for each layer under a budget for the whole network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cpnb._checks import check_positive
from cpnb._sweep.known import PERCENTS
from cpnb._sweep.points import GLOBAL
from cpnb._sweep.table import RankSweep

UNITS = ("parameters", "flops", "ms")


@dataclass(frozen=True)
class RankChoice:
    """Ranks of a network, what they cost, and the accuracy to expect.

    Attributes:
        ranks: Components of every CP layer.
        cost: Of the whole network, in the unit of the allocation.
        accuracy: Predicted: that of the whole network less what each layer loses when
            it is cut alone, at least 0 and at most 1; None where a layer alone was not
            measured at its rank.
        measured: Accuracy that is in the sweep for these ranks, else None.
    """

    ranks: dict[str, int]
    cost: float
    accuracy: float | None
    measured: float | None


@dataclass(frozen=True, repr=False)
class RankAllocation:
    """Ranks that share out a budget over the layers of a network.

    Attributes:
        unit: ``"parameters"``, ``"flops"`` or ``"ms"``.
        budget: Most that the whole network may cost.
        choice: The most accurate choice within the budget, of these the cheapest.
        uniform: The same fraction of every layer, the largest within the budget; None
            if not even one percent is.
        front: Choices that no other one beats in both cost and accuracy, the cheapest
            first, at any budget.
    """

    unit: str
    budget: float
    choice: RankChoice
    uniform: RankChoice | None
    front: tuple[RankChoice, ...]

    @property
    def ranks(self) -> dict[str, int]:
        """Components of every CP layer, as `cpnb.truncate` takes them."""
        return self.choice.ranks

    def to_rows(self) -> list[dict[str, Any]]:
        """The front as dicts: ``cost, unit, accuracy, measured``, and each rank."""
        return [
            {
                "cost": point.cost,
                "unit": self.unit,
                "accuracy": point.accuracy,
                "measured": point.measured,
                **{f"rank of {name or 'layer'}": r for name, r in point.ranks.items()},
            }
            for point in self.front
        ]

    def __repr__(self) -> str:
        """The budget, the choice and the uniform cut."""
        lines = [f"RankAllocation(budget {self.budget:,.6g} {self.unit}"]
        for name, choice in (("layers", self.choice), ("uniform", self.uniform)):
            if choice is not None:
                ranks = ", ".join(
                    f"{layer or 'layer'} {rank}" for layer, rank in choice.ranks.items()
                )
                found = ", ".join(
                    f"{word} {value:.2%}"
                    for word, value in (
                        ("predicted", choice.accuracy),
                        ("measured", choice.measured),
                    )
                    if value is not None
                )
                lines.append(f"  {name}: {ranks}; {choice.cost:,.6g}; {found}")
        return "\n".join(lines) + ")"


def allocate_ranks(
    sweep: RankSweep, *, budget: float, unit: str = "parameters"
) -> RankAllocation:
    """Choose a rank for each layer so that the whole network keeps to a budget.

    What a cut costs in accuracy is taken from the one-layer axes of the sweep, and
    layers are taken to lose independently of each other. Under this additive model the
    choice is the best one there is among the ranks that were measured, found by a
    dynamic program over the layers. Layers that were not swept stay whole. The
    prediction is optimistic for deep cuts: measure the choice before relying on it.

    Args:
        sweep: With at least one layer's own axis, and the network at full rank.
        budget: Most that the network may cost, all of it.
        unit: ``"parameters"``; ``"flops"`` for one image, CP layers run as chains; or
            ``"ms"`` for one image, after `RankSweep.measure_times`.

    Returns:
        The choice, the uniform cut to compare it with, and the Pareto front.

    Raises:
        TypeError: If ``sweep`` is no `RankSweep` or ``budget`` no number.
        ValueError: If ``unit`` is unknown, the sweep lacks what is needed, or the
            budget is below the smallest network of the sweep.
    """
    if not isinstance(sweep, RankSweep):
        raise TypeError(
            f"sweep is a {type(sweep).__name__}, expected a RankSweep. Make it with "
            "rank_sweep(model, data)."
        )
    budget = check_positive(budget, "budget")
    cost = _cost_function(sweep, unit)
    front = _pareto_front(sweep, cost)
    within = [choice for choice in front if choice.cost <= budget]
    if not within:
        raise ValueError(
            f"budget is {budget:,.6g} {unit}, expected at least {front[0].cost:,.6g}, "
            "the least that the ranks in the sweep allow with all that stays."
        )
    return RankAllocation(
        unit, budget, within[-1], _uniform(sweep, cost, budget), tuple(front)
    )


def _cost_function(sweep: RankSweep, unit: str) -> Callable[[Mapping[str, int]], float]:
    """Cost of the whole network at some ranks; linear in the layers."""
    if unit == "parameters":
        return sweep.parameters
    if unit == "flops":
        return sweep.flops
    if unit == "ms":
        return sweep.milliseconds
    raise ValueError(f"unit is {unit!r}, expected one of {', '.join(UNITS)}.")


def _pareto_front(
    sweep: RankSweep, cost: Callable[[Mapping[str, int]], float]
) -> list[RankChoice]:
    """All choices that no other one beats, by a program over the layers."""
    losses = _losses(sweep)
    whole = cost({})
    costs, values = np.zeros(1), np.zeros(1, dtype=np.int64)
    steps: list[tuple[list[int], np.ndarray]] = []
    for name, loss in losses.items():
        ranks = list(loss)
        saved = np.array([cost({name: rank}) - whole for rank in ranks])
        lost = np.array([loss[rank] for rank in ranks])
        costs = np.add.outer(costs, saved).ravel()
        values = np.add.outer(values, lost).ravel()
        kept = _unbeaten(costs, values)
        costs, values = costs[kept], values[kept]
        steps.append((ranks, kept))
    return [
        _choice(sweep, cost, dict(zip(losses, ranks, strict=True)))
        for ranks in _traced(steps)
    ]


def _losses(sweep: RankSweep) -> dict[str, dict[int, int]]:
    """Right answers that cutting one layer costs, by layer and rank."""
    whole = sweep.point().accuracy
    axes = [axis for axis in sweep.axes if axis != GLOBAL and sweep.curve(axis)]
    if whole is None or not axes:
        raise ValueError(
            f"sweep holds {'no layer axis' if not axes else 'no full rank'}, expected "
            "the network at full rank and the axis of at least one layer. Make it with "
            "rank_sweep(model, data)."
        )
    # As whole numbers, so that equal sums are equal and few distinct ones are left.
    images = sweep.provenance.get("images", 10**9)
    return {
        axis: {
            rank: round((whole - point.accuracy) * images)
            for rank, point in sweep.curve(axis)
        }
        for axis in axes
    }


def _unbeaten(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Indices of the choices with less loss than all that cost no more."""
    order = np.lexsort((losses, costs))
    least = np.minimum.accumulate(losses[order])
    first = np.ones(len(order), dtype=bool)
    first[1:] = least[1:] < least[:-1]
    return order[first]


def _traced(steps: Sequence[tuple[list[int], np.ndarray]]) -> list[list[int]]:
    """Ranks of every choice that is left after the last layer."""
    found: list[list[int]] = []
    for place in range(len(steps[-1][1])):
        ranks = []
        for known, kept in reversed(steps):
            place, rank = divmod(int(kept[place]), len(known))
            ranks.append(known[rank])
        found.append(ranks[::-1])
    return found


def _choice(
    sweep: RankSweep,
    cost: Callable[[Mapping[str, int]], float],
    ranks: Mapping[str, int],
) -> RankChoice:
    whole, point = sweep.point().accuracy, sweep.point(ranks)
    alone = [sweep.point({name: rank}).accuracy for name, rank in ranks.items()]
    predicted = None
    if None not in alone:
        lost = math.fsum(whole - accuracy for accuracy in alone)
        predicted = min(1.0, max(0.0, whole - lost))
    return RankChoice(point.ranks, cost(ranks), predicted, point.accuracy)


def _uniform(
    sweep: RankSweep, cost: Callable[[Mapping[str, int]], float], budget: float
) -> RankChoice | None:
    """The largest common fraction within the budget."""
    for keep in sorted({*PERCENTS, *sweep.keeps}, reverse=True):
        if cost(ranks := sweep.ranks_at(keep)) <= budget:
            return _choice(sweep, cost, ranks)
    return None
