"""Rank sweeps that measure the points they lack, one for each way of cutting."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn

from cpnb._explorer.arguments import agree, check_images, given_sweep
from cpnb._explorer.background import LatestWins
from cpnb._explorer.budget import allocated_ranks
from cpnb._explorer.choices import Choice
from cpnb._explorer.pareto import Pairs
from cpnb._explorer.tables import ChoiceTable, Point, Ranks, only_whole
from cpnb._sweep.known import PERCENTS
from cpnb._sweep.meter import Measurement, RankMeter
from cpnb._sweep.points import GLOBAL
from cpnb._sweep.table import RankSweep
from cpnb.importance import check_refit
from cpnb.truncation import truncate

TABLE, MEASURED = "table", "measured"
MEASURING, MISSING, FAILED = "being measured", "not in the table", "failed"


class Job(NamedTuple):
    """A truncated network to measure, or, with a layer, to look into."""

    choice: Choice
    point: Point
    layer: str | None = None


class LiveTable:
    """Answers from a table, and measures what is not in it while nobody waits.

    There is a table for each way of cutting that was chosen, and one thread for all of
    them. Works on copies: neither the network nor the given sweep changes.

    Args:
        model: The network, or a :class:`RankSweep` without one.
        data: What to measure on, or None to answer from the table only.
        sweep: A table of this network, or None.
        key: Importance that orders the components; None takes the table's or ``"lam"``.
        refit: Whether to re-solve λ; None takes the table's or False.
        background: False measures inside :meth:`visit`.

    Attributes:
        choice: The present way of cutting.
        network: A copy of the network, None without one.
        guard: One lock for whoever reads, changes or shows the tables.
        changed: Called, under the guard, after something was measured or failed.
        neighbours: Called, under the guard, when idle: ranks worth measuring, in order.
        look: Called, under the guard, when idle and before it: what to look into, with
            a layer, or None.
        study: Called on the thread with what to look into and the truncated network.
        studied: Called, under the guard, with the same job and what came out or failed.

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
        refit: bool | str | None = None,
        background: bool = True,
    ) -> None:
        """Check that the arguments agree, and measure the whole network if needed."""
        self.guard = threading.RLock()
        self.changed: Callable[[], None] = lambda: None
        self.neighbours: Callable[[], Iterable[Ranks]] = tuple
        self.look: Callable[[], Job | None] = lambda: None
        self.study: Callable[[Job, nn.Module], Any] = lambda job, network: None
        self.studied: Callable[[Job, Any], None] = lambda job, outcome: None
        self.network, self._data, self._worker = None, data, None
        self._background = background
        given = given_sweep(model, data, sweep)
        refit = None if refit is None else check_refit(refit)
        self.choice = Choice(
            agree("key", key, "lam", given), agree("refit", refit, False, given)
        )
        meter = None
        if isinstance(model, nn.Module):
            self.network = copy.deepcopy(model)
        if data is not None:
            meter = RankMeter(model, data, **self.choice._asdict())
            given = given or meter.table
            check_images(given, meter.table)
            self._worker = LatestWins(
                self._work, self._enter, self._ahead, background=background
            )
        given = given.copy()
        given.axes = (*given.ranks, GLOBAL)
        given.keeps = tuple(sorted({*PERCENTS, *given.keeps}))
        self._tables = {self.choice: ChoiceTable(given, meter)}
        whole = given.ranks
        if meter is not None and given.point(whole).accuracy is None:
            self._tables[self.choice].add(whole, meter.measure(whole))

    @property
    def sweep(self) -> RankSweep:
        """The growing table of the present choice. Hold ``guard`` while using it."""
        return self._tables[self.choice].sweep

    @property
    def known(self) -> Pairs:
        """Its points, as :func:`known_points` gives them. Hold ``guard``."""
        return self._tables[self.choice].known

    def allocated(self, percent: int) -> dict[str, int]:
        """Ranks for a budget in percent of dense, see :func:`allocated_ranks`."""
        with self.guard:
            table = self._tables[self.choice]
            return allocated_ranks(table.front, table.sweep.dense_parameters, percent)

    @property
    def measures(self) -> bool:
        """Whether what is not in a table can be measured."""
        return self._worker is not None

    def choose(self, choice: Choice) -> None:
        """Answer for another way of cutting; only the whole network is known at first.

        Args:
            choice: The key and the refit. They are checked with the first measurement.
        """
        with self.guard:
            if choice not in self._tables:
                self._tables[choice] = ChoiceTable(only_whole(self.sweep, choice))
            self.choice = choice

    def visit(self, ranks: Ranks) -> None:
        """Ask for the accuracy at ``ranks`` instead of any place asked for before."""
        job = self._job(ranks)
        with self.guard:
            self._tables[self.choice].failures.pop(job.point, None)
            known = self._knows(job)
        if self._worker is None:
            return
        self._worker.wake() if known else self._worker.request(job)
        if not self._background and (look := self.look()) is not None:
            self._worker.request(look)

    def job(self, ranks: Ranks, layer: str) -> Job:
        """What to look into: one layer of the network at ``ranks``, as chosen now."""
        return self._job(ranks)._replace(layer=layer)

    def ranks(self, job: Job) -> dict[str, int]:
        """The ranks of a job by layer."""
        return dict(zip(self.sweep.ranks, job.point, strict=True))

    def source(self, ranks: Ranks) -> str:
        """Where the accuracy at ``ranks`` comes from, in words."""
        job = self._job(ranks)
        with self.guard:
            table = self._tables[self.choice]
            if self._knows(job):
                return MEASURED if job.point in table.measured else TABLE
            if job.point in table.failures:
                return FAILED
        return MEASURING if self.measures else MISSING

    def failure(self, ranks: Ranks) -> Exception | None:
        """The error that measuring ``ranks`` ended in, if it did."""
        with self.guard:
            return self._tables[self.choice].failures.get(self._point(ranks))

    def truncated(self, ranks: Ranks) -> nn.Module:
        """The network cut to ``ranks``, as :func:`truncate` makes it.

        Raises:
            ValueError: If there is no network.
        """
        if self.network is None:
            raise ValueError(
                "the explorer was made from a sweep alone, expected one with a network "
                "to cut. Make it with RankExplorer(model, data, sweep=sweep)."
            )
        meter = self._tables[self.choice].meter
        if meter is not None:  # its components are in order already
            return meter.cut(self.network, ranks)
        # A copy, because keys on images hook it while the thread may be copying it.
        network, how = copy.deepcopy(self.network), self.choice._asdict()
        return truncate(network, rank=dict(ranks), data=self._data, **how)

    def wait(self, timeout: float | None = None) -> bool:
        """Block until nothing asked for is waiting or running; False on timeout."""
        return self._worker is None or self._worker.wait(timeout)

    def close(self) -> None:
        """Stop measuring."""
        if self._worker is not None:
            self._worker.close()

    def _point(self, ranks: Ranks) -> Point:
        return tuple((self.sweep.ranks | dict(ranks)).values())

    def _job(self, ranks: Ranks) -> Job:
        return Job(self.choice, self._point(ranks))

    def _knows(self, job: Job) -> bool:
        sweep = self._tables[job.choice].sweep
        return sweep.point(self.ranks(job)).accuracy is not None

    def _work(self, job: Job) -> Any:
        with self.guard:
            if job.layer is None and self._knows(job):
                return None
        table = self._tables[job.choice]
        if table.meter is None:
            how = job.choice._asdict()
            table.meter = RankMeter(self.network, self._data, **how, progress=False)
        if job.layer is None:
            return table.meter.measure(self.ranks(job))
        return self.study(job, table.meter.truncated(self.ranks(job)))

    def _enter(self, job: Job, outcome: Measurement | Exception | Any) -> None:
        with self.guard:
            if job.layer is not None:
                self.studied(job, outcome)
                return
            table = self._tables[job.choice]
            if isinstance(outcome, Exception):
                table.failures[job.point] = outcome
            elif outcome is not None:
                try:
                    table.add(self.ranks(job), outcome)
                except ValueError as error:  # a result that is no accuracy or error
                    table.failures[job.point] = error
            self.changed()

    def _ahead(self) -> Job | None:
        with self.guard:
            if (look := self.look()) is not None:
                return look
            failures = self._tables[self.choice].failures
            for ranks in self.neighbours():
                job = self._job(ranks)
                if not self._knows(job) and job.point not in failures:
                    return job
        return None
