"""Measure a network at many ranks: the rank sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from cpnb._checks import check_positive
from cpnb._sweep.memory import MIB
from cpnb._sweep.meter import RankMeter
from cpnb._sweep.plan import plan_positions
from cpnb._sweep.points import GLOBAL
from cpnb._sweep.sweeper import Sweeper
from cpnb._sweep.table import RankSweep

__all__ = ["RankSweep", "rank_sweep"]


def rank_sweep(
    model: nn.Module,
    data: Any,
    layers: Iterable[str] | None = None,
    ranks: Iterable[int] | Mapping[str, Iterable[float]] | None = None,
    *,
    key: str = "lam",
    refit: bool | str = False,
    batch_size: int = 1000,
    memory: float = 1024,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> RankSweep:
    """Measure accuracy, loss, kernel error and size of a network at many ranks.

    Cuts one CP layer at a time, the others whole, and all of them to one fraction
    (axis ``"*"``). Every point is what :func:`truncate` and :func:`evaluate` give, up
    to rounding, but the network is not run once for each: what comes before the cut
    layer is computed once, components are added to its outputs one after the other, and
    many ranks go through the layers after it together. Where that cannot be done, as
    for a layer that is used twice, ranks are measured one by one; ``methods`` says so.
    Ctrl-C while it measures returns the points so far, with status ``"interrupted"``.

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
        key: Importance that orders the components, see :func:`component_order`. Keys
            on images take them from the training split of a data set, and the images
            themselves of a pair.
        refit: Whether and how to re-solve λ after each cut, see :func:`truncate`.
        batch_size: Most images per forward pass.
        memory: MiB that the tensors of a forward pass may take, apart from the network
            and the images, or of a pass forward and back for a key on images. Less of
            it makes smaller batches, not other results.
        generator: Of the random key; None draws the same order every time.
        progress: Whether to show a progress bar.

    Returns:
        The table; a finished one also holds the network at full rank.

    Raises:
        TypeError: If ``data``, ``layers`` or ``ranks`` has the wrong type.
        ValueError: If the model has no CP layer, ``layers`` is empty, ``key``,
            ``refit`` or a name is unknown, a rank is outside its layer, components to
            cut cancel to a kernel of zeros, or ``memory`` is too small for one image.
    """
    from tqdm import tqdm

    memory = int(check_positive(memory, "memory") * MIB)
    meter = RankMeter(
        model,
        data,
        key=key,
        refit=refit,
        batch_size=batch_size,
        generator=generator,
        memory=memory,
        progress=progress,
    )
    sweep = meter.table
    positions = plan_positions(sweep, layers, ranks)
    sweep.axes = tuple(positions)
    sweep.keeps = tuple(positions.get(GLOBAL, sweep.keeps))
    sweeper = Sweeper(meter, memory)
    sweep.methods = sweeper.methods
    plan = _distinct(sweep, positions)
    total = len(meter.images) * sum(map(len, plan.values()))
    bar = {"unit": "image", "unit_scale": True, "disable": not progress}
    with tqdm(total=total, desc="rank sweep", **bar) as steps:
        try:
            for axis, points in plan.items():
                for ranks, measured in sweeper.measure(axis, points, steps.update):
                    sweep.add(ranks, *measured)
        except KeyboardInterrupt:
            sweep.status = "interrupted"
    return sweep


def _distinct(
    sweep: RankSweep, positions: Mapping[str, list[float]]
) -> dict[str, list[dict[str, int]]]:
    """Truncations to measure on each axis, none twice; full rank on the first one."""
    seen: set[tuple[int, ...]] = set()
    plan: dict[str, list[dict[str, int]]] = {}
    for axis, places in positions.items():
        cuts = [
            sweep.ranks_at(place) if axis == GLOBAL else {axis: place}
            for place in places
        ]
        for point in [sweep.ranks | cut for cut in (*cuts, {})]:
            if (ranks := tuple(point.values())) not in seen:
                seen.add(ranks)
                plan.setdefault(axis, []).append(point)
    return plan
