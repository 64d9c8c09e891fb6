"""A CP layer with its components in order: what is left of it at every rank."""

from __future__ import annotations

import torch
from torch import Tensor

from cpnb.base import CPLayer
from cpnb.refit import finite_components, refit_lam, unit_gram
from cpnb.truncation import select_components


class RankedLayer:
    """A CP layer at each of its ranks; the layer itself stays as it is.

    Args:
        layer: A CP layer.
        order: Its components, the most important first. Shape ``(rank,)``.
        refit: Whether λ is re-solved after each cut.

    Attributes:
        layer: The layer.
        norm: Frobenius norm of its kernel.
        refit: Whether the λ of the kept components change with the rank.
        factors: Unit factors in order, one per mode, also of size 1; in the dtype of
            the layer. Shapes ``(size_n, rank)``.
    """

    def __init__(self, layer: CPLayer, order: Tensor, *, refit: bool = False) -> None:
        """Bring the components in order."""
        self.layer, self.refit = layer, refit
        self._order = order
        lam, units = finite_components(layer)
        self._lam, self._gram = lam[order], unit_gram(lam, units)[order][:, order]
        self.norm = (self._lam @ self._gram @ self._lam).clamp_min(0).sqrt().item()
        ordered = iter([unit[:, order].to(layer.lam.dtype) for unit in units])
        ones = layer.lam.detach().new_ones(1, layer.rank)
        self.factors = [next(ordered) if n > 1 else ones for n in layer.kernel_shape]
        self._refitted: dict[int, Tensor] = {}

    def lam(self, rank: int) -> Tensor:
        """λ of the first ``rank`` components with σ folded in, float64."""
        if not self.refit or rank == len(self._lam):
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
        square = (missing @ self._gram @ missing).clamp_min(0)
        return square.sqrt().item() / self.norm if self.norm else float("inf")

    def cut(self, rank: int) -> CPLayer:
        """A copy with the first ``rank`` components, see `cpnb.select_components`."""
        return select_components(self.layer, self._order[:rank], refit=self.refit)
