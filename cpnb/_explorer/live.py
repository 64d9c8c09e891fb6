"""A rank sweep that measures the points it lacks."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from cpnb._explorer.background import LatestWins
from cpnb._sweep.meter import RankMeter
from cpnb._sweep.points import GLOBAL
from cpnb._sweep.table import PERCENTS, RankSweep
from cpnb.truncation import truncate

TABLE, MEASURED = "table", "measured"
MEASURING, MISSING, FAILED = "being measured", "not in the table", "failed"

Ranks = Mapping[str, int]
Point = tuple[int, ...]


class LiveTable:
    """Answers from a table, and measures what is not in it while nobody waits.

    Works on copies: neither the network nor the given sweep changes.

    Args:
        model: The network, or a :class:`RankSweep` without one.
        data: What to measure on, or None to answer from the table only.
        sweep: A table of this network, or None.
        key: Importance that orders the components; None takes the table's or ``"lam"``.
        refit: Whether to re-solve λ; None takes the table's or False.
        background: False measures inside :meth:`visit`.

    Attributes:
        sweep: The growing table. Hold ``guard`` while using it.
        guard: One lock for whoever reads, changes or shows the table.
        changed: Called, under the guard, after something was measured or failed.
        neighbours: Called, under the guard, when idle: ranks worth measuring, in order.

    Raises:
        TypeError: If the arguments do not go together.
        ValueError: If ``sweep`` is about another network, other images, another key or
            refit, or the network cannot be evaluated.
    """

    def __init__(
        self,
        model: nn.Module | RankSweep,
        data: Any = None,
        sweep: RankSweep | None = None,
        *,
        key: str | None = None,
        refit: bool | None = None,
        background: bool = True,
    ) -> None:
        """Check that the arguments agree, and measure the whole network if needed."""
        self.guard = threading.RLock()
        self.changed: Callable[[], None] = lambda: None
        self.neighbours: Callable[[], Iterable[Ranks]] = tuple
        self._network, self._meter, self._worker = None, None, None
        self._measured: set[Point] = set()
        self._failures: dict[Point, Exception] = {}
        given = _given_sweep(model, data, sweep)
        key, refit = (
            _agree("key", key, "lam", given),
            _agree("refit", refit, False, given),
        )
        if isinstance(model, nn.Module):
            self._network = copy.deepcopy(model)
        if data is not None:
            self._meter = RankMeter(model, data, key=key, refit=refit)
            given = given or self._meter.table
            _check_images(given, self._meter.table)
            self._worker = LatestWins(
                self._measure, self._enter, self._ahead, background=background
            )
        self.sweep = given.copy()
        self.sweep.axes = (*self.sweep.ranks, GLOBAL)
        self.sweep.keeps = tuple(sorted({*PERCENTS, *self.sweep.keeps}))
        whole = self.sweep.ranks
        if self._meter is not None and self.sweep.point(whole).accuracy is None:
            self.sweep.add(whole, *self._meter.measure(whole))
            self._measured.add(tuple(whole.values()))

    def visit(self, ranks: Ranks) -> None:
        """Ask for the accuracy at ``ranks`` instead of any place asked for before."""
        point = self._point(ranks)
        with self.guard:
            self._failures.pop(point, None)
            known = self._knows(point)
        if self._worker is not None:
            self._worker.wake() if known else self._worker.request(point)

    def source(self, ranks: Ranks) -> str:
        """Where the accuracy at ``ranks`` comes from, in words."""
        point = self._point(ranks)
        with self.guard:
            if self._knows(point):
                return MEASURED if point in self._measured else TABLE
            if point in self._failures:
                return FAILED
        return MISSING if self._worker is None else MEASURING

    def failure(self, ranks: Ranks) -> Exception | None:
        """The error that measuring ``ranks`` ended in, if it did."""
        with self.guard:
            return self._failures.get(self._point(ranks))

    def truncated(self, ranks: Ranks) -> nn.Module:
        """The network cut to ``ranks``, as :func:`truncate` makes it.

        Raises:
            ValueError: If there is no network.
        """
        if self._network is None:
            raise ValueError(
                "the explorer was made from a sweep alone, expected one with a network "
                "to cut. Make it with RankExplorer(model, data, sweep=sweep)."
            )
        key, refit = self.sweep.key, self.sweep.refit
        return truncate(self._network, rank=dict(ranks), key=key, refit=refit)

    def wait(self, timeout: float | None = None) -> bool:
        """Block until nothing asked for is waiting or running; False on timeout."""
        return self._worker is None or self._worker.wait(timeout)

    def close(self) -> None:
        """Stop measuring."""
        if self._worker is not None:
            self._worker.close()

    def _point(self, ranks: Ranks) -> Point:
        return tuple((self.sweep.ranks | dict(ranks)).values())

    def _ranks(self, point: Point) -> dict[str, int]:
        return dict(zip(self.sweep.ranks, point, strict=True))

    def _knows(self, point: Point) -> bool:
        return self.sweep.point(self._ranks(point)).accuracy is not None

    def _measure(self, point: Point) -> tuple[float, dict[str, float]] | None:
        with self.guard:
            if self._knows(point):
                return None
        return self._meter.measure(self._ranks(point))

    def _enter(self, point: Point, outcome: Any) -> None:
        with self.guard:
            if isinstance(outcome, Exception):
                self._failures[point] = outcome
            elif outcome is not None:
                try:
                    self.sweep.add(self._ranks(point), *outcome)
                    self._measured.add(point)
                except ValueError as error:  # a result that is no accuracy or error
                    self._failures[point] = error
            self.changed()

    def _ahead(self) -> Point | None:
        with self.guard:
            for ranks in self.neighbours():
                point = self._point(ranks)
                if not self._knows(point) and point not in self._failures:
                    return point
        return None


def _given_sweep(
    model: nn.Module | RankSweep, data: Any, sweep: RankSweep | None
) -> RankSweep | None:
    if isinstance(model, RankSweep):
        if data is not None or sweep is not None:
            raise TypeError(
                "model is a RankSweep, expected a network when data or sweep is given. "
                "Use RankExplorer(sweep), or RankExplorer(model, data, sweep=sweep)."
            )
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model is a {type(model).__name__}, expected a network or a RankSweep."
        )
    if sweep is None:
        if data is None:
            raise TypeError(
                "data and sweep are None, expected one of them. Use "
                "RankExplorer(model, data) to measure or sweep=... to show a table."
            )
        return None
    if not isinstance(sweep, RankSweep):
        raise TypeError(
            f"sweep is a {type(sweep).__name__}, expected a RankSweep. Make it with "
            "rank_sweep(model, data) or RankSweep.load(path)."
        )
    sweep.check_model(model)
    return sweep


def _agree(name: str, wanted: Any, default: Any, sweep: RankSweep | None) -> Any:
    if sweep is None:
        return default if wanted is None else wanted
    held = getattr(sweep, name)
    if wanted is not None and wanted != held:
        raise ValueError(
            f"{name} is {wanted!r}, expected {held!r} as in the sweep. Leave {name} "
            f"out, or make another sweep with rank_sweep(…, {name}={wanted!r})."
        )
    return held


def _check_images(sweep: RankSweep, measured: RankSweep) -> None:
    ours = measured.provenance["images_fingerprint"]
    theirs = sweep.provenance.get("images_fingerprint", ours)
    if theirs != ours:
        raise ValueError(
            "sweep was measured on other images than data: fingerprint "
            f"{theirs[:12]}, data has {ours[:12]}. Pass the data of the sweep, or "
            "sweep this data with rank_sweep(model, data)."
        )
