"""Which ranks a sweep measures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral, Real

from cpnb._sweep.known import PERCENTS
from cpnb._sweep.points import GLOBAL, SweptLayer
from cpnb._sweep.table import RankSweep

ALL_RANKS, GRID = 128, 64
"""Up to ALL_RANKS a layer is swept at every rank, above at about GRID of them."""


def default_ranks(layer: SweptLayer) -> list[int]:
    """Ranks at which a layer is swept unless told otherwise.

    Every rank up to 128. Above, about 64 of them: a geometric grid, close at small
    ranks, joined with a linear one; 1, the break-even rank and the full rank are
    always among them.

    Args:
        layer: The layer.

    Returns:
        Ascending ranks.
    """
    full = layer.rank
    if full <= ALL_RANKS:
        return list(range(1, full + 1))
    half = GRID // 2
    geometric = {round(full ** (step / half)) for step in range(half + 1)}
    linear = {round(full * step / half) for step in range(1, half + 1)}
    return sorted(geometric | linear | {min(layer.break_even_rank, full)})


def plan_positions(
    sweep: RankSweep,
    layers: Iterable[str] | None,
    ranks: Iterable[int] | Mapping[str, Iterable[float]] | None,
) -> dict[str, list[float]]:
    """Turn the arguments of ``rank_sweep`` into positions to measure on each axis.

    Args:
        sweep: Table of the network.
        layers: See ``rank_sweep``.
        ranks: See ``rank_sweep``.

    Returns:
        Ascending ranks for every layer to cut, fractions for ``"*"``.

    Raises:
        TypeError: If ``layers``, ``ranks`` or one of its values is not a list, or a
            list holds the wrong type.
        ValueError: If ``layers`` is empty, a name is unknown, a rank or fraction out
            of range, or ``ranks`` a list for ``"*"``.
    """
    check_list(layers, "layers", 'layers=["conv1"]')
    check_list(ranks, "ranks", "ranks=[1, 2, 4]")
    mapping = isinstance(ranks, Mapping)
    for name, value in ranks.items() if mapping else ():
        example = "[0.25, 0.5]" if name == GLOBAL else "[1, 2, 4]"
        check_list(value, f"ranks[{name!r}]", f"ranks={{{name!r}: {example}}}")
    if ranks is not None and not mapping:
        ranks = list(ranks)
        if layers is not None and GLOBAL in (layers := list(layers)):
            raise ValueError(
                f'ranks is {ranks!r} for layers with "*", which takes fractions of the '
                'components. Pass a mapping, for example ranks={"*": [0.25, 0.5]}.'
            )
    empty = "ranks is {}" if layers is None else "layers is []"
    if layers is None:
        everything = (*sweep.ranks, GLOBAL) if ranks is None else tuple(sweep.ranks)
        layers = ranks if mapping else everything
    if not (layers := list(layers)):
        raise ValueError(
            f"{empty}, expected at least one of {[*sweep.ranks, GLOBAL]}. Name some of "
            "them, or leave it out."
        )
    unused = [name for name in ranks if name not in layers] if mapping else []
    if unused:
        raise ValueError(
            f"ranks names {unused}, expected only the layers to cut: {layers}. Add "
            "them to layers, or leave layers out."
        )
    for name in [*layers, *(ranks if mapping else ())]:
        if name != GLOBAL:
            sweep.layer(name)
    plan = {}
    for name in layers:
        given = ranks.get(name) if mapping else ranks
        if name == GLOBAL:
            plan[name] = _fractions(given)
        else:
            plan[name] = _ranks(sweep.layer(name), given, skip_above=not mapping)
    if ranks is not None and not any(plan.values()):
        raise ValueError(
            f"ranks is {ranks!r}, expected at least one rank within {sweep.ranks}."
        )
    return plan


def check_list(value: object, name: str, example: str) -> None:
    """Refuse what is no list, and a string; None passes."""
    if isinstance(value, str) or not isinstance(value, Iterable | None):
        raise TypeError(f"{name} is {value!r}, expected a list, for example {example}.")


def _fractions(given: Iterable[float] | None) -> list[float]:
    fractions = list(PERCENTS if given is None else given)
    for keep in fractions:
        number = isinstance(keep, Real) and not isinstance(keep, bool)
        if not number or not 0 < keep <= 1:
            raise (ValueError if number else TypeError)(
                f'ranks["*"] holds {keep!r}, expected fractions of the components, '
                "above 0 and at most 1."
            )
    return sorted({float(keep) for keep in fractions})


def _ranks(
    layer: SweptLayer, given: Iterable[int] | None, *, skip_above: bool
) -> list[int]:
    if given is None:
        return default_ranks(layer)
    ranks = list(given)
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, Integral):
            raise TypeError(
                f"ranks for layer {layer.name!r} hold {rank!r}, expected integers."
            )
        if rank < 1 or (rank > layer.rank and not skip_above):
            raise ValueError(
                f"ranks for layer {layer.name!r} hold {rank}, expected 1 to "
                f"{layer.rank}, the rank of the layer."
            )
    return sorted({int(rank) for rank in ranks if rank <= layer.rank})
