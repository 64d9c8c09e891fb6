"""A CP layer with its components in order: what is left of it at every rank."""

from __future__ import annotations

import torch
from torch import Tensor

from cpnb.base import CPLayer
from cpnb.execution import pad_factors
from cpnb.refit import finite_components, keep_components, refit_lam, unit_gram


class RankedLayer:
    """A CP layer at each of its ranks; the layer itself stays as it is.

    Args:
        layer: A CP layer.
        order: Its components, the most important first. Shape ``(rank,)``.
        gram: What a refit of λ makes small, see `refit_lam`; None leaves λ as it is.

    Attributes:
        layer: The layer.
        order: Its components, as given.
        norm: Frobenius norm of its kernel.
        refit: Whether the λ of the kept components change with the rank.
        factors: Unit factors in order, one per mode, also of size 1; in the dtype of
            the layer. Shapes ``(size_n, rank)``.
    """

    def __init__(
        self, layer: CPLayer, order: Tensor, gram: Tensor | None = None
    ) -> None:
        """Bring the components in order."""
        self.layer, self.refit = layer, gram is not None
        self.order = order
        lam, units = finite_components(layer)
        self._lam, self._overlap = lam[order], unit_gram(lam, units)[order][:, order]
        self._gram = None if gram is None else gram[order][:, order]
        self.norm = self._size(self._lam)
        ordered = [unit[:, order].to(layer.lam.dtype) for unit in units]
        self.factors = pad_factors(layer.lam.detach(), ordered, layer.kernel_shape)
        self._refitted: dict[int, Tensor] = {}

    def lam(self, rank: int) -> Tensor:
        """λ of the first ``rank`` components with σ folded in, float64."""
        if self._gram is None or rank == len(self._lam):
            return self._lam[:rank]
        if rank not in self._refitted:
            index = torch.arange(rank, device=self._lam.device)
            self._refitted[rank] = refit_lam(self._lam, self._gram, index)
        return self._refitted[rank]

    def error(self, rank: int) -> float:
        """Relative error of the kernel at ``rank``, ``‖W-Ŵ‖/‖W‖``."""
        missing = self._lam.clone()
        missing[:rank] -= self.lam(rank)
        if not missing.any():
            return 0.0
        return self._size(missing) / self.norm if self.norm else float("inf")

    def cut(self, rank: int) -> CPLayer:
        """A copy with the first ``rank`` components, in the order of the layer."""
        index, places = self.order[:rank].sort()
        lam = self.lam(rank)[places] if self.refit and rank < len(self._lam) else None
        return keep_components(self.layer, index, lam)

    def _size(self, lam: Tensor) -> float:
        return (lam @ self._overlap @ lam).clamp_min(0).sqrt().item()
