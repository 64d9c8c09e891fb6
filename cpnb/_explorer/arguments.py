"""Whether a network, data and a rank sweep are about the same thing."""

from __future__ import annotations

from typing import Any

from torch import nn

from cpnb._sweep.table import RankSweep


def given_sweep(
    model: nn.Module | RankSweep, data: Any, sweep: RankSweep | None
) -> RankSweep | None:
    """The table among the arguments of an explorer, None without one.

    Raises:
        TypeError: If the arguments do not go together.
        ValueError: If ``sweep`` is about another network.
    """
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


def agree(name: str, wanted: Any, default: Any, sweep: RankSweep | None) -> Any:
    """The key or refit that is wanted, which must be that of the table.

    Raises:
        ValueError: If it is another.
    """
    if sweep is None:
        return default if wanted is None else wanted
    held = getattr(sweep, name)
    if wanted is not None and wanted != held:
        raise ValueError(
            f"{name} is {wanted!r}, expected {held!r} as in the sweep. Leave {name} "
            f"out, or make another sweep with rank_sweep(…, {name}={wanted!r})."
        )
    return held


def check_images(sweep: RankSweep, measured: RankSweep) -> None:
    """Raise ValueError unless both tables are of the same images and the same order."""
    for name, difference in (
        ("images", "was measured on other images than data"),
        ("order", "was cut by other images than data holds for it, or by another draw"),
    ):
        ours = measured.provenance[f"{name}_fingerprint"]
        theirs = sweep.provenance.get(f"{name}_fingerprint", ours)
        if theirs != ours:
            raise ValueError(
                f"sweep {difference}: fingerprint {theirs[:12]}, here {ours[:12]}. "
                "Pass the data of the sweep, or sweep this data with "
                "rank_sweep(model, data)."
            )
