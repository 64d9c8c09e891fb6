"""Weight and spectral norm by torch's own parametrisations."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from cpnb._checks import check_count, check_positive
from cpnb._normalizers.base import per_layer
from cpnb.surgery import Skip

_FIRST_ITERATIONS = 15  # of the power method, as torch takes them at the start


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
        options = {"n_power_iterations": count, "eps": eps}
        if generator is None:
            return parametrizations.spectral_norm(layer, **options)
        # On the meta device nothing is drawn: torch's own generator is every thread's.
        shell = copy.deepcopy(layer).to("meta")
        shell = parametrizations.spectral_norm(shell, **options)
        norm = shell.parametrizations["weight"][0]
        _start(norm, layer.weight.detach(), generator)
        parametrize.register_parametrization(layer, "weight", norm)
        return layer

    return per_layer(model, skip, normalise, reason=_all_zero)


def _start(norm: nn.Module, kernel: Tensor, generator: torch.Generator) -> None:
    """Start the singular vectors as torch's constructor does, but for the draws."""
    matrix = kernel.flatten(1)
    for name, size in zip(("_u", "_v"), matrix.shape, strict=True):
        drawn = torch.randn(
            size, generator=generator, device=generator.device, dtype=matrix.dtype
        )
        setattr(norm, name, F.normalize(drawn.to(matrix.device), dim=0, eps=norm.eps))
    norm._power_method(matrix, _FIRST_ITERATIONS)
