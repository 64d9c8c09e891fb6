"""An ℓ1 penalty on the components of CP layers that reaches exact zeros."""

import torch
from torch import nn
from torch.optim import Optimizer

from cpnb._checks import check_strength
from cpnb.hooks import Hook
from cpnb.surgery import cp_layers


class ProximalL1(Hook):
    """The penalty ``μ Σ_r |σ λ_r|`` on every CP layer, as a proximal step.

    After each optimizer step λ is moved towards zero by ``lr · μ · |σ|`` and stays
    there when it arrives (soft thresholding): with σ = 1, as at the start, by
    ``lr · μ``. The factor σ is there because a network could otherwise let λ shrink and
    σ grow, and so evade the penalty without a smaller kernel. A penalty in the loss
    would let λ oscillate around zero; this one makes exact zeros, which
    ``truncate(model, rank=nonzero_ranks(model))`` then removes without a change of the
    output.

    With optimizers that scale the gradient, such as Adam, the penalty is not scaled,
    just as decoupled weight decay is not.

    Args:
        mu: Strength μ.

    Raises:
        TypeError: If ``mu`` is no number.
        ValueError: If it is negative.

    Source: Parikh & Boyd 2014, Proximal Algorithms, doi:10.1561/2400000003 (soft
    thresholding).

    >>> ProximalL1(0.01)
    ProximalL1(mu=0.01)
    """

    def __init__(self, mu: float) -> None:
        """Keep the strength."""
        self.mu = check_strength(mu, "mu")

    def start(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Check that there are components to penalise."""
        nonzero_ranks(model)

    @torch.no_grad()
    def after_step(self, model: nn.Module, optimizer: Optimizer, step: int) -> None:
        """Soft-threshold the λ that the optimizer trains."""
        rates = {p: g["lr"] for g in optimizer.param_groups for p in g["params"]}
        for layer in cp_layers(model).values():
            if layer.lam in rates:
                threshold = rates[layer.lam] * self.mu * layer.scale.abs()
                left = (layer.lam.abs() - threshold).clamp_min(0)
                layer.lam.copy_(left * layer.lam.sign())

    def __repr__(self) -> str:
        """With the strength."""
        return f"ProximalL1(mu={self.mu})"


def nonzero_ranks(model: nn.Module) -> dict[str, int]:
    """Components of each CP layer whose λ is not zero, for `cpnb.truncate`.

    Args:
        model: A module with CP layers, or one.

    Returns:
        A count by layer name, at least 1: a layer keeps one component, though it be
        zero.

    Raises:
        ValueError: If there are no CP layers.

    >>> from cpnb import CPLinear, truncate
    >>> layer = CPLinear(8, 6, rank=4)
    >>> _ = layer.lam.data[1:3].zero_()
    >>> truncate(layer, rank=nonzero_ranks(layer)).rank
    2
    """
    layers = cp_layers(model)
    if not layers:
        raise ValueError(
            f"model is a {type(model).__name__} without CP layers. Call "
            "cpnb.canonicalize first."
        )
    return {
        name: max(1, int(layer.lam.count_nonzero())) for name, layer in layers.items()
    }
