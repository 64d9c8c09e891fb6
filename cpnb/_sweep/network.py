"""The CP layers of a network and its counts at any ranks, known without measuring."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cpnb._checks import check_count
from cpnb._sweep.points import SweptLayer
from cpnb._sweep.timing import milliseconds_at
from cpnb.truncation import kept_rank


@dataclass
class SweptNetwork:
    """Ranks, parameters and FLOPs of a network, whole, cut and dense.

    Attributes:
        layers: The CP layers in module order.
        other_parameters: Parameters outside the CP layers.
        other_flops: FLOPs outside the CP layers, for one image.
        times: What `time_layers` found, empty before.
    """

    layers: tuple[SweptLayer, ...]
    other_parameters: int
    other_flops: int
    times: dict[str, Any] = field(default_factory=dict, kw_only=True)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of every CP layer of the untruncated network."""
        return {layer.name: layer.rank for layer in self.layers}

    @property
    def dense_parameters(self) -> int:
        """Parameters of the whole network with dense layers."""
        dense = sum(layer.dense_parameters for layer in self.layers)
        return dense + self.other_parameters

    @property
    def dense_flops(self) -> int:
        """FLOPs of the whole network with dense layers, for one image."""
        return sum(layer.dense_flops for layer in self.layers) + self.other_flops

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

    def parameters(self, ranks: Mapping[str, int]) -> int:
        """Parameters of the whole network at ``ranks``; a layer left out is full."""
        at = self.ranks | dict(ranks)
        counts = (layer.parameters_at(at[layer.name]) for layer in self.layers)
        return sum(counts) + self.other_parameters

    def flops(self, ranks: Mapping[str, int]) -> int:
        """FLOPs of the whole network for one image, CP layers run as chains."""
        at = self.ranks | dict(ranks)
        counts = (layer.flops_at(at[layer.name]) for layer in self.layers)
        return sum(counts) + self.other_flops

    def milliseconds(self, ranks: Mapping[str, int]) -> float:
        """Time of the whole network for one image, each layer run the faster way.

        Raises:
            ValueError: If the times of the layers were not measured.
        """
        if not self.times:
            raise ValueError(
                "sweep holds no times, expected those of its layers. Measure them once "
                "with sweep.measure_times(model, data)."
            )
        at = self.ranks | dict(ranks)
        layers = self.times["layers"].items()
        inside = (milliseconds_at(times, at[name]) for name, times in layers)
        return self.times["other"] + math.fsum(inside)

    def _key(self, ranks: Mapping[str, int]) -> tuple[int, ...]:
        for name, rank in ranks.items():
            full = self.layer(name).rank
            if check_count(rank, f"ranks[{name!r}]") > full:
                raise ValueError(
                    f"ranks[{name!r}] is {rank}, expected 1 to {full}, the rank of the "
                    "untruncated layer."
                )
        return tuple(ranks.get(layer.name, layer.rank) for layer in self.layers)
