"""Where to cut: ranks for each layer under a budget for the whole network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from cpnb.explore.sweep import RankSweep

__all__ = ["RankChoice", "allocate_ranks", "rank_front"]


@dataclass(frozen=True)
class RankChoice:
    """Ranks of a network, what they cost, and the accuracy to expect."""

    ranks: dict[str, int]  # of every CP layer, as `cpnb.truncate` takes them
    cost: int  # parameters or FLOPs of the whole network
    accuracy: float  # of the whole network less what each layer loses when cut alone


def allocate_ranks(
    sweep: RankSweep, budget: float, unit: str = "parameters"
) -> RankChoice:
    """Choose a rank for each layer so that the whole network keeps to a budget.

    Layers are taken to lose independently of each other, each what its own axis of the
    sweep says. Under this additive model the choice is the best among the ranks that
    were measured, and of equally good ones the cheapest. Layers that were not swept
    stay whole. The prediction is optimistic for deep cuts: measure the choice.

    Args:
        sweep: With the axis of at least one layer.
        budget: Most that the network may cost, all of it.
        unit: ``"parameters"``, or ``"flops"`` for one image and CP layers as chains.
    """
    front = rank_front(sweep, unit)
    within = [choice for choice in front if choice.cost <= budget]
    if not within:
        raise ValueError(
            f"budget is {budget:,.6g} {unit}, expected at least {front[0].cost:,}, the "
            "least that the ranks in the sweep allow with all that stays."
        )
    return within[-1]


def rank_front(sweep: RankSweep, unit: str = "parameters") -> list[RankChoice]:
    """All choices that no other one beats in both cost and accuracy, cheapest first.

    A dynamic program over the layers: to every choice that is left for the layers
    before, add every rank of the next layer, and leave out what is beaten.
    """
    units = {"parameters": sweep.parameters, "flops": sweep.flops}
    if unit not in units:
        raise ValueError(f"unit is {unit!r}, expected one of {list(units)}.")
    cost = units[unit]
    curves = {n: curve for n in sweep.layers if len(curve := sweep.curve(n))}
    if not curves:
        raise ValueError(
            "sweep holds no axis of a layer, expected at least one. Make it with "
            "rank_sweep(model, data)."
        )
    # Right answers lost: whole numbers, so that equal sums are equal and few are left.
    costs, lost = np.array([cost({})]), np.array([0])
    whole = 0
    steps: list[tuple[str, list[int], np.ndarray]] = []
    for name, curve in curves.items():
        ranks = curve["rank"].tolist()
        saved = [cost({name: rank}) - cost({}) for rank in ranks]
        right = curve["right"].tolist()
        whole = right[-1]
        costs = np.add.outer(costs, saved).ravel()
        lost = np.add.outer(lost, [whole - count for count in right]).ravel()
        kept = _unbeaten(costs, lost)
        costs, lost = costs[kept], lost[kept]
        steps.append((name, ranks, kept))
    front = []
    for place in range(len(costs)):
        choice, at = dict(sweep.ranks), place
        for name, ranks, kept in reversed(steps):
            at, rank = divmod(int(kept[at]), len(ranks))
            choice[name] = ranks[rank]
        accuracy = min(1.0, max(0.0, float(whole - lost[place]) / sweep.images))
        front.append(RankChoice(choice, int(costs[place]), accuracy))
    return front


def _unbeaten(costs: np.ndarray, losses: np.ndarray) -> np.ndarray:
    """Indices of the choices with less loss than all that cost no more."""
    order = np.lexsort((losses, costs))
    least = np.minimum.accumulate(losses[order])
    return order[np.concatenate([[True], least[1:] < least[:-1]])]
