"""What was measured of a network, at which ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from cpnb._sweep.network import SweptNetwork
from cpnb._sweep.points import GLOBAL, RankPoint, total_error

PERCENTS = tuple(percent / 100 for percent in range(1, 101))


@dataclass
class SweptPoints(SweptNetwork):
    """Accuracy, loss and kernel errors of a network at the ranks that were measured.

    Attributes:
        keeps: Fractions of the components on the ``"*"`` axis.
    """

    keeps: tuple[float, ...] = field(default=PERCENTS, kw_only=True)
    _measured: dict[tuple[int, ...], tuple[float, float | None]] = field(
        default_factory=dict, repr=False, kw_only=True
    )
    _errors: dict[str, dict[int, float]] = field(
        default_factory=dict, repr=False, kw_only=True
    )

    def __post_init__(self) -> None:
        """Start an empty error table for every layer."""
        for layer in self.layers:
            self._errors.setdefault(layer.name, {})

    def __len__(self) -> int:
        """Number of measured points."""
        return len(self._measured)

    def points(self) -> list[tuple[tuple[int, ...], float, float | None]]:
        """Ranks in the order of ``layers``, accuracy and loss of all that is known."""
        return [(ranks, *found) for ranks, found in self._measured.items()]

    def errors(self, name: str) -> list[tuple[int, float]]:
        """Known relative kernel errors of one layer, by ascending rank."""
        return sorted(self._errors[self.layer(name).name].items())

    def add(
        self,
        ranks: Mapping[str, int],
        accuracy: float,
        loss: float | None,
        errors: Mapping[str, float],
    ) -> None:
        """Enter a measurement.

        Args:
            ranks: Components per layer; layers left out are at their full rank.
            accuracy: Share of images classified correctly, 0 to 1.
            loss: Mean cross entropy; one that is not finite is kept as None.
            errors: Relative kernel error per layer at these ranks.

        Raises:
            ValueError: If a layer is unknown, a rank is outside the layer, or a number
                is not one an evaluation can give.
        """
        key = self._key(ranks)
        if not 0 <= accuracy <= 1:
            raise ValueError(f"accuracy is {accuracy}, expected a number from 0 to 1.")
        if loss is not None and loss < 0:
            raise ValueError(f"loss is {loss}, expected a number from 0 upward.")
        for name, error in errors.items():
            self.add_error(name, ranks.get(name, self.layer(name).rank), error)
        known = loss is not None and math.isfinite(loss)
        self._measured[key] = float(accuracy), float(loss) if known else None

    def add_error(self, name: str, rank: int, error: float) -> None:
        """Enter the relative kernel error of one layer at one of its ranks."""
        self._key({name: rank})
        if not 0 <= error < math.inf:
            cause = "Look for NaN or infinity in its weights."
            if error == math.inf and self.layer(name).kernel_norm == 0:
                cause = (
                    "The norm of its kernel is 0, as when components cancel, and that "
                    "of what was cut off is not. Leave it out with layers=[...]."
                )
            raise ValueError(
                f"relative error of layer {name!r} is {error}, expected a finite "
                f"number from 0 upward. {cause}"
            )
        self._errors[name][rank] = float(error)

    def point(self, ranks: Mapping[str, int] | None = None) -> RankPoint:
        """Everything known at ``ranks``; what was not measured is ``None``.

        Args:
            ranks: Components per layer; layers left out are at their full rank.

        Returns:
            The point. Its parameter counts are exact at every rank.

        Raises:
            ValueError: If a layer is unknown or a rank is outside the layer.
        """
        key = self._key(ranks or {})
        at = dict(zip(self.ranks, key, strict=True))
        errors = {name: self._errors[name].get(rank) for name, rank in at.items()}
        accuracy, loss = self._measured.get(key, (None, None))
        return RankPoint(
            ranks=at,
            accuracy=accuracy,
            loss=loss,
            relative_error=errors,
            total_error=total_error(self.layers, errors),
            parameters=self.parameters(at),
            dense_parameters=self.dense_parameters,
            flops=self.flops(at),
            dense_flops=self.dense_flops,
            ms=self.milliseconds(at) if self.times else None,
        )

    def curve(
        self, axis: str, ranks: Mapping[str, int] | None = None
    ) -> list[tuple[float, RankPoint]]:
        """Measured points along one axis, ascending.

        Args:
            axis: A layer name, the others staying at ``ranks``; or ``"*"`` for all
                layers keeping the same fraction of their components.
            ranks: Components per layer; layers left out are at their full rank.

        Returns:
            Pairs of the position (a rank, or a fraction for ``"*"``) and the point.
        """
        if axis == GLOBAL:
            candidates = [(keep, self.ranks_at(keep)) for keep in self.keeps]
        else:
            steps = range(1, self.layer(axis).rank + 1)
            candidates = [(rank, {**(ranks or {}), axis: rank}) for rank in steps]
        known = (pair for pair in candidates if self._key(pair[1]) in self._measured)
        return [(position, self.point(at)) for position, at in known]
