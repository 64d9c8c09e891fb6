"""What an explorer knows of the network cut in one way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cpnb._explorer.budget import allocated_front
from cpnb._explorer.choices import Choice
from cpnb._explorer.pareto import Pairs, known_points
from cpnb._sweep.meter import Measurement, RankMeter
from cpnb._sweep.table import RankSweep
from cpnb.allocation import RankChoice

Ranks = Mapping[str, int]
Point = tuple[int, ...]


@dataclass
class ChoiceTable:
    """A growing sweep for one key and refit, and where its points come from.

    Attributes:
        sweep: The table.
        meter: What measures more of it; None until it is needed.
        measured: Points that it measured.
        failures: Points at which it failed, with the error.
        known: Size and accuracy of every point, see :func:`known_points`.
    """

    sweep: RankSweep
    meter: RankMeter | None = None
    measured: set[Point] = field(default_factory=set)
    failures: dict[Point, Exception] = field(default_factory=dict)
    known: Pairs = field(init=False)
    _front: tuple[RankChoice, ...] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """List the points that the sweep brings along."""
        self.known = known_points(self.sweep)

    def add(self, ranks: Ranks, measurement: Measurement) -> None:
        """Enter what the meter found at ``ranks``."""
        self.sweep.add(ranks, *measurement)
        point = self.sweep.point(ranks)
        self.known.append((point.size, point.accuracy))
        self.measured.add(tuple(point.ranks.values()))
        cut = [
            name for name, rank in point.ranks.items() if rank < self.sweep.ranks[name]
        ]
        if len(cut) <= 1:  # the curve of one layer, which the allocator reads
            self._front = None

    @property
    def front(self) -> tuple[RankChoice, ...]:
        """What :func:`allocated_front` buys from the table as it is now."""
        if self._front is None:
            self._front = allocated_front(self.sweep)
        return self._front


def only_whole(sweep: RankSweep, choice: Choice) -> RankSweep:
    """A table for another choice, with the untruncated network, the same for all."""
    whole = sweep.point()
    other = replace(
        sweep.copy(), **choice._asdict(), methods={}, _measured={}, _errors={}
    )
    if whole.accuracy is not None:
        errors = dict.fromkeys(sweep.ranks, 0.0)
        other.add(sweep.ranks, whole.accuracy, whole.loss, errors)
    return other
