"""Norms of factorized kernels: what weight decay on the factors presses on."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from cpnb.base import CPLayer
from cpnb.frobenius import FactorizedLayer, factorized_layers


@dataclass(frozen=True)
class FactorNorms:
    """How large a factorized kernel is, and what ordinary weight decay would press on.

    Attributes:
        frobenius: ``‖W‖_F``.
        nuclear: ``‖W‖_*``, the sum of the singular values of the unfolded kernel, which
            in CP form is the one of shape (out, all the rest).
        bound: What bounds it from above. ``½(‖U‖² + ‖V‖²)``, with V Mᵀ for V where
            there is an M: without one, μ times this is the penalty of ordinary weight
            decay, and right after spectral initialisation it is equal to ``nuclear``.
            In CP form ``Σ|σλ|``.
        effective_step: ``lr / ‖W‖²_F``: how far a step turns a kernel whose size the
            following norm layer undoes.
    """

    frobenius: float
    nuclear: float
    bound: float
    effective_step: float


@torch.no_grad()
def factor_norms(model: nn.Module, lr: float = 1.0) -> dict[str, FactorNorms]:
    """Norms of the factorized layers of a model, for a log or a callback of `fit`.

    Args:
        model: A module with low-rank or CP layers, or one such layer.
        lr: Learning rate, for the effective step.

    Returns:
        `FactorNorms` by layer name; NaN for a kernel that is not finite.

    Raises:
        ValueError: If there is no such layer.

    Source: Khodak et al. 2021, arXiv:2105.01029.

    >>> from cpnb import LowRankLinear
    >>> norms = factor_norms(LowRankLinear(6, 4, rank=2))[""]
    >>> round(norms.bound / norms.nuclear, 4)
    1.0
    """
    return {name: _norms(layer, lr) for name, layer in factorized_layers(model).items()}


def _norms(layer: FactorizedLayer, lr: float) -> FactorNorms:
    if isinstance(layer, CPLayer):
        core = layer.weight.double().flatten(1)
        bound = layer.components(torch.float64)[0].abs().sum()
    else:
        left, right = (matrix.double() for matrix in layer.pair)
        # UVᵀ has the singular values of the small R_U R_Vᵀ of the QR decompositions.
        core = torch.linalg.qr(left).R @ torch.linalg.qr(right).R.mT
        bound = (left.square().sum() + right.square().sum()) / 2
    if not core.isfinite().all():  # a log must not end a training
        return FactorNorms(math.nan, math.nan, math.nan, math.nan)
    values = torch.linalg.svdvals(core)
    square = values.square().sum().item()
    return FactorNorms(
        frobenius=square**0.5,
        nuclear=values.sum().item(),
        bound=bound.item(),
        effective_step=lr / square if square else math.inf,
    )
