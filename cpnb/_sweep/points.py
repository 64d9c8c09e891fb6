"""The parts of a rank sweep: its CP layers, its points, and a point as a row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GLOBAL = "*"
"""Stands in the place of a layer name for all CP layers at once."""


@dataclass(frozen=True)
class SweptLayer:
    """What a sweep remembers of one CP layer; all counts are linear in the rank."""

    name: str
    kind: str
    kernel_shape: tuple[int, ...]
    kernel_norm: float
    rank: int
    break_even_rank: int
    dense_parameters: int
    fixed_parameters: int
    component_parameters: int
    dense_flops: int
    component_flops: int

    def __post_init__(self) -> None:
        """Refuse counts that no layer has, as a damaged file may hold them."""
        counts = self.rank, self.break_even_rank, self.component_parameters
        if not all(isinstance(count, int) and count >= 1 for count in counts):
            raise ValueError(
                f"layer {self.name!r} has rank, break-even rank and parameters per "
                f"component {counts}, expected whole numbers of at least 1"
            )

    def parameters_at(self, rank: int) -> int:
        """Parameters of the layer with ``rank`` components, bias included."""
        return self.fixed_parameters + rank * self.component_parameters

    def flops_at(self, rank: int) -> int:
        """FLOPs of the layer for one image, run as a chain of ``rank`` components."""
        return rank * self.component_flops


@dataclass(frozen=True)
class RankPoint:
    """One truncated network; ``None`` stands where nothing was measured.

    Attributes:
        ranks: Components of every CP layer.
        accuracy: Share of images classified correctly, 0 to 1.
        loss: Mean cross entropy in nats; None also where it is not finite.
        relative_error: ``‖W-Ŵ‖/‖W‖`` per layer, against its untruncated kernel.
        total_error: The same over all CP kernels together.
        parameters: Parameters of the whole network.
        dense_parameters: Parameters of the whole network with dense layers.
        flops: FLOPs of the whole network for one image, CP layers run as chains.
        dense_flops: FLOPs of the whole network with dense layers.
        ms: Milliseconds of the whole network for one image, if times were measured.
    """

    ranks: dict[str, int]
    accuracy: float | None
    loss: float | None
    relative_error: dict[str, float | None]
    total_error: float | None
    parameters: int
    dense_parameters: int
    flops: int
    dense_flops: int
    ms: float | None

    @property
    def size(self) -> float:
        """Parameters of the network over those of the dense network."""
        return self.parameters / self.dense_parameters


def total_error(
    layers: Sequence[SweptLayer], errors: Mapping[str, float | None]
) -> float | None:
    """Relative error over all kernels together, from the errors of each.

    ``√(Σ ‖W_l-Ŵ_l‖² / Σ ‖W_l‖²)``

    Args:
        layers: The CP layers.
        errors: Relative error of every layer's kernel, ``None`` where unknown.

    Returns:
        The error, or ``None`` when one of ``errors`` is unknown.
    """
    if any(errors[layer.name] is None for layer in layers):
        return None
    squares = [(errors[layer.name] * layer.kernel_norm) ** 2 for layer in layers]
    norm = math.hypot(*(layer.kernel_norm for layer in layers))
    return math.sqrt(sum(squares)) / norm if norm else 0.0


def point_row(
    layers: Sequence[SweptLayer], axis: str, position: float, point: RankPoint
) -> dict[str, Any]:
    """A point as a row of ``RankSweep.to_rows``.

    Args:
        layers: The CP layers.
        axis: The layer that was cut, or ``"*"`` for all.
        position: Kept fraction, for ``"*"``.
        point: What is known there.

    Returns:
        The row, without key and refit.
    """
    cut = [layer for layer in layers if axis in (GLOBAL, layer.name)]
    rank = sum(point.ranks[layer.name] for layer in cut)
    full = sum(layer.rank for layer in cut)
    break_even = sum(layer.break_even_rank for layer in cut)
    if axis == GLOBAL:
        error, keep = point.total_error, position
        parameters, dense = point.parameters, point.dense_parameters
        flops, dense_flops = point.flops, point.dense_flops
    else:
        error, keep = point.relative_error[axis], rank / full
        parameters, dense = cut[0].parameters_at(rank), cut[0].dense_parameters
        flops, dense_flops = cut[0].flops_at(rank), cut[0].dense_flops
    return {
        "layer": axis,
        "rank": rank,
        "keep": keep,
        "accuracy": point.accuracy,
        "loss": point.loss,
        "relative_error": error,
        "parameters": parameters,
        "dense_parameters": dense,
        "flops": flops,
        "dense_flops": dense_flops,
        "full_rank": full,
        "break_even_rank": break_even,
        "relative_rank": rank / break_even,
        "network_parameters": point.parameters,
        "network_dense_parameters": point.dense_parameters,
        "network_flops": point.flops,
        "network_dense_flops": point.dense_flops,
        "network_ms": point.ms,
    }
