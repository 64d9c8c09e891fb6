"""Measure a network at many ranks: the rank sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from cpnb._sweep.meter import RankMeter
from cpnb._sweep.plan import plan_positions
from cpnb._sweep.points import GLOBAL
from cpnb._sweep.table import RankSweep

__all__ = ["RankSweep", "rank_sweep"]


def rank_sweep(
    model: nn.Module,
    data: Any,
    layers: Iterable[str] | None = None,
    ranks: Iterable[int] | Mapping[str, Iterable[float]] | None = None,
    *,
    key: str = "lam",
    refit: bool = False,
    batch_size: int = 1000,
    progress: bool = True,
) -> RankSweep:
    """Measure accuracy, kernel error and size of a network at many ranks.

    Cuts one CP layer at a time, the others whole, and all of them to one fraction
    (axis ``"*"``). Every point equals :func:`truncate` followed by :func:`accuracy`.
    Ctrl-C returns the points measured so far, with status ``"interrupted"``.

    Args:
        model: The network, or a CP layer alone. It is not changed.
        data: A data set, of which the validation split is used, or a pair
            ``(images, labels)``.
        layers: Names of the CP layers to cut, ``"*"`` among them for all at once.
            None takes the names in a mapping ``ranks``, every layer for a list, and
            every layer and ``"*"`` otherwise.
        ranks: Ranks for each layer in ``layers`` (those above a layer's rank are left
            out there), or a mapping from names to ranks, under ``"*"`` to fractions of
            the components. None takes every rank of a layer of at most 128 and about
            64 ranks of a larger one, among them 1, break-even and full rank, and
            every percent for ``"*"``.
        key: Importance that orders the components, see :func:`truncate`.
        refit: Whether to re-solve λ after each cut.
        batch_size: Images per forward pass.
        progress: Whether to show a progress bar.

    Returns:
        The table; the point at full rank is always in it.

    Raises:
        TypeError: If ``data``, ``layers`` or ``ranks`` has the wrong type.
        ValueError: If the model has no CP layer, a name is unknown, or a rank is
            outside its layer.
    """
    from tqdm import tqdm

    meter = RankMeter(model, data, key=key, refit=refit, batch_size=batch_size)
    sweep = meter.table
    positions = plan_positions(sweep, layers, ranks)
    sweep.axes = tuple(positions)
    sweep.keeps = tuple(positions.get(GLOBAL, sweep.keeps))
    cuts = [
        sweep.ranks_at(place) if axis == GLOBAL else {axis: place}
        for axis, places in positions.items()
        for place in places
    ]
    points = [sweep.ranks | cut for cut in ({}, *cuts)]
    distinct = {tuple(ranks.values()): ranks for ranks in points}.values()
    with tqdm(distinct, "rank sweep", unit="point", disable=not progress) as steps:
        try:
            for ranks in steps:
                sweep.add(ranks, *meter.measure(ranks))
        except KeyboardInterrupt:
            sweep.status = "interrupted"
    return sweep
