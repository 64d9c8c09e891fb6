"""The table of a rank sweep: what is known about a network at which ranks."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from cpnb._checks import check_count
from cpnb._sweep.files import read_sweep, sweep_content, write_sweep
from cpnb._sweep.fingerprints import check_network
from cpnb._sweep.points import GLOBAL, RankPoint, SweptLayer, point_row, total_error
from cpnb.truncation import kept_rank

PERCENTS = tuple(percent / 100 for percent in range(1, 101))


@dataclass
class RankSweep:
    """Accuracy, kernel error and size of a network at the ranks that were measured.

    Ranks without a measurement are gaps; nothing is interpolated.

    Attributes:
        layers: The CP layers in module order.
        other_parameters: Parameters outside the CP layers.
        key: Importance that ordered the components.
        refit: Whether λ was re-solved after each cut.
        fingerprint: Hash of the network, see ``model_fingerprint``.
        provenance: Versions, device, date, number of images and their hash.
        axes: What was swept: layer names, and ``"*"`` for all layers at once.
        keeps: Fractions of the components on the ``"*"`` axis.
        status: ``"finished"`` or ``"interrupted"``.
    """

    layers: tuple[SweptLayer, ...]
    other_parameters: int
    key: str
    refit: bool
    fingerprint: str
    provenance: dict[str, Any] = field(default_factory=dict)
    axes: tuple[str, ...] = ()
    keeps: tuple[float, ...] = PERCENTS
    status: str = "finished"
    _accuracy: dict[tuple[int, ...], float] = field(default_factory=dict, repr=False)
    _errors: dict[str, dict[int, float]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Start an empty error table for every layer."""
        for layer in self.layers:
            self._errors.setdefault(layer.name, {})

    def __len__(self) -> int:
        """Number of measured points."""
        return len(self._accuracy)

    def __repr__(self) -> str:
        """One line: points, layers, key, images."""
        ranks = ", ".join(f"{name or 'layer'} {r}" for name, r in self.ranks.items())
        images = self.provenance.get("images", "unknown")
        return (
            f"RankSweep({len(self)} points of {ranks}; key={self.key!r}, "
            f"refit={self.refit}, images={images}, {self.status})"
        )

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every CP layer of the untruncated network."""
        return {layer.name: layer.rank for layer in self.layers}

    @property
    def dense_parameters(self) -> int:
        """Parameters of the whole network with dense layers."""
        dense = sum(layer.dense_parameters for layer in self.layers)
        return dense + self.other_parameters

    def layer(self, name: str) -> SweptLayer:
        """The swept layer called ``name``."""
        found = next((layer for layer in self.layers if layer.name == name), None)
        if found is None:
            names = ", ".join(map(repr, self.ranks))
            raise ValueError(f"layer is {name!r}, expected one of {names}.")
        return found

    def ranks_at(self, keep: float) -> dict[str, int]:
        """Ranks left when every layer keeps the fraction ``keep`` of its components."""
        return {name: kept_rank(rank, keep) for name, rank in self.ranks.items()}

    def points(self) -> list[tuple[tuple[int, ...], float]]:
        """Every measured accuracy, with the ranks in the order of ``layers``."""
        return list(self._accuracy.items())

    def errors(self, name: str) -> list[tuple[int, float]]:
        """Known relative kernel errors of one layer, by ascending rank."""
        return sorted(self._errors[self.layer(name).name].items())

    def copy(self) -> RankSweep:
        """A table with the same points that can grow on its own."""
        errors = {name: dict(known) for name, known in self._errors.items()}
        provenance = dict(self.provenance)
        accuracy = dict(self._accuracy)
        return replace(self, provenance=provenance, _accuracy=accuracy, _errors=errors)

    def add(
        self, ranks: Mapping[str, int], accuracy: float, errors: Mapping[str, float]
    ) -> None:
        """Enter a measurement.

        Args:
            ranks: Components per layer; layers left out are at their full rank.
            accuracy: Share of images classified correctly, 0 to 1.
            errors: Relative kernel error per layer at these ranks.

        Raises:
            ValueError: If a layer is unknown, a rank is outside the layer, or a number
                is not one an evaluation can give.
        """
        key = self._key(ranks)
        if not 0 <= accuracy <= 1:
            raise ValueError(f"accuracy is {accuracy}, expected a number from 0 to 1.")
        for name, error in errors.items():
            self.add_error(name, ranks.get(name, self.layer(name).rank), error)
        self._accuracy[key] = float(accuracy)

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
        return RankPoint(
            ranks=at,
            accuracy=self._accuracy.get(key),
            relative_error=errors,
            total_error=total_error(self.layers, errors),
            parameters=self.parameters(at),
            dense_parameters=self.dense_parameters,
        )

    def parameters(self, ranks: Mapping[str, int]) -> int:
        """Parameters of the whole network at ``ranks``; a layer left out is full."""
        at = self.ranks | dict(ranks)
        counts = (layer.parameters_at(at[layer.name]) for layer in self.layers)
        return sum(counts) + self.other_parameters

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
        known = (pair for pair in candidates if self._key(pair[1]) in self._accuracy)
        return [(position, self.point(at)) for position, at in known]

    def to_rows(self) -> list[dict[str, Any]]:
        """The swept axes as rows, one truncated network each, for a data frame or CSV.

        A row with a layer name cuts this layer alone, and ``parameters`` and
        ``dense_parameters`` are those of the layer. A row of layer ``"*"`` cuts every
        CP layer to the fraction ``keep``: ``rank``, ``full_rank`` and
        ``break_even_rank`` are sums over the layers, the error is over all kernels
        together, and the parameters are those of the network. ``network_parameters``
        and ``network_dense_parameters`` are the network's in every row.

        Returns:
            Dicts with the keys ``layer, rank, keep, accuracy, relative_error,
            parameters, dense_parameters, full_rank, break_even_rank, relative_rank,
            network_parameters, network_dense_parameters, key, refit``.
        """
        return [
            point_row(self.layers, axis, position, point)
            | {"key": self.key, "refit": self.refit}
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

    def _key(self, ranks: Mapping[str, int]) -> tuple[int, ...]:
        for name, rank in ranks.items():
            full = self.layer(name).rank
            if check_count(rank, f"ranks[{name!r}]") > full:
                raise ValueError(
                    f"ranks[{name!r}] is {rank}, expected 1 to {full}, the rank of the "
                    "untruncated layer."
                )
        return tuple(ranks.get(layer.name, layer.rank) for layer in self.layers)
