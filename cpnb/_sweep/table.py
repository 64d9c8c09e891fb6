"""The table of a rank sweep: what is known about a network at which ranks."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from cpnb._sweep.files import read_sweep, sweep_content, write_sweep
from cpnb._sweep.fingerprints import check_network
from cpnb._sweep.network import SweptNetwork
from cpnb._sweep.points import GLOBAL, RankPoint, point_row, total_error

PERCENTS = tuple(percent / 100 for percent in range(1, 101))


@dataclass
class RankSweep(SweptNetwork):
    """Accuracy, loss, kernel error, size and FLOPs of a network at measured ranks.

    Ranks without a measurement are gaps; nothing is interpolated.

    Attributes:
        layers: The CP layers in module order.
        other_parameters: Parameters outside the CP layers.
        other_flops: FLOPs outside the CP layers, for one image.
        key: Importance that ordered the components.
        refit: Whether λ was re-solved after each cut, True on the kernel, ``"data"``
            on the outputs.
        fingerprint: Hash of the network, see ``model_fingerprint``.
        provenance: Versions, device, date, number of images and their hash.
        axes: What was swept: layer names, and ``"*"`` for all layers at once.
        keeps: Fractions of the components on the ``"*"`` axis.
        status: ``"finished"`` or ``"interrupted"``.
        methods: By axis, how it was measured: ``"together"``, or what else and why.
    """

    key: str
    refit: bool | str
    fingerprint: str
    provenance: dict[str, Any] = field(default_factory=dict)
    axes: tuple[str, ...] = ()
    keeps: tuple[float, ...] = PERCENTS
    status: str = "finished"
    methods: dict[str, str] = field(default_factory=dict)
    _measured: dict[tuple[int, ...], tuple[float, float | None]] = field(
        default_factory=dict, repr=False
    )
    _errors: dict[str, dict[int, float]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Start an empty error table for every layer."""
        for layer in self.layers:
            self._errors.setdefault(layer.name, {})

    def __len__(self) -> int:
        """Number of measured points."""
        return len(self._measured)

    def __repr__(self) -> str:
        """One line: points, layers, key, images."""
        ranks = ", ".join(f"{name or 'layer'} {r}" for name, r in self.ranks.items())
        images = self.provenance.get("images", "unknown")
        return (
            f"RankSweep({len(self)} points of {ranks}; key={self.key!r}, "
            f"refit={self.refit}, images={images}, {self.status})"
        )

    def points(self) -> list[tuple[tuple[int, ...], float, float | None]]:
        """Ranks in the order of ``layers``, accuracy and loss of all that is known."""
        return [(ranks, *found) for ranks, found in self._measured.items()]

    def errors(self, name: str) -> list[tuple[int, float]]:
        """Known relative kernel errors of one layer, by ascending rank."""
        return sorted(self._errors[self.layer(name).name].items())

    def copy(self) -> RankSweep:
        """A table with the same points that can grow on its own."""
        errors = {name: dict(known) for name, known in self._errors.items()}
        return replace(
            self,
            provenance=dict(self.provenance),
            methods=dict(self.methods),
            _measured=dict(self._measured),
            _errors=errors,
        )

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
            raise ValueError(
                f"relative error of layer {name!r} is {error}, expected a finite "
                "number from 0 upward. Look for NaN or infinity in its weights."
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

    def to_rows(self) -> list[dict[str, Any]]:
        """The swept axes as rows, one truncated network each, for a data frame or CSV.

        A row with a layer name cuts this layer alone, and ``parameters``, ``flops``
        and their dense counterparts are those of the layer. A row of layer ``"*"`` cuts
        every CP layer to the fraction ``keep``: ``rank``, ``full_rank`` and
        ``break_even_rank`` are sums over the layers, the error is over all kernels
        together, and the counts are those of the network. What begins with
        ``network_`` is the network's in every row. FLOPs are for one image, with CP
        layers run as chains.

        Returns:
            Dicts with the keys ``layer, rank, keep, accuracy, loss, relative_error,
            parameters, dense_parameters, flops, dense_flops, full_rank,
            break_even_rank, relative_rank, network_parameters,
            network_dense_parameters, network_flops, network_dense_flops, key, refit,
            method``; ``relative_rank`` is R/R_same, ``method`` as in ``methods``.
        """
        return [
            point_row(self.layers, axis, position, point)
            | {
                "key": self.key,
                "refit": self.refit,
                "method": self.methods.get(axis),
            }
            for axis in self.axes
            for position, point in self.curve(axis)
        ]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the table as a small JSON file, in one step.

        Args:
            path: Target; an existing file is replaced.
        """
        write_sweep(path, sweep_content(self))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module | None = None
    ) -> RankSweep:
        """Read a table written by :meth:`save`.

        Args:
            path: The file.
            model: When given, the network that the table must be about.

        Returns:
            The table.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is not a rank sweep, is damaged, or was made for
                another network than ``model``.
        """
        sweep = read_sweep(path, cls)
        if model is not None:
            sweep.check_model(model)
        return sweep

    def check_model(self, model: nn.Module) -> None:
        """Raise ValueError unless ``model`` is the network that was measured."""
        check_network(model, self.ranks, self.fingerprint)
