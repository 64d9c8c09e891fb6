"""Weight and spectral norm by torch's own parametrisations, and a start from data."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from cpnb._checks import check_count, check_positive
from cpnb._normalizers.base import drawing_from, per_layer
from cpnb.surgery import Skip


def _zero_row(matrix: Tensor) -> str | None:
    zero = (matrix == 0).all(1).nonzero().flatten().tolist()
    if not zero:
        return None
    return f"has no weights but 0 for outputs {zero[:3]}, where weight norm is 0/0."


def _all_zero(matrix: Tensor) -> str | None:
    return None if matrix.any() else "is zero everywhere, where spectral norm is 0/0."


def weight(model: nn.Module, skip: Skip) -> nn.Module:
    """Weight norm, ``g v/‖v‖`` per output."""

    def normalise(layer: nn.Module) -> nn.Module:
        parametrizations.weight_norm(layer, dim=0)
        layer.parametrizations["weight"].no_decay = ("original0",)  # g
        return layer

    return per_layer(model, skip, normalise, reason=_zero_row)


def spectral(
    model: nn.Module,
    skip: Skip,
    *,
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Spectral norm of the kernel as one ``(out, fan_in)`` matrix."""
    count = check_count(n_power_iterations, "n_power_iterations")
    eps = check_positive(eps, "eps")

    def normalise(layer: nn.Module) -> nn.Module:
        with drawing_from(generator, layer.weight.device):
            return parametrizations.spectral_norm(
                layer, n_power_iterations=count, eps=eps
            )

    return per_layer(model, skip, normalise, reason=_all_zero)
